"""StreamerClient.embedded() with the real daemon: it comes, serves and goes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.client import DaemonUnavailableError, StreamerClient

from ..e2e.support import run_python, wait_until

TENSORS = {f"t{index}": torch.arange(index, index + 1000) for index in range(10)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


@pytest.fixture(autouse=True)
def tempdir(monkeypatch: pytest.MonkeyPatch, socket_dir: Path, tmp_path: Path) -> Path:
    """Where the private directories come to lie, to see that they go. After pytest made its own."""
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(socket_dir))
    return socket_dir


def test_it_serves_and_leaves_nothing_behind(checkpoint: Path, tempdir: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    with StreamerClient.embedded(memory_limit="64MB", concurrency=2) as client:
        assert client.socket_dir.parent == tempdir
        assert client.socket_dir.stat().st_mode & 0o777 == 0o700
        status = client.status()
        assert status["staging"]["limit_bytes"] == 64_000_000
        assert status["configuration"]["concurrency"] == "2"
        state = client.load_state_dict(checkpoint)
        assert "embedded" in repr(client)
    assert not Path(f"/proc/{status['pid']}").exists()
    assert list(tempdir.iterdir()) == []
    for name, tensor in TENSORS.items():
        assert torch.equal(state[name], tensor)
    del state, tensor
    gc.collect()
    # Two are gRPC's own; it closes its sockets on a thread of its own.
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= fds + 2, "descriptors to be closed")
    client.close()


def test_dropping_the_client_ends_the_daemon(tempdir: Path) -> None:
    client = StreamerClient.embedded()
    pid = client.status()["pid"]
    del client
    gc.collect()
    assert not Path(f"/proc/{pid}").exists()
    assert list(tempdir.iterdir()) == []


def test_the_end_of_the_process_ends_the_daemon_silently(checkpoint: Path, tempdir: Path) -> None:
    script = f"""
from penstock.client import StreamerClient
client = StreamerClient.embedded()
kept = next(iter(client.load({os.fspath(checkpoint)!r})))
state = client.load_state_dict({os.fspath(checkpoint)!r})
print(client.status()["pid"])
"""
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script],
        env={**os.environ, "TMPDIR": os.fspath(tempdir)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stderr == ""
    assert not Path(f"/proc/{int(result.stdout)}").exists()
    assert list(tempdir.iterdir()) == []


def test_a_daemon_that_cannot_start_says_why(tempdir: Path) -> None:
    with pytest.raises(DaemonUnavailableError, match="--no-such-flag"):
        StreamerClient.embedded(no_such_flag=3)
    assert list(tempdir.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"socket_dir": "/run/elsewhere"}, "takes no socket_dir: the daemon has a directory of its own"),
        ({"socket-dir": "/run/elsewhere"}, "takes no socket-dir"),
        ({"exit_with_stdin": False}, "takes no exit_with_stdin: the daemon ends with the client"),
        ({"memory-limit": 5}, "the argument memory_limit"),
        ({"help": True}, "penstockd --help"),
        ({"version": True}, "penstockd --version"),
    ],
    ids=str,
)
def test_flags_that_are_not_for_a_private_daemon_are_refused_before_it_starts(
    flags: dict[str, Any], why: str, tempdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ValueError, match=f"^an embedded daemon .*{why}"):
        StreamerClient.embedded(**flags)
    assert list(tempdir.iterdir()) == []


def deep(directory: Path, path_bytes: int) -> Path:
    """A directory below it whose path has so many bytes."""
    missing = path_bytes - len(os.fsencode(directory)) - 1
    path = directory / ("é" * (missing // 2) + "x" * (missing % 2))
    path.mkdir()
    assert len(os.fsencode(path)) == path_bytes
    return path


# Of /penstock-xxxxxxxx/penstock.sock, the rest of a socket's path.
REST_BYTES = 32


def test_the_sockets_lie_where_temporary_files_do_as_long_as_their_paths_fit(
    checkpoint: Path, tempdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits, too_long = deep(tempdir, 107 - REST_BYTES), deep(tempdir, 108 - REST_BYTES)
    for directory, inside in ((fits, True), (too_long, False)):
        monkeypatch.setattr(tempfile, "tempdir", os.fspath(directory))
        with StreamerClient.embedded("32MiB") as client:
            assert client.load_state_dict(checkpoint).keys() == TENSORS.keys()
            assert (client.socket_dir.parent == directory) is inside
            assert client.socket_dir.stat().st_mode & 0o777 == 0o700
            assert client.socket_dir.stat().st_uid == os.geteuid()
        assert not client.socket_dir.exists()


def test_a_long_tmpdir_does_not_trouble_the_drop_in(checkpoint: Path, tempdir: Path) -> None:
    script = f"""
import penstock.client.adopt.ambient
penstock.client.adopt.ambient.DEFAULT_SOCKET_DIR = {os.fspath(tempdir)!r}
from penstock.client import SafetensorsStreamer
with SafetensorsStreamer() as streamer:
    streamer.stream_file({os.fspath(checkpoint)!r})
    print(len(list(streamer.get_tensors())))
"""
    result = run_python("-c", script, environment={"TMPDIR": os.fspath(deep(tempdir, 150))})
    assert result.stdout == f"{len(TENSORS)}\n", result.stderr


def test_where_no_directory_is_short_enough_the_error_names_tmpdir(
    tempdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = deep(tempdir, 150)
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(long))
    monkeypatch.setattr("penstock.client.embedded._SHORT_DIRECTORIES", (os.fspath(long), "/nowhere"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with pytest.raises(OSError, match=r"no directory for the sockets.*set TMPDIR to a short path"):
        StreamerClient.embedded("32MiB")


def test_a_daemon_that_dies_under_a_load_is_not_waited_for(checkpoint: Path) -> None:
    with StreamerClient.embedded() as client:
        pid = client.status()["pid"]
        state = client.load_state_dict(checkpoint)
        os.kill(pid, 9)
        with pytest.raises(DaemonUnavailableError):
            client.load_state_dict(checkpoint)
    for name, tensor in TENSORS.items():
        assert torch.equal(state[name], tensor)
