"""Tensors as leases: who holds what, for how long, across threads, forks and spawned processes."""

from __future__ import annotations

import gc
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from penstock.client.cli import commands as cli

from ..conftest import StartDaemon
from ..support import (
    MIB,
    Checkpoint,
    Checkpoints,
    DaemonProcess,
    Nursery,
    expected,
    same,
    wait_until,
)


@pytest.fixture(scope="module")
def small(checkpoints: Checkpoints) -> Checkpoint:
    """5 MiB in 5 tensors."""
    return checkpoints("small", 5)


@pytest.fixture(scope="module")
def large(checkpoints: Checkpoints) -> Checkpoint:
    """24 MiB in 24 tensors."""
    return checkpoints("large", 24)


@pytest.fixture
def daemon(module_daemon: DaemonProcess) -> Iterator[DaemonProcess]:
    """16 MiB of memory; idle after every test."""
    yield module_daemon
    gc.collect()
    module_daemon.wait_idle()


def wait_for_the_end_of_the_lease(daemon: DaemonProcess) -> None:
    wait_until(lambda: daemon.leased_bytes() == 0, "the lease to end")


def in_slabs(tensor: torch.Tensor) -> bool:
    """Its memory is the daemon's: not a copy."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= tensor.data_ptr() < int(end, 16):
            return "memfd:penstock" in line
    return False


def test_tensors_are_the_staging_buffer_s_own_memory_as_long_as_any_view_lives(
    daemon: DaemonProcess, small: Checkpoint, large: Checkpoint
) -> None:
    path, tensors = small
    state = daemon.client().load_state_dict(path)
    assert all(in_slabs(tensor) for tensor in state.values())
    view = state["layer.3.weight"].view(512, 512)[7:9].T
    del state
    gc.collect()
    assert daemon.leased_bytes() == 6 * MIB
    same(daemon.client().load_state_dict(large[0]).items(), large[1])  # needs more than is left
    assert in_slabs(view)
    assert torch.equal(view, tensors["layer.3.weight"].view(512, 512)[7:9].T)
    del view
    gc.collect()
    wait_for_the_end_of_the_lease(daemon)
    assert daemon.status()["staging"]["warm_bytes"] == 6 * MIB or daemon.status()["stages"] == []


def test_tensors_outlive_client_load_and_the_thread_that_loaded_them(
    daemon: DaemonProcess, small: Checkpoint
) -> None:
    path, tensors = small
    found: dict[str, torch.Tensor] = {}

    def run() -> None:
        with daemon.client() as client, client.load(path) as load:
            found.update(load)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    gc.collect()
    same(found.items(), tensors)
    assert all(in_slabs(tensor) for tensor in found.values())
    dropping = threading.Thread(target=found.clear)
    dropping.start()
    dropping.join()
    gc.collect()
    wait_for_the_end_of_the_lease(daemon)


def test_every_holder_is_told_of_and_memory_is_idle_when_the_last_one_let_go(
    daemon: DaemonProcess, nursery: Nursery, small: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    holders = [nursery.hold(daemon, small) for _ in range(2)]
    (stage,) = [stage for stage in daemon.status()["stages"] if stage["holders"]]
    assert stage["state"] == "leased"
    assert stage["sources"] == [str(small[0])]
    assert sorted((one["uid"], one["pid"]) for one in stage["holders"]) == sorted(
        (os.getuid(), holder.pid) for holder in holders
    )
    assert all(0 < one["held_seconds"] < 60 for one in stage["holders"])
    assert daemon.leased_bytes() == 6 * MIB
    assert cli.main(["status", "--socket-dir", str(daemon.socket_dir)]) == 0
    shown = capsys.readouterr().out
    for holder in holders:
        assert f"uid {os.getuid()} pid {holder.pid}" in shown
    holders[0].kill()
    wait_until(
        lambda: sum(len(stage["holders"]) for stage in daemon.status()["stages"]) == 1, "one to be left"
    )
    assert daemon.leased_bytes() == 6 * MIB
    holders[1].kill()
    wait_for_the_end_of_the_lease(daemon)


def test_tensors_of_a_stopped_daemon_are_readable_beside_those_of_the_next(
    start_daemon: StartDaemon, small: Checkpoint, large: Checkpoint
) -> None:
    first = start_daemon("--memory-limit", "16MiB")
    held = first.client().load_state_dict(small[0])
    first.kill()
    second = start_daemon("--memory-limit", "16MiB")
    assert second.leased_bytes() == 0
    same(second.client().load_state_dict(large[0]).items(), large[1])
    same(held.items(), small[1])
    assert all(in_slabs(tensor) for tensor in held.values())
    del held
    gc.collect()
    wait_until(lambda: second.status()["stages"] == [], "the window to be given back")


# ---- child processes -----------------------------------------------------------------------------


def test_a_forked_child_has_the_tensors_and_the_lease_lasts_until_both_let_go(
    daemon: DaemonProcess, nursery: Nursery, small: Checkpoint, large: Checkpoint
) -> None:
    path, tensors = small
    parent = nursery.start("fork_with_tensors", socket_dir=daemon.socket_dir, source=path)
    assert parent.hear("child")["found"] == expected(tensors)
    parent.go()
    parent.hear("dropped")
    assert daemon.leased_bytes() == 6 * MIB
    same(daemon.client().load_state_dict(large[0]).items(), large[1])
    parent.go()
    assert parent.hear("child")["found"] == expected(tensors)
    assert daemon.leased_bytes() == 6 * MIB
    parent.go()
    assert parent.hear("joined")["code"] == 0
    wait_for_the_end_of_the_lease(daemon)


def test_a_forked_child_keeps_the_lease_of_a_parent_that_was_killed(
    daemon: DaemonProcess, nursery: Nursery, small: Checkpoint
) -> None:
    parent = nursery.start("fork_with_tensors", socket_dir=daemon.socket_dir, source=small[0])
    child = parent.hear("child")["pid"]
    try:
        parent.kill()
        assert daemon.leased_bytes() == 6 * MIB
    finally:
        os.kill(child, 9)
    wait_for_the_end_of_the_lease(daemon)


@pytest.mark.parametrize("how", ["ends", "closes"])
@pytest.mark.parametrize(("limit", "owned"), [(None, True), ("4MiB", True), ("4MiB", False)])
def test_a_child_forked_in_mid_load_disturbs_nothing_when_it_goes(
    how: str, limit: str | None, owned: bool, daemon: DaemonProcess, nursery: Nursery, small: Checkpoint
) -> None:
    path, tensors = small
    parent = nursery.start(
        "fork_in_mid_load",
        socket_dir=daemon.socket_dir,
        source=path,
        how=how,
        memory_limit=limit,
        owned=owned,
    )
    parent.hear("forked")
    assert parent.hear("loaded")["found"] == expected(tensors)
    assert parent.exit_code() is None
    daemon.wait_idle()


@pytest.mark.parametrize("limit", [None, "4MiB"], ids=["full", "window"])
@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("iterates", "this load"),
        ("iterates another", "this load"),
        ("streams", "this load"),
        ("streams more", "the connection to the daemon"),
        ("loads", "the connection to the daemon"),
        ("loads into a module", "the connection to the daemon"),
        ("prefetches", "the connection to the daemon"),
        ("asks by a client of its own", "the connection to the daemon"),
    ],
)
def test_a_forked_child_that_goes_on_with_what_its_parent_has_is_told_so_at_once(
    how: str, what: str, limit: str | None, daemon: DaemonProcess, nursery: Nursery, small: Checkpoint
) -> None:
    path, tensors = small
    parent = nursery.start(
        "go_on_in_a_fork", socket_dir=daemon.socket_dir, source=path, how=how, memory_limit=limit
    )
    raised = parent.hear("raised")
    assert raised["error"] == "ForkedProcessError"
    owner, child = raised["pids"]
    assert raised["message"].startswith(
        f"{what} belongs to process {owner}, and this process, {child}, is a fork of it"
    )
    assert parent.hear("ended")["code"] == 0
    assert parent.hear("loaded")["found"] == [expected(tensors)] * 3
    daemon.wait_idle()


def test_a_child_forked_in_mid_load_that_stays_holds_no_window(
    daemon: DaemonProcess, nursery: Nursery, large: Checkpoint
) -> None:
    path, tensors = large
    parent = nursery.start("fork_in_mid_load", socket_dir=daemon.socket_dir, source=path, how="stays")
    child = parent.hear("forked")["pid"]
    try:
        assert parent.hear("loaded")["found"] == expected(tensors)
        daemon.wait_idle()
    finally:
        os.kill(child, 9)


def test_a_spawned_child_gets_copies_that_need_no_lease(
    daemon: DaemonProcess, nursery: Nursery, small: Checkpoint
) -> None:
    """torch passes tensors to other processes in shared memory of its own."""
    path, tensors = small
    parent = nursery.start("spawn_with_tensors", socket_dir=daemon.socket_dir, source=path)
    assert parent.hear("child")["found"] == expected(tensors)
    wait_for_the_end_of_the_lease(daemon)
    daemon.client().evict()
    parent.go()
    assert parent.hear("child")["found"] == expected(tensors)
    assert parent.hear("joined")["code"] == 0


def test_a_program_that_is_started_inherits_no_lease(
    daemon: DaemonProcess, small: Checkpoint, tmp_path: Path
) -> None:
    state = daemon.client().load_state_dict(small[0])
    with subprocess.Popen(["sleep", "60"], close_fds=False) as program:
        try:
            state.clear()
            gc.collect()
            wait_for_the_end_of_the_lease(daemon)
        finally:
            program.kill()
