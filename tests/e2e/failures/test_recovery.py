"""The daemon dies, stops, restarts: what loads, groups and the next daemon make of it.

`test_deaths.py` kills it once under a plain load; here it goes again and again, and under more than that.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.client import errors

from ..conftest import StartDaemon
from ..support import (
    MIB,
    Checkpoint,
    DaemonProcess,
    Nursery,
    RawLoad,
    assert_no_shared_memory_but,
    expected,
    random_tensors,
    same,
    shared_memory,
    wait_until,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """20 MiB in 40 tensors, in two files."""
    top = tmp_path_factory.mktemp("recovery")
    everything = {}
    for number in range(2):
        tensors = random_tensors(20, MIB // 8, seed=number)
        tensors = {f"{number}.{name}": tensor for name, tensor in tensors.items()}
        write_checkpoint(top / f"{number}.safetensors", tensors)
        everything.update(tensors)
    return top, everything


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("limit", ["4MiB", "64MiB"])
def test_a_load_survives_one_daemon_after_another(
    owned: bool, limit: str, start_daemon: StartDaemon, large: Checkpoint
) -> None:
    """No tensor twice, none missing, each right when it is yielded."""
    path, tensors = large
    daemon = start_daemon("--memory-limit", limit)
    names = []
    with daemon.client().load(path, owned=owned) as load:
        for name, tensor in load:
            assert torch.equal(tensor, tensors[name])
            names.append(name)
            if len(names) in (1, 15, 27):
                daemon.kill()
                daemon = start_daemon("--memory-limit", limit)
        assert load.stats.tensors == 40
        assert load.stats.bytes == 20 * MIB
    del tensor
    assert sorted(names) == sorted(set(names)) == sorted(tensors)


@pytest.mark.parametrize("before", ["4MiB", "64MiB"])
def test_a_load_goes_on_with_a_daemon_of_another_limit(
    before: str, start_daemon: StartDaemon, large: Checkpoint
) -> None:
    """From a full stage into a window, or the other way round."""
    path, tensors = large
    daemon = start_daemon("--memory-limit", before)
    with daemon.client().load(path) as load:
        iterator = iter(load)
        found = [next(iterator) for _ in range(5)]
        daemon.kill()
        start_daemon("--memory-limit", "64MiB" if before == "4MiB" else "4MiB")
        found += iterator
    same(found, tensors)


def test_a_file_touched_while_the_daemon_was_away_ends_the_load(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    tensors = random_tensors(40, MIB // 8)
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    daemon = start_daemon("--memory-limit", "4MiB")
    with daemon.client().load(path) as load:
        iterator = iter(load)
        found = [next(iterator) for _ in range(3)]
        daemon.kill()
        os.utime(path)
        start_daemon("--memory-limit", "4MiB")
        with pytest.raises(errors.CheckpointChangedError, match=str(path)):
            found += iterator
    same(found, {name: tensors[name] for name, _ in found})


def test_the_members_of_a_group_all_go_on(
    start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    """They resume at different tensors, so the next daemon need not find them at one place."""
    flags = ("--memory-limit", "8MiB", "--window-size", "2MiB", "--group-timeout", "1")
    daemon = start_daemon(*flags)
    members = [
        nursery.start(
            "load", socket_dir=daemon.socket_dir, source=large[0], group=("job", 3), pause_after=pause
        )
        for pause in (0, 1, 2)
    ]
    for member in members:
        member.hear("paused")
    daemon.kill()
    for member in members:
        member.go()
    start_daemon(*flags)
    for member in members:
        assert member.hear("loaded")["found"] == expected(large[1])


def test_a_restarted_daemon_starts_empty_and_nothing_is_left_of_the_one_before(
    start_daemon: StartDaemon, large: Checkpoint
) -> None:
    before = shared_memory()
    first = start_daemon("--memory-limit", "64MiB")
    same(first.client().load_state_dict(large[0]).items(), large[1])
    first.client().prefetch(large[0], pin=True)
    slabs = memfds(first.process.pid)
    assert slabs
    first.kill()
    second = start_daemon("--memory-limit", "64MiB", "--no-populate")
    status = second.status()
    assert status["stages"] == status["loads"] == []
    assert status["staging"]["peak_bytes"] == 0
    assert set(status["totals"].values()) == {0}
    left = {inode for pid in processes() for inode in memfds(pid)}
    assert not left & slabs
    assert_no_shared_memory_but(before)


def one_waits(daemon: DaemonProcess) -> None:
    wait_until(lambda: daemon.status()["staging"]["waiting"] == 1, "one to wait for memory")


def processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def memfds(pid: int) -> set[str]:
    """Inodes of the slabs that a process has open or mapped."""
    found = set()
    try:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "memfd:penstock" in line:
                found.add(line.split()[4])
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if "memfd:penstock" in str(entry.readlink()):
                found.add(str(entry.stat().st_ino))
    except (OSError, ProcessLookupError):  # gone, or not ours to see
        pass
    return found


# ---- stopping ------------------------------------------------------------------------------------


def test_an_upgrade_in_the_grace_period_loses_no_load(
    start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    """One that streams and one that waits for memory end with the old daemon; one that comes meanwhile is
    told to come again."""
    path, tensors = large
    first = start_daemon("--memory-limit", "4MiB", "--grace", "60")
    streaming = nursery.pause(first, path, after=3)
    queued = nursery.start("load", socket_dir=first.socket_dir, source=path / "0.safetensors")
    one_waits(first)
    first.process.send_signal(signal.SIGTERM)
    wait_until(lambda: " draining " in first.log(), "the daemon to drain")
    with pytest.raises(errors.ShuttingDownError):
        first.client().load(path)
    with pytest.raises(errors.ShuttingDownError):
        first.client().prefetch(path)
    streaming.go()
    assert streaming.hear("loaded")["found"] == expected(tensors)
    part = {name: tensor for name, tensor in tensors.items() if name.startswith("0.")}
    assert queued.hear("loaded")["found"] == expected(part)
    assert first.process.wait(60) == 0
    assert "loads cut off" not in first.log()
    second = start_daemon("--memory-limit", "64MiB")
    same(second.client().load_state_dict(path).items(), tensors)


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("limit", ["4MiB", "64MiB"])
def test_a_grace_too_short_costs_a_load_nothing_but_time(
    owned: bool, limit: str, start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    path, tensors = large
    first = start_daemon("--memory-limit", limit, "--grace", "0.1")
    client = nursery.pause(first, path, after=7, owned=owned)
    assert first.terminate() == 0
    start_daemon("--memory-limit", limit)
    client.go()
    assert client.hear("loaded")["found"] == expected(tensors)


@pytest.mark.parametrize("what", ["load", "prefetch"])
@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_what_waits_for_memory_when_its_daemon_goes_away_waits_at_the_next(
    what: str, end: str, start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    """One after another, and as long as the patience for each of them lasts."""
    path, tensors = large
    part = {name: tensor for name, tensor in tensors.items() if name.startswith("0.")}
    flags = ("--memory-limit", "16MiB", "--grace", "0.1")
    daemon = start_daemon(*flags)
    program: dict[str, Any] = {"program": "load"}
    if what == "prefetch":
        program = {"program": "call", "method": "prefetch"}
    with RawLoad(daemon, path) as running:
        running.next("manifest")
        queued = nursery.start(**program, socket_dir=daemon.socket_dir, source=path / "0.safetensors")
        one_waits(daemon)
        queued.signal(signal.SIGSTOP)  # not to come before what keeps it waiting
        getattr(daemon, end)()
    daemon = start_daemon(*flags)
    with RawLoad(daemon, path) as running:
        running.next("manifest")
        queued.signal(signal.SIGCONT)
        one_waits(daemon)
        getattr(daemon, end)()
    start_daemon(*flags)
    if what == "load":
        assert queued.hear("loaded")["found"] == expected(part)
    else:
        assert queued.hear("returned")["result"] == {"total_bytes": 10 * MIB, "warm_bytes": 0}


def test_a_load_without_patience_that_waits_when_the_grace_ends_is_told_so(
    start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    path, _ = large
    daemon = start_daemon("--memory-limit", "4MiB", "--grace", "0.1")
    with RawLoad(daemon, path) as running:
        running.next("manifest")
        queued = nursery.start(
            "load", socket_dir=daemon.socket_dir, source=path / "0.safetensors", reconnect_timeout=0
        )
        one_waits(daemon)
        assert daemon.terminate() == 0
        assert queued.hear("failed")["error"] in ("ShuttingDownError", "DaemonUnavailableError")
