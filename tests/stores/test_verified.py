"""One bit that is flipped on its way from a real server of each store that keeps checksums is found."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import boto3
import pytest
import safetensors.torch

from penstock.client import errors

from ..e2e.support import DaemonProcess, random_tensors, running_daemon, same
from ..s3 import faults
from ..s3.proxy import FaultProxy
from ..server.hub_server import HubServer
from .servers import BUCKET, KEY_ID, SECRET_KEY, conditional, fake_gcs, seaweed
from .test_gcs_store import make_bucket, upload

MIB = 1 << 20
FLAGS = ("--memory-limit", "64MiB", "--object-block-size", str(64 << 10), "--object-retries", "2")
TENSORS = random_tensors(4, MIB // 16)
BODY = safetensors.torch.save(TENSORS)
KEY = "model/m.safetensors"
LAST = len(BODY) - 1


@dataclass(frozen=True)
class Stored:
    """A checkpoint in a store."""

    uri: str
    algorithm: str
    verify: str | None
    """What it takes to have it verified."""
    flip: Callable[[], contextlib.AbstractContextManager[object]]
    """Its last byte is another as long as this lasts."""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Stored], DaemonProcess]]:
    with contextlib.ExitStack() as stack:
        gcs_proxy = stack.enter_context(contextlib.closing(FaultProxy(0)))
        gcs = stack.enter_context(fake_gcs(asked_at=gcs_proxy.port))
        gcs_proxy.upstream_port = stack.enter_context(conditional(gcs)).port
        make_bucket(gcs)
        upload(gcs, KEY, BODY)
        weed = stack.enter_context(seaweed())
        weed_proxy = stack.enter_context(contextlib.closing(FaultProxy(weed.port)))
        keys = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET_KEY}
        client = boto3.client("s3", endpoint_url=weed.url, region_name="us-east-1", **keys)
        client.put_object(Bucket=BUCKET, Key=KEY, Body=BODY, ChecksumAlgorithm="CRC64NVME")
        hub = stack.enter_context(contextlib.closing(HubServer()))
        hub.commit("org/model", {"m.safetensors": BODY})
        environment = {
            "HF_HUB_OFFLINE": "0",
            "STORAGE_EMULATOR_HOST": gcs_proxy.endpoint.removeprefix("http://"),
            "AWS_ENDPOINT_URL": weed_proxy.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
            "NO_PROXY": "127.0.0.1",
        }
        daemon = stack.enter_context(running_daemon(*FLAGS, environment=environment))
        yield (
            {
                "gcs": Stored(f"gs://{BUCKET}/{KEY}", "CRC32C", None, lambda: flipping(gcs_proxy)),
                "seaweed": Stored(f"s3://{BUCKET}/{KEY}", "CRC64NVME", None, lambda: flipping(weed_proxy)),
                "hub": Stored("hf://org/model", "SHA-256", "require", lambda: flipping_hub(hub)),
            },
            daemon,
        )


@contextlib.contextmanager
def flipping(proxy: FaultProxy) -> Iterator[None]:
    proxy.on(lambda request: request.range is not None, faults.flipped(LAST), times=None)
    try:
        yield
    finally:
        proxy.reset()


@contextlib.contextmanager
def flipping_hub(hub: HubServer) -> Iterator[None]:
    digest = hashlib.sha256(BODY).hexdigest()
    hub._blobs[digest] = BODY[:-1] + bytes([BODY[-1] ^ 1])
    try:
        yield
    finally:
        hub._blobs[digest] = BODY


@pytest.fixture(params=["gcs", "seaweed", "hub"])
def stored(request: pytest.FixtureRequest, module: tuple[dict[str, Stored], DaemonProcess]) -> Stored:
    return module[0][request.param]


@pytest.fixture
def daemon(module: tuple[dict[str, Stored], DaemonProcess]) -> Iterator[DaemonProcess]:
    with module[1].client() as client:
        client.evict()
    yield module[1]
    module[1].wait_idle()


def test_what_arrives_as_it_was_stored_is_verified(daemon: DaemonProcess, stored: Stored) -> None:
    with daemon.client() as client:
        load = client.load(stored.uri, verify=stored.verify)
        same(load, TENSORS)
        assert load.stats.verified_bytes == MIB
        assert [file.verified_by for file in load.files] == [stored.algorithm]


@pytest.mark.parametrize("memory_limit", [-1, 0])
def test_a_flipped_bit_ends_the_load_before_the_file_s_last_segment(
    daemon: DaemonProcess, stored: Stored, memory_limit: int
) -> None:
    names: list[str] = []
    with daemon.client() as client, stored.flip():
        load = client.load(stored.uri, verify=stored.verify, memory_limit=memory_limit)
        with pytest.raises(errors.CheckpointCorruptError) as caught:
            names.extend(name for name, _ in load)
    assert len(names) < len(TENSORS)
    assert caught.value.details["algorithm"] == stored.algorithm
    with daemon.client() as client:
        same(client.load(stored.uri, verify="require"), TENSORS)


def test_the_hub_s_digests_are_not_computed_unless_they_are_asked_for(
    daemon: DaemonProcess, module: tuple[dict[str, Stored], DaemonProcess]
) -> None:
    with daemon.client() as client:
        load = client.load(module[0]["hub"].uri)
        same(load, TENSORS)
        assert load.stats.verified_bytes == 0
