"""Names of files and directories are names, and no patterns or quotations."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.client import SafetensorsStreamer, StreamerClient, list_safetensors
from penstock.client.cli.health import check

NAMES = [
    "model [v2]",
    "*",
    "?odel",
    "100%",
    "%41",
    "a%2Fb",
    "~",
    "$HOME",
    "{a,b}",
    "new\nline",
    "naïve",
    "#x?y",
]


@pytest.fixture(scope="module")
def client() -> Iterator[StreamerClient]:
    with StreamerClient.embedded("32MiB") as client:
        yield client


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_and_its_files_may_have_any_name(
    name: str, client: StreamerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / name
    directory.mkdir()
    for other in ("a", "modelx", "A", "b"):  # what a pattern would find instead
        (tmp_path / other).mkdir()
        save_file({"wrong": torch.zeros(1)}, tmp_path / other / "m.safetensors")
    path = directory / f"{name}.safetensors"
    save_file({"right": torch.ones(1)}, path)
    assert list_safetensors(str(directory)) == [str(path)]
    assert list_safetensors(f"{directory}/") == [str(path)]
    monkeypatch.chdir(tmp_path)
    assert list_safetensors(name) == [f"{name}/{name}.safetensors"]
    assert list(client.load_state_dict(directory)) == ["right"]
    assert list(client.load_state_dict([name + "/" + path.name])) == ["right"]
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(client.socket_dir))
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(list_safetensors(str(directory)))
        assert [name for name, _ in streamer.get_tensors()] == ["right"]


def test_only_safetensors_that_are_not_hidden_are_listed(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", ".hidden.safetensors", "._a.safetensors", "README.md"):
        (tmp_path / name).touch()
    assert list_safetensors(str(tmp_path)) == [str(tmp_path / f"{name}.safetensors") for name in "ab"]


def test_a_directory_without_files_or_that_is_none_has_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        assert list_safetensors(str(path)) == []


@pytest.mark.parametrize("name", [b"s [1]", b"100%", b"%41", b"\xff\xfe", b"n\xc3\xa4"], ids=repr)
def test_a_socket_directory_may_have_any_name(name: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="pst-") as short:
        directory = os.path.join(short, os.fsdecode(name))
        os.mkdir(directory)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", directory)
            with StreamerClient.embedded("32MiB") as client:
                assert client.socket_dir.parent == Path(directory)
                assert client.evict().leased_bytes == 0
                check(client.socket_dir, live=True, timeout_seconds=60)
