"""What other users may load from object storage: what `--allow` names, compared by key."""

from __future__ import annotations

import os

import pytest

from ..e2e.conftest import StartDaemon
from ..e2e.support import DaemonProcess, Nursery, expected
from .proxy import FaultProxy, asks
from .support import FLAGS, Bucket, assert_no_secret, environment

NOBODY = 65534


@pytest.fixture
def root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")


@pytest.fixture
def allowing(root: None, start_daemon: StartDaemon, proxy: FaultProxy, bucket: Bucket) -> DaemonProcess:
    """Lets others load what is below `public/`."""
    return start_daemon(*FLAGS, "--allow", bucket.uri("public/"), environment=environment(proxy.endpoint))


def test_another_user_loads_what_is_below_the_prefix(
    allowing: DaemonProcess, bucket: Bucket, nursery: Nursery
) -> None:
    tensors = bucket.put_random("public/model/one.safetensors")
    for key in ("public/model/one.safetensors", "public/model/"):
        client = nursery.start("load", uid=NOBODY, socket_dir=allowing.socket_dir, source=bucket.uri(key))
        assert client.hear("loaded")["found"] == expected(tensors)


@pytest.mark.parametrize(
    "key",
    [
        "private/one.safetensors",
        "public-too/one.safetensors",
        "publi",
        "Public/one.safetensors",
        "/public/one.safetensors",
        "public/../private/one.safetensors",
        "public/./one.safetensors",
        "public%2F/one.safetensors",
        "",
    ],
)
def test_another_user_is_refused_everything_else_and_nothing_is_asked(
    key: str, allowing: DaemonProcess, proxy: FaultProxy, bucket: Bucket, nursery: Nursery
) -> None:
    client = nursery.start("load", uid=NOBODY, socket_dir=allowing.socket_dir, source=bucket.uri(key))
    said = client.hear("failed")
    assert said["error"] == "AccessDeniedError", said
    assert bucket.uri(key) in said["message"]
    assert proxy.requests(asks()) == []
    assert_no_secret(said["message"])


def test_an_index_does_not_lead_another_user_out_of_the_prefix(
    allowing: DaemonProcess, bucket: Bucket, nursery: Nursery
) -> None:
    bucket.put_random("private/one.safetensors")
    index = b'{"weight_map": {"layer.0.weight": "../../private/one.safetensors"}}'
    bucket.put("public/model/model.safetensors.index.json", index)
    client = nursery.start(
        "load", uid=NOBODY, socket_dir=allowing.socket_dir, source=bucket.uri("public/model/")
    )
    assert client.hear("failed")["error"] in ("AccessDeniedError", "CheckpointInvalidError")


def test_another_user_s_staged_object_is_not_told_of(
    allowing: DaemonProcess, bucket: Bucket, nursery: Nursery
) -> None:
    """Nor may it be loaded because it is in memory."""
    bucket.put_random("private/one.safetensors")
    with allowing.client() as client:
        client.prefetch(bucket.uri("private/one.safetensors"))
    other = nursery.start(
        "load", uid=NOBODY, socket_dir=allowing.socket_dir, source=bucket.uri("private/one.safetensors")
    )
    assert other.hear("failed")["error"] == "AccessDeniedError"
    status = nursery.start("status", uid=NOBODY, socket_dir=allowing.socket_dir).hear("status")["status"]
    assert (status["stages"], status["loads"]) == ([], [])
