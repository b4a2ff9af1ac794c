"""Checkpoints in several clouds through one real daemon: loads, prefetches, lists that mix them, the drop-in,
and what is told of them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from penstock.client import S3Credentials, SafetensorsStreamer, errors, list_safetensors

from ..e2e.conftest import StartDaemon
from ..e2e.support import (
    DaemonProcess,
    Nursery,
    expected,
    random_tensors,
    running_daemon,
    same,
    wait_until,
    write_checkpoint,
)
from .servers import (
    ACCOUNT,
    ACCOUNT_KEY,
    BUCKET,
    SECRET_KEY,
    azurite,
    fake_gcs,
    s3_client,
    s3_environment,
    seaweed,
)
from .test_azure_store import connection_string, service_of
from .test_gcs_store import make_bucket, upload

Put = Callable[[str, bytes], object]
FLAGS = ("--memory-limit", "64MiB", "--object-block-size", str(64 << 10), "--object-retries", "2")
SECRETS = (ACCOUNT_KEY, SECRET_KEY, "SharedKey", "Signature=", "sig=")
SCHEMES = ("gs", "az", "s3")
NOBODY = 65534


@pytest.fixture(scope="module")
def puts() -> Iterator[tuple[dict[str, Put], dict[str, str]]]:
    """How content gets to each store, and the environment of a daemon that reads it."""
    with contextlib.ExitStack() as stack:
        gcs = stack.enter_context(fake_gcs())
        # Only at its own port it knows objects, and so without conditions.
        make_bucket(gcs)
        blobs = stack.enter_context(azurite())
        service = stack.enter_context(service_of(blobs))
        service.create_container(BUCKET)
        s3 = stack.enter_context(seaweed())
        client = s3_client(s3)
        environment = {
            "STORAGE_EMULATOR_HOST": gcs.url.removeprefix("http://"),
            "AZURE_STORAGE_CONNECTION_STRING": connection_string(blobs.url, f"AccountKey={ACCOUNT_KEY}"),
            **s3_environment(s3.url),
            "NO_PROXY": "127.0.0.1",
        }
        yield (
            {
                "gs": lambda key, content: upload(gcs, key, content),
                "az": lambda key, content: service.get_blob_client(BUCKET, key).upload_blob(content),
                "s3": lambda key, content: client.put_object(Bucket=BUCKET, Key=key, Body=content),
            },
            environment,
        )


@pytest.fixture(scope="module")
def stored(puts: tuple[dict[str, Put], dict[str, str]]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of `model/` in each store: two files with an index, and a third that it does not name."""
    tensors = {}
    for seed, (scheme, put) in enumerate(puts[0].items()):
        mine = {f"{scheme}.{name}": one for name, one in random_tensors(8, 20_000, seed=seed).items()}
        weight_map: dict[str, str] = {}
        for number, name in enumerate(("model-0.safetensors", "model-1.safetensors")):
            part = {key: mine[key] for key in sorted(mine)[number::2]}
            put(f"model/{name}", safetensors.torch.save(part))
            weight_map |= dict.fromkeys(part, name)
        put("model/model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())
        put("model/config.json", f'{{"store": "{scheme}"}}'.encode())
        put("model/consolidated.safetensors", safetensors.torch.save(mine))
        tensors[scheme] = mine
    return tensors


@pytest.fixture(scope="module")
def module_daemon(puts: tuple[dict[str, Put], dict[str, str]]) -> Iterator[DaemonProcess]:
    with running_daemon(*FLAGS, environment=puts[1]) as daemon:
        yield daemon


@pytest.fixture
def daemon(module_daemon: DaemonProcess, stored: object) -> Iterator[DaemonProcess]:
    """After each test it has to be idle and to have told no secret."""
    yield module_daemon
    module_daemon.wait_idle()
    module_daemon.assert_log_clean()
    for secret in SECRETS:
        assert secret not in module_daemon.log() + str(module_daemon.status())


def top(scheme: str) -> str:
    return f"{scheme}://{BUCKET}/model"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_directory_with_an_index_loads_bit_for_bit(
    scheme: str, daemon: DaemonProcess, stored: dict[str, dict[str, torch.Tensor]]
) -> None:
    for source in (top(scheme), f"{top(scheme)}/", f"{top(scheme)}/model.safetensors.index.json"):
        with daemon.client() as client, client.load(source) as load:
            same(load, stored[scheme])


def test_a_list_may_mix_all_stores_and_files(
    daemon: DaemonProcess, stored: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    local = {f"local.{name}": one for name, one in random_tensors(2, 1000).items()}
    path = write_checkpoint(tmp_path / "local.safetensors", local)
    account = f"abfss://{BUCKET}@{ACCOUNT}.dfs.core.windows.net/model"
    places = {"gs": top("gs"), "az": account, "s3": top("s3")}
    sources = [f"{place}/consolidated.safetensors" for place in places.values()]
    wanted = {**stored["gs"], **stored["az"], **stored["s3"], **local}
    with daemon.client() as client, client.load([*sources, path]) as load:
        same(load, wanted)


@pytest.mark.parametrize(("scheme", "kind"), [("gs", "gcs"), ("az", "azure")])
def test_what_is_prefetched_is_warm_and_counted_under_the_store_s_name(
    scheme: str, kind: str, daemon: DaemonProcess, stored: dict[str, dict[str, torch.Tensor]]
) -> None:
    with daemon.client() as client:
        client.evict(top(scheme))
        client.prefetch(top(scheme), pin=True)
        with client.load(top(scheme)) as load:
            same(load, stored[scheme])
        assert load.stats.cache_hit
        client.evict(top(scheme))
    body = daemon.http("/metrics", accept="text/plain")[1].decode()
    assert f'penstock_read_bytes_total{{source="{kind}"}} 0' not in body
    assert f'penstock_read_bytes_total{{source="{kind}"}}' in body


def test_prefetches_at_the_start_and_prefixes_for_other_users_may_name_all_stores(
    puts: tuple[dict[str, Put], dict[str, str]],
    stored: dict[str, dict[str, torch.Tensor]],
    start_daemon: StartDaemon,
    nursery: Nursery,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    flags = [flag for scheme in SCHEMES for flag in ("--prefetch", top(scheme), "--allow", top(scheme))]
    daemon = start_daemon(*FLAGS, *flags, "--ready-after-prefetch", environment=puts[1])
    wait_until(lambda: daemon.http("/readyz")[0] == 200, "all to be staged")
    assert len(daemon.status()["stages"]) == len(SCHEMES)
    for scheme in SCHEMES:
        loads = nursery.start("load", uid=NOBODY, socket_dir=daemon.socket_dir, source=top(scheme))
        assert sorted(loads.hear("loaded")["found"]) == sorted(expected(stored[scheme]))
        beside = f"{scheme}://{BUCKET}/model-of-others"
        refused = nursery.start("load", uid=NOBODY, socket_dir=daemon.socket_dir, source=beside)
        assert refused.hear("failed")["error"] == "AccessDeniedError"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_drop_in_lists_and_streams(
    scheme: str,
    daemon: DaemonProcess,
    stored: dict[str, dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(daemon.socket_dir))
    files = list_safetensors(top(scheme))
    names = ("consolidated", "model-0", "model-1")
    assert files == [f"{top(scheme)}/{name}.safetensors" for name in names]
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files[1:])
        same(streamer.get_tensors(), stored[scheme])
    assert list_safetensors(f"{scheme}://{BUCKET}/nothing") == []
    with pytest.raises(ValueError, match="no-such-place"):
        list_safetensors(f"{scheme}://no-such-place/model")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_lies_beside_the_weights_is_fetched(scheme: str, daemon: DaemonProcess, tmp_path: Path) -> None:
    with daemon.client() as client:
        directory = client.fetch(top(scheme), tmp_path / "model")
    assert sorted(path.name for path in directory.iterdir() if not path.name.startswith(".")) == [
        "config.json",
        "model.safetensors.index.json",
    ]
    assert json.loads((directory / "config.json").read_text()) == {"store": scheme}


@pytest.mark.usefixtures("stored")
def test_credentials_for_s3_are_nobody_s_business_elsewhere(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(daemon.socket_dir))
    given = S3Credentials("id", "secret")
    assert list_safetensors(top("gs"), given)
    with pytest.raises(ValueError, match="cannot be given"):
        list_safetensors(top("s3"), given)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_there_is_not_found(scheme: str, daemon: DaemonProcess) -> None:
    with daemon.client() as client, pytest.raises(errors.CheckpointNotFoundError, match=r"none\.safetensors"):
        client.load_state_dict(f"{top(scheme)}/none.safetensors")


def test_no_library_of_a_store_is_imported_before_its_first_uri() -> None:
    code = (
        "import sys\n"
        "from penstock.server import daemon\n"
        "from tests.server.support import make_config\n"
        "from penstock.server.sources.stores import STORES\n"
        "stores = [store(make_config(object_retries=1, object_timeout_seconds=1.0)) for store in STORES]\n"
        "names = ('google.auth', 'azure', 'requests', 'msal', 'boto3', 'botocore', 'certifi')\n"
        "print([name for name in names if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
