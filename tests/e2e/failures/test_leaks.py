"""What a thousand loads leave behind: nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..conftest import StartDaemon
from ..support import (
    ClientProcess,
    DaemonProcess,
    Nursery,
    assert_no_shared_memory_but,
    open_fds,
    process_figure,
    random_tensors,
    shared_memory,
    wait_until,
    write_checkpoint,
)

MIB = 1 << 20
GROWTH_KIB = 6 * 1024
"""Allocators round up; a leak of 6 KiB a load would be more than this in a thousand."""
MORE_THREADS = 30
"""gRPC's pollers come and go, and a pool starts one more of its threads whenever those it has are all late. A
leak of one a load would be hundreds."""


class Figures:
    """What both processes have in use."""

    def __init__(self, daemon: DaemonProcess, client: ClientProcess) -> None:
        self.fds = len(daemon.fds())
        self.threads = process_figure(daemon.process.pid, "Threads")
        self.daemon_kib = daemon.memory_kib("RssAnon")
        self.client_threads = process_figure(client.pid, "Threads")
        self.client_kib = process_figure(client.pid, "RssAnon")
        self.shared_memory = shared_memory()


def assert_no_more_than(before: Figures, daemon: DaemonProcess, client: ClientProcess) -> None:
    """After a while: gRPC closes the last connections on threads of its own. What leaks stays."""
    daemon.wait_idle()
    allowed = {
        "fds": before.fds,
        "threads": before.threads + MORE_THREADS,
        "daemon_kib": before.daemon_kib + GROWTH_KIB,
        "client_threads": before.client_threads + 2,
        "client_kib": before.client_kib + GROWTH_KIB,
    }

    def left() -> dict[str, int]:
        now = Figures(daemon, client)
        return {name: getattr(now, name) for name, most in allowed.items() if getattr(now, name) > most}

    try:
        wait_until(lambda: not left(), "all to come back")
    except AssertionError as error:
        raise AssertionError(f"{error}; left: {left()}, allowed: {allowed}") from None
    assert_no_shared_memory_but(before.shared_memory)


def run(client: ClientProcess, rounds: int) -> tuple[int, int]:
    """Failures and descriptors of the client."""
    failures = 0
    for _ in range(rounds // 10):  # in parts, each of which is heard of in good time on a slow machine too
        client.go("10")
        said = client.hear("done")
        failures += said["failures"]
    return failures, said["fds"]


def hostile_files(directory: Path) -> list[str]:
    """A file that is missing, one that is no checkpoint, one that is mean, and a tensor that is too large."""
    invalid = directory / "invalid.safetensors"
    invalid.write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    mean = directory / "mean.safetensors"
    deep = b'{"a":' * 100_000
    mean.write_bytes(len(deep).to_bytes(8, "little") + deep)
    large = directory / "large.safetensors"
    header = json.dumps({"x": {"dtype": "U8", "shape": [99 * MIB], "data_offsets": [0, 99 * MIB]}}).encode()
    with large.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 99 * MIB)
    return [str(directory / "gone.safetensors"), str(invalid), str(mean), str(large)]


@pytest.mark.parametrize("kind", ["full", "window", "failing"])
def test_hundreds_of_loads_in_a_row_leave_nothing_behind(
    kind: str, start_daemon: StartDaemon, nursery: Nursery, tmp_path: Path
) -> None:
    daemon = start_daemon("--memory-limit", "16MiB")
    options: dict[str, Any] = {"owned": True}
    if kind == "failing":
        sources, warm_up, rounds = hostile_files(tmp_path), 20, 50
    else:
        size = 100 if kind == "full" else MIB // 4
        paths = [
            write_checkpoint(tmp_path / f"{n}.safetensors", random_tensors(3, size, seed=n)) for n in range(2)
        ]
        sources, warm_up, rounds = [str(path) for path in paths], 150, 500
        if kind == "window":
            options = {"owned": False, "memory_limit": 0}
            warm_up, rounds = 60, 150
    client = nursery.start("many_loads", socket_dir=daemon.socket_dir, sources=sources, **options)
    mine = run(client, warm_up)
    daemon.wait_idle()
    before = Figures(daemon, client)
    after_mine = run(client, rounds)
    expected_failures = len(sources) if kind == "failing" else 0
    assert (mine[0], after_mine[0]) == (expected_failures * warm_up, expected_failures * rounds)
    # gRPC closes the last channels on threads of its own.
    wait_until(lambda: len(open_fds(client.pid)) <= mine[1] + 1, "the client's descriptors to be closed")
    assert_no_more_than(before, daemon, client)
    totals = daemon.status()["totals"]
    total = len(sources) * (warm_up + rounds)
    assert (totals["loads_ok"], totals["loads_failed"]) == ((0, total) if kind == "failing" else (total, 0))


def test_calls_with_wrong_tokens_leave_nothing_behind(
    start_daemon: StartDaemon, nursery: Nursery, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "m.safetensors", random_tensors(1, 10))
    daemon = start_daemon("--memory-limit", "16MiB")
    client = nursery.start("wrong_tokens", socket_dir=daemon.socket_dir, source=path)
    run(client, 100)
    daemon.wait_idle()
    before = Figures(daemon, client)
    assert run(client, 300)[0] == 300
    assert_no_more_than(before, daemon, client)
