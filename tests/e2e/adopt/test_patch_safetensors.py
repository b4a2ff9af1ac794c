"""`patch_safetensors`: what it replaces, what it puts back, and when the library reads after all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from penstock.client import FallbackWarning, StreamerClient, errors, patch_safetensors
from penstock.client.adopt import safe_open as opening
from penstock.client.adopt import safe_patch
from penstock.client.safetensors import safe_open

from ..conftest import StartDaemon
from ..programs import say
from ..support import (
    MIB,
    Checkpoints,
    DaemonProcess,
    Nursery,
    random_tensors,
    same,
    write_checkpoint,
)


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not warned yet; and the library is itself before and after."""
    monkeypatch.setattr(safe_patch, "_told", set())
    before = bindings()
    yield
    after = bindings()
    assert {name: after.get(name) for name in before} == before
    assert safetensors.safe_open is opening.library_open


def bindings() -> dict[tuple[str, str], int]:
    """Every name of every module for either class."""
    kinds = (id(opening.library_open), id(safe_patch.PatchedOpen))
    return {
        (key, name): id(value)
        for key, module in list(sys.modules.items())
        if isinstance(module, ModuleType)
        for name, value in list(vars(module).items())
        if id(value) in kinds
    }


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A library that took the class before, under a name of its own."""
    module = ModuleType("penstock_example_reader")
    exec("from safetensors import safe_open as opener", vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_modules_that_took_the_class_before_and_while_it_is_patched_have_ours_until_the_end(
    daemon: DaemonProcess, checkpoints: Checkpoints, reader: ModuleType
) -> None:
    path, tensors = checkpoints("one")
    late = ModuleType("penstock_example_late")
    with patch_safetensors(daemon.client()):
        exec("from safetensors import safe_open", vars(late))
        sys.modules[late.__name__] = late
        try:
            for opener in (reader.opener, late.safe_open, safetensors.safe_open):
                with opener(path, "pt") as file:
                    assert isinstance(file, safe_open)
                    assert isinstance(file, safetensors.safe_open)
            del file
            same(safetensors.torch.load_file(path).items(), tensors)
            found = safetensors.numpy.load_file(path)
            same(((name, torch.from_numpy(array)) for name, array in found.items()), tensors)
        finally:
            kept = late.safe_open
    assert (
        sys.modules.pop(late.__name__).safe_open
        is reader.opener
        is safetensors.safe_open
        is opening.library_open
    )
    with kept(path, "pt") as file:  # by somebody who kept ours
        assert type(file) is opening.library_open


def test_it_is_undone_when_the_last_one_is(daemon: DaemonProcess) -> None:
    first = patch_safetensors(daemon.client())
    with patch_safetensors(daemon.client()) as second:
        first.undo()
        first.undo()
        assert safetensors.safe_open is safe_patch.PatchedOpen
    assert safetensors.safe_open is opening.library_open
    second.undo()


def test_threads_may_patch_and_read_at_once(daemon: DaemonProcess, checkpoints: Checkpoints) -> None:
    path, tensors = checkpoints("one")
    client = daemon.client()
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                with patch_safetensors(client):
                    same(safetensors.torch.load_file(path).items(), tensors)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_without_a_daemon_the_library_reads_and_it_is_told_once(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    path, tensors = checkpoints("one")
    with patch_safetensors(StreamerClient(tmp_path / "nowhere")):
        with pytest.warns(FallbackWarning, match="no penstock daemon answers") as told:
            same(safetensors.torch.load_file(path).items(), tensors)
        assert len(told) == 1
        assert str(path) in str(told[0].message)
        same(safetensors.torch.load_file(path).items(), tensors)  # a warning would be an error


def test_a_damaged_file_is_an_error_and_an_absent_one_too(daemon: DaemonProcess, tmp_path: Path) -> None:
    damaged = write_checkpoint(tmp_path / "damaged", random_tensors(2, 100))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with patch_safetensors(daemon.client()):
        with pytest.raises(safetensors.SafetensorError) as caught:
            safetensors.torch.load_file(damaged)
        assert isinstance(caught.value, errors.CheckpointInvalidError)
        with pytest.raises(FileNotFoundError) as absent:
            safetensors.torch.load_file(tmp_path / "absent")
        assert not isinstance(absent.value, errors.PenstockError)


def test_what_the_daemon_has_no_room_for_is_read_by_the_library(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    """The file is opened through the daemon, and the tensor refused."""
    tensors = random_tensors(1, 5 * MIB)
    path = write_checkpoint(tmp_path / "large", tensors)
    with patch_safetensors(daemon.client()), safetensors.safe_open(path, "pt") as file:
        assert isinstance(file, safe_open)
        part = file.get_slice("layer.0.weight")
        with pytest.warns(FallbackWarning, match="--memory-limit"):
            assert torch.equal(part[3:5], tensors["layer.0.weight"][3:5])
        same(((name, file.get_tensor(name)) for name in file.keys()), tensors)  # noqa: SIM118
        same(file.get_tensors().items(), tensors)


def test_when_the_daemon_dies_the_library_reads_the_rest_of_the_same_file_only(
    start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.client.adopt.safe_file.SMALL_FILE_BYTES", 0)
    tensors = random_tensors(3, 1000)
    path = write_checkpoint(tmp_path / "same", tensors)
    changed = write_checkpoint(tmp_path / "changed", tensors)
    daemon = start_daemon()
    client = StreamerClient(daemon.socket_dir, reconnect_timeout=0)
    with patch_safetensors(client), safetensors.safe_open(path, "pt") as file:
        other: Any = safetensors.safe_open(changed, "pt")
        found = {"layer.0.weight": file.get_tensor("layer.0.weight")}
        daemon.kill()
        write_checkpoint(changed, random_tensors(3, 1000, seed=4))
        with pytest.warns(FallbackWarning, match=str(daemon.socket_dir)):
            found.update((name, file.get_tensor(name)) for name in list(tensors)[1:])
        same(found.items(), tensors)
        with pytest.raises(errors.CheckpointChangedError, match="changed while it was read"):
            other.get_tensor("layer.0.weight")


def read_as_a_user(socket_dir: str, path: str) -> None:
    with patch_safetensors(StreamerClient(socket_dir)), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        names = [sorted(safetensors.torch.load_file(path)) for _ in range(2)]
    say("read", names=names, told=[str(one.message) for one in told])


def test_what_a_user_may_not_load_through_the_daemon_the_library_reads(
    root: None, daemon: DaemonProcess, nursery: Nursery
) -> None:
    directory = daemon.socket_dir.parent / "files"
    directory.mkdir(exist_ok=True)
    path = write_checkpoint(directory / "f.safetensors", random_tensors(2, 10))
    path.chmod(0o644)
    client = nursery.start(read_as_a_user, uid=1001, socket_dir=daemon.socket_dir, path=path)
    said = client.hear("read")
    assert said["names"] == [["layer.0.weight", "layer.1.weight"]] * 2
    assert len(said["told"]) == 1
    assert "--allow" in said["told"][0]
    assert client.wait() == 0


def test_a_forked_child_reads_with_the_library(daemon: DaemonProcess, checkpoints: Checkpoints) -> None:
    path, tensors = checkpoints("one")
    with patch_safetensors(daemon.client()):
        same(safetensors.torch.load_file(path).items(), tensors)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with pytest.warns(FallbackWarning, match="fork"):
                    found = safetensors.torch.load_file(path)
                code = 0 if sorted(found) == sorted(tensors) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_other_frameworks_are_left_to_the_library(daemon: DaemonProcess, checkpoints: Checkpoints) -> None:
    path, _ = checkpoints("one")
    with patch_safetensors(daemon.client()):
        assert type(safetensors.safe_open(path, "mlx")) is opening.library_open


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


CHECK = """
import sys, safetensors
library = [safetensors.safe_open]
import penstock.client
print(safetensors.safe_open is library[0], "torch" in sys.modules, "grpc" in sys.modules)
"""


@pytest.mark.parametrize(("value", "patched"), [("1", True), ("on", True), ("0", False), ("", False)])
def test_the_variable_patches_when_the_client_is_imported_and_imports_little(
    value: str, patched: bool
) -> None:
    done = run_python(CHECK, PENSTOCK_PATCH_SAFETENSORS=value)
    assert done.stdout.split() == [str(not patched), "False", "False"], done.stderr


def test_a_variable_that_says_neither_yes_nor_no_is_an_error() -> None:
    done = run_python(CHECK, PENSTOCK_PATCH_SAFETENSORS="maybe")
    assert "ValueError: PENSTOCK_PATCH_SAFETENSORS='maybe' is neither yes nor no" in done.stderr


def test_the_variable_makes_a_program_read_through_the_daemon(
    daemon: DaemonProcess, checkpoints: Checkpoints
) -> None:
    path, tensors = checkpoints("one")
    before: Any = daemon.status()["totals"]["delivered_bytes"]
    code = (
        f"import penstock.client, safetensors.torch; print(len(safetensors.torch.load_file({str(path)!r})))"
    )
    done = run_python(code, PENSTOCK_PATCH_SAFETENSORS="1", PENSTOCK_SOCKET_DIR=str(daemon.socket_dir))
    assert done.stdout.split() == [str(len(tensors))], done.stderr
    assert daemon.status()["totals"]["delivered_bytes"] - before == len(tensors) * MIB
