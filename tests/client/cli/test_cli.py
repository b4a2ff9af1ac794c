from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.client import DaemonUnavailableError, StreamerClient
from penstock.client.cli import commands as cli
from penstock.client.cli import demo

from ..conftest import StartDaemon
from ..fake_daemon import random_tensors

TENSORS = random_tensors(6, 400)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["load"],
        ["load", "x", "--memory-limit", "lots"],
        ["load", "x", "--memory-limit=-2"],
        ["prefetch"],
        ["status", "extra"],
        ["status", "--color"],
        ["demo", "--limit", "3"],
    ],
    ids=str,
)
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: penstock" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["load", "status", "prefetch", "evict", "demo"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert command in capsys.readouterr().out


@pytest.mark.parametrize("command", [["load", "x"], ["status"], ["prefetch", "x"], ["evict"]], ids=str)
def test_no_daemon_is_1_and_one_line(
    command: list[str], socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--socket-dir", str(socket_dir)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("penstock: no penstock daemon answers")
    assert str(socket_dir) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", [["load", "x"], ["status"], ["health"]], ids=str)
def test_an_empty_socket_directory_is_1_and_one_line(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--socket-dir", ""]) == 1
    error = capsys.readouterr().err
    assert error.startswith("penstock: socket_dir (--socket-dir) is empty: ")
    assert error.count("\n") == 1


def test_load_tells_its_figures_and_its_daemon(
    start_daemon: StartDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = start_daemon(TENSORS)
    assert cli.main(["load", "/x", "--socket-dir", str(daemon.socket_dir), "--no-progress"]) == 0
    out, err = capsys.readouterr()
    figures = {line[:20].strip(): line[20:] for line in out.splitlines()}
    assert figures["tensors"] == "6"
    assert figures["bytes"].startswith(f"{sum(len(tensor.data) for tensor in TENSORS)} ")
    assert figures["staged already"] == "no"
    which, waiting = err.splitlines()
    assert f"in {daemon.socket_dir}" in which
    assert waiting == "penstock: load ?: waiting for staging memory, place 1: for the test"


def test_load_shows_a_bar_and_selects_by_globs(
    start_daemon: StartDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = start_daemon(TENSORS)
    arguments = [
        "load",
        "/x",
        "--socket-dir",
        str(daemon.socket_dir),
        "--tensors",
        "t[12]",
        "--tensors",
        "*5",
    ]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "tensors             3" in out
    assert "100%" in err


def test_load_without_a_daemon_uses_a_private_one_and_says_so(
    tmp_path: Path, socket_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("penstock.client.ring.socket_dir.DEFAULT_SOCKET_DIR", str(socket_dir))
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    assert cli.main(["load", str(path), "--memory-limit", "4MB", "--no-progress"]) == 0
    out, err = capsys.readouterr()
    assert "tensors             2" in out
    assert "private" in err


def test_a_directory_that_was_named_must_have_a_daemon(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(socket_dir))
    assert cli.main(["load", "/x", "--no-progress"]) == 1
    assert capsys.readouterr().err.startswith(f"penstock: no penstock daemon answers in {socket_dir}")


def test_no_private_daemon_is_started_beside_one_that_hangs(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("penstock.client.ring.socket_dir.DEFAULT_SOCKET_DIR", str(socket_dir))
    monkeypatch.setattr("penstock.client.ring.handoff.TIMEOUT_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as hanging:
        hanging.bind(str(socket_dir / "handoff.sock"))
        hanging.listen()
        assert cli.main(["load", "/x", "--no-progress"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"penstock: the daemon in {socket_dir} does not answer")
    assert "penstock health --live" in error
    assert error.count("\n") == 1


def test_globs_that_match_nothing_are_an_error(
    start_daemon: StartDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = start_daemon(TENSORS)
    arguments = ["load", "/x", "--no-progress", "--socket-dir", str(daemon.socket_dir), "--tensors", "no*"]
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "penstock: --tensors no*: the checkpoint has no tensor of such a name" in err


def test_a_missing_checkpoint_is_1_and_one_line(
    tmp_path: Path, socket_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("penstock.client.ring.socket_dir.DEFAULT_SOCKET_DIR", str(socket_dir))
    assert cli.main(["load", str(tmp_path / "nothing"), "--no-progress"]) == 1
    announcement, error = capsys.readouterr().err.splitlines()
    assert "private" in announcement
    assert error.startswith("penstock: ")
    assert "nothing" in error


def test_status_for_people_and_for_programs(
    start_daemon: StartDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = start_daemon(TENSORS)
    assert cli.main(["status", "--socket-dir", str(daemon.socket_dir)]) == 0
    out = capsys.readouterr().out
    assert f"penstockd fake  pid {os.getpid()}" in out
    assert "no limit" in out
    assert "\n7  " in out
    assert cli.main(["status", "--json", "--socket-dir", str(daemon.socket_dir)]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status == StreamerClient(daemon.socket_dir).status()


def test_prefetch_and_evict(start_daemon: StartDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    socket_dir = str(start_daemon(TENSORS).socket_dir)
    assert cli.main(["prefetch", "/x", "--pin", "--socket-dir", socket_dir]) == 0
    out, err = capsys.readouterr()
    assert out == "staged 2 B (1 B were there before), pinned\n"
    assert err == "penstock: load ?: waiting for staging memory, place 1: no reason given\n"
    assert cli.main(["evict", "/x", "--socket-dir", socket_dir]) == 0
    assert capsys.readouterr().out == "freed 1 B, in use 5 B\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_prefetch_shows_a_bar_on_a_terminal(quiet: bool, start_daemon: StartDaemon) -> None:
    socket_dir = str(start_daemon(TENSORS).socket_dir)
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    script = "import sys; from penstock.client.cli.commands import main; sys.exit(main())"
    command = ["prefetch", "/x", "--socket-dir", socket_dir, *(["--no-progress"] if quiet else [])]
    subprocess.run(
        [sys.executable, "-c", script, *command],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        check=True,
        timeout=60,
    )
    os.write(theirs, b"the end")
    shown = b""
    while not shown.endswith(b"the end"):
        shown += os.read(ours, 1 << 16)
    os.close(ours)
    os.close(theirs)
    assert (b"prefetch: 100%" in shown) is not quiet


def test_ctrl_c_is_130_and_silent(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, stall_before_segment=1)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from penstock.client.cli.commands import main; sys.exit(main())",
            *("load", "/x", "--no-progress", "--socket-dir", str(daemon.socket_dir)),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert daemon.stalled.wait(60)
    assert process.stderr is not None
    told = [process.stderr.readline() for _ in range(2)]  # or the signal may come before it said them
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    err = "".join(told) + rest
    assert err.count("\n") == 2  # which daemon, and the place in the queue
    daemon.await_leases_closed()


def test_status_watch_ends_with_ctrl_c(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from penstock.client.cli.commands import main; sys.exit(main())",
            *("status", "--watch", "--json", "--socket-dir", str(daemon.socket_dir)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["version"] == "fake"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


def test_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_model_package")
    with pytest.raises(FileNotFoundError, match="pip install"):
        demo.find_model()


def test_errors_are_errors(socket_dir: Path) -> None:
    with pytest.raises(DaemonUnavailableError):
        StreamerClient(socket_dir).status()
