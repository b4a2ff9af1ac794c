"""The harness itself: it tells what is left, and speaks HTTP/2 that a real server understands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.v1 import streamer_pb2 as pb

from ..e2e.programs import await_go, say
from ..e2e.support import Checkpoints, Nursery, wait_until
from .conftest import StartTarget
from .http2 import Closed, Kind, ping
from .support import LAUNCH, MEMORY_BOUND_BYTES, RawHandoff, Usage

STRANGER = 1201


def hold_session(socket_dir: str) -> None:
    """Holds a handoff connection and says who it is."""
    with RawHandoff(socket_dir) as handoff:
        say("holds", token=handoff.token(), uid=os.getuid())
        await_go()


@pytest.mark.parametrize("contained", [False, True], ids=["forked", "executed"])
def test_a_daemon_starts_in_a_known_state_whatever_the_shell_ignores(
    contained: bool, root: None, start_target: StartTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_MAX_LOADS", "7")
    daemon = start_target(contained=contained, environment={"PENSTOCK_QUEUE_TIMEOUT": "8"})
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    assert re.search(r"^Umask:\s*0022$", status, re.M)
    assert re.search(r"^SigBlk:\s*0+$", status, re.M)
    ignored = int(re.search(r"^SigIgn:\s*(\w+)$", status, re.M)[1], 16)  # type: ignore[index]
    ignored &= (1 << 31) - 1  # those from 32 on are the C library's, which no program can set
    assert ignored == 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1  # as of every interpreter
    told = daemon.http_status()["configuration"]
    assert (told["max_loads"], told["queue_timeout_seconds"]) == ("256", "8")
    if contained:
        environment = Path(f"/proc/{daemon.process.pid}/environ").read_bytes().split(b"\0")
        assert b"LC_ALL=C.UTF-8" in environment
        assert not any(entry.startswith(b"PYTEST_") for entry in environment)


def test_launching_resets_ignored_signals_and_closes_descriptors(tmp_path: Path) -> None:
    """Through a shell that ignores SIGTERM and SIGINT, as `nohup` does, and leaves a descriptor open."""
    show = "import os; print(open('/proc/self/status').read(), os.listdir('/proc/self/fd'))"
    state = '{"environment": {}, "umask": 63, "open_files": 64, "uid": null, "cgroup": null}'
    command = 'trap "" TERM INT; exec 9</dev/null; exec "$@"'
    arguments = [sys.executable, "-I", "-S", str(LAUNCH), state, sys.executable, "-I", "-S", "-c", show]
    shown = subprocess.run(
        ["sh", "-c", command, "sh", *arguments], capture_output=True, text=True, check=True
    )
    ignored = int(re.search(r"^SigIgn:\s*(\w+)$", shown.stdout, re.M)[1], 16)  # type: ignore[index]
    assert not ignored & (1 << 14 | 1 << 1)
    assert "'9'" not in shown.stdout
    assert re.search(r"^Umask:\s*0077$", shown.stdout, re.M)


def test_calls_by_hand_are_answered(start_target: StartTarget) -> None:
    daemon = start_target()
    with daemon.handoff() as handoff, daemon.connect() as connection:
        stream = connection.open_stream("GetStatus", [("penstock-session", handoff.token())])
        connection.send_message(stream, b"", end=True)
        assert connection.finish(stream) == (0, "")
        (answer,) = connection.messages(stream)
        assert pb.GetStatusResponse.FromString(answer).pid == daemon.process.pid
        refused = connection.open_stream("GetStatus")
        connection.send_message(refused, b"", end=True)
        code, message = connection.finish(refused)
        assert code == 16, message
        before = len(connection.frames)
        connection.send(ping(b"12345678"))
        connection.wait(lambda: any(came.kind == Kind.PING for came in connection.frames[before:]), "a PING")


def test_a_breach_of_the_protocol_is_reported(start_target: StartTarget) -> None:
    daemon = start_target()
    with daemon.connect() as connection:
        connection.send(ping(b"too short a PING"[:7]))
        connection.wait_closed()
        assert connection.closed
        with pytest.raises(Closed):
            connection.wait(lambda: False, "what never comes")


def test_what_is_left_is_told_and_what_came_back_is_not(
    root: None, start_target: StartTarget, attackers: Nursery, checkpoints: Checkpoints
) -> None:
    checkpoint = checkpoints("a")
    daemon = start_target("--allow", str(checkpoint[0].parent))
    daemon.assert_serves(checkpoint)
    wait_until(lambda: not daemon.usage().sessions + daemon.usage().connections, "the honest client to go")
    before = daemon.usage()
    holder = attackers.start(hold_session, uid=STRANGER, socket_dir=daemon.socket_dir)
    assert holder.hear("holds")["uid"] == STRANGER
    assert daemon.usage().sessions == 1
    assert daemon.usage().descriptors > before.descriptors
    holder.kill()
    daemon.assert_comes_back(before)
    daemon.assert_serves(checkpoint)


def test_the_highest_memory_is_seen(start_target: StartTarget) -> None:
    daemon = start_target()
    with daemon.watched() as watch:
        assert 0 < wait_until(lambda: watch.peak.anonymous_bytes, "a figure") < MEMORY_BOUND_BYTES
    watch.assert_bounded()
    with pytest.raises(AssertionError, match="besides slabs"):
        watch.assert_bounded(1)
    assert isinstance(watch.peak, Usage)


def test_a_container_has_the_documented_size(root: None, start_target: StartTarget) -> None:
    daemon = start_target(contained=True)
    assert (
        daemon.memory_limit_bytes < daemon.contained_bytes() < daemon.memory_limit_bytes + MEMORY_BOUND_BYTES
    )
