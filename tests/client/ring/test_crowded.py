"""A daemon that runs, and before whose gRPC socket more connections wait than the kernel keeps."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.client import DaemonUnavailableError, StreamerClient
from penstock.client.cli import health

from ..conftest import StartDaemon
from ..fake_daemon import FakeDaemon, acting_after
from ..samples import TENSORS, assert_equal


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> FakeDaemon:
    return start_daemon(TENSORS)


class Crowd:
    """Has the place of the daemon's socket, and accepts no connection. One fills its queue."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self._path = path
        self._aside = path.with_name("aside.sock")
        path.rename(self._aside)
        self._listener, waits = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        self._listener.bind(os.fspath(path))
        self._listener.listen(0)
        waits.connect(os.fspath(path))

    def accept(self) -> None:
        """Makes room for one that waits."""
        self._listener.accept()[0].close()

    def leave(self) -> None:
        """From now on the daemon is there."""
        self._aside.replace(self._path)


@pytest.fixture
def crowd(daemon: FakeDaemon) -> Iterator[Crowd]:
    with contextlib.ExitStack() as stack:
        yield Crowd(daemon.socket_dir / "penstock.sock", stack)


class Told(logging.Handler):
    """Waits for a warning of the client."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self.arrived = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self.arrived.set()


@pytest.fixture
def told() -> Iterator[Told]:
    handler, logger = Told(), logging.getLogger("penstock.client")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.mark.parametrize("call", ["load", "prefetch", "evict", "status"])
def test_a_call_is_repeated_until_the_daemon_takes_its_connection(
    call: str, daemon: FakeDaemon, crowd: Crowd, told: Told
) -> None:
    with acting_after(told.arrived, crowd.leave), StreamerClient(daemon.socket_dir) as client:
        if call == "load":
            assert_equal(client.load_state_dict("/x"))
        elif call == "prefetch":
            assert client.prefetch("/x").total_bytes == 2
        elif call == "evict":
            assert client.evict().leased_bytes == 5
        else:
            assert client.status()["version"] == "fake"
    message = told.messages[0]
    assert "runs, but does not take this connection" in message
    assert message.endswith("trying for up to 60 s")


@pytest.mark.usefixtures("crowd")
def test_a_call_that_may_not_be_repeated_says_that_the_daemon_runs(daemon: FakeDaemon, told: Told) -> None:
    with (
        StreamerClient(daemon.socket_dir, reconnect_timeout=0) as client,
        pytest.raises(DaemonUnavailableError, match="runs, but does not take this connection") as caught,
    ):
        client.load_state_dict("/x")
    assert caught.value.crowded
    assert not told.messages
    daemon.await_leases_closed()


def test_a_daemon_that_goes_away_meanwhile_is_not_waited_for_longer(
    socket_dir: Path, daemon: FakeDaemon, crowd: Crowd, told: Told
) -> None:
    def leave() -> None:
        crowd.leave()
        daemon.stop()

    with (
        acting_after(told.arrived, leave),
        StreamerClient(socket_dir, reconnect_timeout=2) as client,
        pytest.raises(DaemonUnavailableError, match="does not take this connection"),
    ):
        client.status()


def test_a_health_probe_waits_as_long_as_it_may(
    daemon: FakeDaemon, crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon here has no health service, and says so."""
    paused = threading.Event()

    def pause(seconds: float) -> None:
        paused.set()
        crowd.leave()

    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pause))
    crowd.accept()  # the probe's first connection takes the place
    with pytest.raises(DaemonUnavailableError, match="Method not found"):
        health.check(daemon.socket_dir, live=True, timeout_seconds=60)
    assert paused.is_set()


@pytest.mark.usefixtures("crowd")
def test_a_health_probe_does_not_wait_longer(daemon: FakeDaemon) -> None:
    with pytest.raises(DaemonUnavailableError):
        health.check(daemon.socket_dir, live=True, timeout_seconds=0.2)
