"""Directories whose files contradict each other, through a real daemon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from penstock.client import errors

from ..conftest import StartDaemon
from ..support import DaemonProcess

INDEX = "model.safetensors.index.json"
WANTED = {"a": 1.0, "b": 2.0, "c": 3.0}


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon("--memory-limit", "64MiB")


@pytest.fixture
def superseded(tmp_path: Path) -> Path:
    """Two shards, of which the second holds an older `b`."""
    save(tmp_path / "m-1.safetensors", a=1.0, b=2.0)
    save(tmp_path / "m-2.safetensors", b=99.0, c=3.0)
    return tmp_path


def save(path: Path, **values: float) -> None:
    safetensors.torch.save_file({name: torch.tensor([value]) for name, value in values.items()}, path)


def index(directory: Path, **weight_map: str) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def floats(state: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: tensor.item() for name, tensor in state.items()}


def module(*names: str) -> torch.nn.Module:
    made = torch.nn.Module()
    for name in names:
        made.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))
    return made


def test_the_copy_that_the_index_names_is_delivered_by_every_way_of_loading(
    daemon: DaemonProcess, superseded: Path
) -> None:
    index(superseded, a="m-1.safetensors", b="m-1.safetensors", c="m-2.safetensors")
    filled = module("a", "b", "c")
    with daemon.client() as client:
        assert floats(client.load_state_dict(superseded)) == WANTED
        assert floats(client.load_state_dict(superseded, memory_limit=0)) == WANTED
        client.load_into(filled, superseded)
        assert floats(filled.state_dict()) == WANTED
        with client.load(superseded, tensors=["b"]) as load:
            assert floats(dict(load)) == {"b": 2.0}
        listed = []

        def choose(name: str) -> bool:
            listed.append(name)
            return name != "a"

        with client.load(superseded, tensors=choose) as load:
            assert floats(dict(load)) == {"b": 2.0, "c": 3.0}
        assert sorted(listed) == ["a", "b", "c"]
        client.prefetch(superseded)
        assert floats(client.load_state_dict(superseded)) == WANTED


def test_an_index_that_changes_its_mind_is_followed_at_once(daemon: DaemonProcess, superseded: Path) -> None:
    """The files are warm, and have not changed."""
    index(superseded, a="m-1.safetensors", b="m-1.safetensors", c="m-2.safetensors")
    with daemon.client() as client:
        assert floats(client.load_state_dict(superseded)) == WANTED
        index(superseded, a="m-1.safetensors", b="m-2.safetensors", c="m-2.safetensors")
        assert floats(client.load_state_dict(superseded)) == {**WANTED, "b": 99.0}


def test_without_an_index_nothing_is_delivered_and_nothing_is_changed(
    daemon: DaemonProcess, superseded: Path
) -> None:
    filled = module("a", "b", "c")
    with daemon.client() as client:
        for call in (
            lambda: client.load_state_dict(superseded),
            lambda: client.load_into(filled, superseded),
            lambda: list(client.load(superseded)),
            lambda: client.prefetch(superseded),
        ):
            with pytest.raises(errors.CheckpointInvalidError) as caught:
                call()
            for part in ("m-1.safetensors", "m-2.safetensors", "both hold tensor 'b'"):
                assert part in str(caught.value)
    assert floats(filled.state_dict()) == {"a": 0.0, "b": 0.0, "c": 0.0}


def test_a_stale_index_is_told_to_the_client_and_the_log(daemon: DaemonProcess, tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", a=1.0)
    index(tmp_path, a="model-00001-of-00002.safetensors")
    with daemon.client() as client:
        with pytest.warns(errors.CheckpointWarning, match=f"{INDEX} is stale") as told:
            assert floats(client.load_state_dict(tmp_path)) == {"a": 1.0}
        assert len(told) == 1
        client.prefetch(tmp_path)
    assert daemon.log().count(" warning odd checkpoint ") == 2


def test_a_load_leaves_nothing_behind_where_its_warning_is_an_error(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    save(tmp_path / "model.safetensors", a=1.0)
    index(tmp_path, a="model-00001-of-00002.safetensors")
    with daemon.client() as client, pytest.raises(errors.CheckpointWarning):
        client.load(tmp_path)
    daemon.wait_idle()


def test_a_header_is_parsed_with_nothing_that_lies_in_the_working_directory(
    socket_dir: Path, tmp_path: Path
) -> None:
    """`python -m` puts that on the path; the daemon itself is started elsewhere and goes there."""
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("json", "msgspec", "resource"):
        (hostile / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'a').write({name!r})")
    program = (
        "import os, runpy, sys, json, msgspec, resource, penstock.server.daemon\n"  # from elsewhere
        f"os.chdir({str(hostile)!r})\n"
        "sys.path.insert(0, os.getcwd())\n"
        "runpy.run_module('penstock.server', run_name='__main__', alter_sys=True)"
    )
    path = tmp_path / "m.safetensors"
    wide = {f"t{number:06}": torch.zeros(1) for number in range(20000)}  # a header above 1 MiB
    safetensors.torch.save_file(wide, path)
    daemon = DaemonProcess(socket_dir, "--memory-limit", "64MiB", program=("-c", program)).wait_ready()
    try:
        with daemon.client() as client:
            assert len(client.load_state_dict(path)) == len(wide)
        assert not (tmp_path / "mark").exists(), (tmp_path / "mark").read_text()
    finally:
        daemon.kill()
