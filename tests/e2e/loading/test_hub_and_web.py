"""Daemons that load from the Hub and from web servers, for root and for another user."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch

from penstock.client import SafetensorsStreamer, errors, list_safetensors
from penstock.client.cli.commands import main

from ...server.hub_server import HubServer, huggingface_hub_online
from ...server.nginx import nginx
from ..conftest import StartDaemon
from ..support import DaemonProcess, Nursery, expected, random_tensors, running_daemon, same, wait_until

NOBODY = 65534
MIB = 1 << 20
TOKEN = "hf_TOKENOFTHETESTS"
REPOSITORY = "org/private"
FLAGS = ("--memory-limit", "64MiB", "--object-block-size", "64KiB", "--object-retries", "3")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with contextlib.closing(HubServer()) as server:
        server.tokens.add(TOKEN)
        yield server


@pytest.fixture(scope="module")
def tensors(hub: HubServer) -> Tensors:
    """In a private repository, in two files with an index, and in a subfolder as one, with a variant."""
    tensors = random_tensors(8, MIB // 16)
    names = sorted(tensors)
    index = {name: f"model-0000{number // 4 + 1}-of-00002.safetensors" for number, name in enumerate(names)}
    files = {
        file: safetensors.torch.save({name: tensors[name] for name in names if index[name] == file})
        for file in set(index.values())
    }
    files["model.safetensors.index.json"] = repr({"weight_map": index}).replace("'", '"').encode()
    files["unet/model.fp16.safetensors"] = safetensors.torch.save({"half": tensors[names[0]].half()})
    files["unet/model.safetensors"] = safetensors.torch.save({"full": tensors[names[0]]})
    hub.commit(REPOSITORY, files)
    hub.repositories[REPOSITORY].private = True
    return tensors


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, require_tool: Callable[[str], str]
) -> Iterator[tuple[str, Path]]:
    """A web server, and its directory."""
    files, state = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("state")
    with nginx(require_tool("nginx"), files, state) as port:
        yield f"http://127.0.0.1:{port}", files


@pytest.fixture(scope="module")
def daemon(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "NETRC": os.devnull,
    }
    with running_daemon(*FLAGS, environment=environment) as daemon:
        yield daemon
        assert TOKEN not in daemon.log() + str(daemon.status())
        assert "Signature" not in daemon.log() + str(daemon.status())


def test_a_repository_is_loaded_and_then_warm(
    daemon: DaemonProcess, hub: HubServer, tensors: Tensors
) -> None:
    with daemon.client() as client:
        same(client.load(f"hf://{REPOSITORY}"), tensors)
        hub.asked.clear()
        hub.stored.clear()
        same(client.load(f"hf://{REPOSITORY}/"), tensors)
    assert [call.path for call in hub.asked] == [f"/api/models/{REPOSITORY}/revision/main"]
    assert hub.stored == []


def test_subfolders_and_variants_are_what_they_are_in_directories(
    daemon: DaemonProcess, tensors: Tensors
) -> None:
    with daemon.client() as client:
        assert [name for name, _ in client.load(f"hf://{REPOSITORY}/unet")] == ["full"]
        assert [name for name, _ in client.load(f"hf://{REPOSITORY}/unet", variant="fp16")] == ["half"]


def test_sources_of_three_stores_make_one_load(
    daemon: DaemonProcess, site: tuple[str, Path], tensors: Tensors, tmp_path: Path
) -> None:
    endpoint, files = site
    a, b = random_tensors(2, 1000, seed=1), random_tensors(2, 1000, seed=2)
    a, b = {f"a.{name}": one for name, one in a.items()}, {f"b.{name}": one for name, one in b.items()}
    safetensors.torch.save_file(a, files / "a.safetensors")
    safetensors.torch.save_file(b, tmp_path / "b.safetensors")
    sources = [f"{endpoint}/a.safetensors", f"hf://{REPOSITORY}", str(tmp_path / "b.safetensors")]
    with daemon.client() as client, client.load(sources) as load:
        same(load, {**a, **tensors, **b})


def test_a_prefetch_at_the_start_stages_a_repository(
    start_daemon: StartDaemon, hub: HubServer, tensors: Tensors, tmp_path: Path
) -> None:
    daemon = start_daemon(
        *(*FLAGS, "--prefetch", f"hf://{REPOSITORY}", "--ready-after-prefetch"),
        environment={
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
        },
    )
    wait_until(lambda: daemon.http("/readyz")[0] == 200, "the repository to be staged")
    hub.stored.clear()
    with daemon.client() as client:
        same(client.load(f"hf://{REPOSITORY}"), tensors)
    assert hub.stored == []


def test_the_command_line_takes_uris(
    daemon: DaemonProcess, tensors: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load", "--socket-dir", str(daemon.socket_dir), f"hf://{REPOSITORY}@main"]) == 0
    assert main(["prefetch", "--socket-dir", str(daemon.socket_dir), f"hf://{REPOSITORY}/unet"]) == 0
    capsys.readouterr()


def test_the_drop_in_takes_uris(
    daemon: DaemonProcess,
    site: tuple[str, Path],
    tensors: Tensors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(daemon.socket_dir))
    listed = list_safetensors(f"hf://{REPOSITORY}")
    assert [uri.rpartition("/")[2] for uri in listed] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([uri.replace("hf://", "hf://models/") for uri in listed])
        same(streamer.get_tensors(), tensors)
    endpoint, files = site
    safetensors.torch.save_file(tensors, files / "all.safetensors")
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(f"{endpoint}/all.safetensors")
        same(streamer.get_tensors(), tensors)
    with pytest.raises(ValueError, match="web servers give no lists"):
        list_safetensors(f"{endpoint}/models")
    with pytest.raises(ValueError, match="no repository org/none"):
        list_safetensors("hf://org/none")
    assert list_safetensors(f"hf://{REPOSITORY}/none") == []


def test_files_beside_the_weights_are_fetched(
    daemon: DaemonProcess, hub: HubServer, site: tuple[str, Path], tensors: Tensors, tmp_path: Path
) -> None:
    hub.commit("org/files", {"config.json": b"{}", "sub/vocab.txt": b"a b", "m.safetensors": b"x"})
    with daemon.client() as client:
        folder = client.fetch("hf://org/files", tmp_path / "files")
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert {"config.json", "sub/vocab.txt"} <= found
        assert "m.safetensors" not in found
        assert (folder / "sub" / "vocab.txt").read_bytes() == b"a b"
        with pytest.raises(errors.CheckpointInvalidError, match="web servers give no lists"):
            client.fetch(f"{site[0]}/models", tmp_path / "others")


def test_an_object_that_changes_in_mid_load_fails_it(daemon: DaemonProcess, site: tuple[str, Path]) -> None:
    """From a window, which reads as the client goes."""
    endpoint, files = site
    before, after = random_tensors(64, MIB // 16, seed=3), random_tensors(64, MIB // 16, seed=4)
    safetensors.torch.save_file(before, files / "changes.safetensors")
    with (
        daemon.client() as client,
        client.load(f"{endpoint}/changes.safetensors", memory_limit="2MiB") as load,
    ):
        tensors = iter(load)
        next(tensors)
        safetensors.torch.save_file(after, files / "changes.safetensors")
        os.utime(files / "changes.safetensors", (1, 1))
        with pytest.raises(errors.CheckpointChangedError, match=r"changes\.safetensors"):
            list(tensors)


def test_a_repository_of_the_cache_is_loaded_offline(
    start_daemon: StartDaemon, hub: HubServer, tensors: Tensors, tmp_path: Path
) -> None:
    api = huggingface_hub.HfApi(endpoint=hub.url, token=TOKEN)
    with huggingface_hub_online():
        api.snapshot_download(REPOSITORY, cache_dir=tmp_path / "cache")
    hub.asked.clear()
    daemon = start_daemon(
        *FLAGS,
        environment={
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1",
        },
    )
    with daemon.client() as client:
        same(client.load(f"hf://{REPOSITORY}"), tensors)
        with pytest.raises(errors.CheckpointNotFoundError, match="HF_HUB_OFFLINE"):
            client.load_state_dict("hf://org/none")
    assert hub.asked == []


def test_another_user_loads_what_prefixes_name_and_nothing_else(
    start_daemon: StartDaemon,
    hub: HubServer,
    site: tuple[str, Path],
    tensors: Tensors,
    nursery: Nursery,
    tmp_path: Path,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    endpoint, files = site
    (files / "models").mkdir(exist_ok=True)
    one = random_tensors(2, 1000, seed=5)
    safetensors.torch.save_file(one, files / "models" / "one.safetensors")
    safetensors.torch.save_file(one, files / "secret.safetensors")
    allowed = ("--allow", f"hf://{REPOSITORY}", "--allow", f"{endpoint}/models", "--allow", hub.storage_url)
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "NETRC": os.devnull,
    }
    daemon = start_daemon(*FLAGS, *allowed, environment=environment)

    for source, found in ((f"hf://{REPOSITORY}", tensors), (f"{endpoint}/models/one.safetensors", one)):
        client = nursery.start("load", uid=NOBODY, socket_dir=daemon.socket_dir, source=source)
        assert client.hear("loaded")["found"] == expected(found)
    hub.asked.clear()
    for source in (
        "hf://org/other",
        f"{endpoint}/secret.safetensors",
        f"{endpoint}/models/../secret.safetensors",
        f"{endpoint}/models/%2e%2e/secret.safetensors",
        f"http://127.0.0.1:{daemon.http_address.rpartition(':')[2]}/status",
        f"http://localhost:{endpoint.rpartition(':')[2]}/models/one.safetensors",
        "http://169.254.169.254/latest/meta-data",
    ):
        client = nursery.start("load", uid=NOBODY, socket_dir=daemon.socket_dir, source=source)
        assert client.hear("failed")["error"] == "AccessDeniedError", source
    assert hub.asked == []
