"""Groups: loads that share one pass over a checkpoint far larger than the memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import StartDaemon
from .support import (
    MIB,
    Checkpoint,
    ClientProcess,
    DaemonProcess,
    Nursery,
    expected,
    random_tensors,
    running_daemon,
    wait_until,
    write_checkpoint,
)

LIMIT = 4 * MIB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Eight times the limit, in 64 tensors."""
    tensors = random_tensors(64, MIB // 8, seed=4)
    return write_checkpoint(tmp_path_factory.mktemp("groups") / "m.safetensors", tensors), tensors


@pytest.fixture(scope="module")
def module_daemon() -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", str(LIMIT)) as daemon:
        yield daemon


@pytest.fixture
def daemon(module_daemon: DaemonProcess) -> Iterator[DaemonProcess]:
    """4 MiB of memory; groups wait for a minute. Idle after every test."""
    yield module_daemon
    module_daemon.wait_idle()


@pytest.fixture
def member(nursery: Nursery, large: Checkpoint) -> Member:
    return Member(nursery, large[0])


class Member:
    """Starts members of the group "job"."""

    def __init__(self, nursery: Nursery, path: Path) -> None:
        self._nursery = nursery
        self._path = path

    def __call__(
        self, daemon: DaemonProcess, size: int, pause_after: int | None = None, name: str = "job"
    ) -> ClientProcess:
        return self._nursery.start(
            "load",
            socket_dir=daemon.socket_dir,
            source=self._path,
            group=(name, size),
            pause_after=pause_after,
        )


def test_a_group_that_starts_at_once_reads_once(
    daemon: DaemonProcess, member: Member, large: Checkpoint
) -> None:
    before = daemon.read_bytes()
    members = [member(daemon, 8) for _ in range(8)]
    for one in members:
        assert one.hear("loaded")["found"] == expected(large[1])
    assert daemon.read_bytes() - before == 8 * LIMIT
    assert daemon.status()["staging"]["peak_bytes"] <= LIMIT


def test_members_that_start_one_after_another_read_once(
    daemon: DaemonProcess, member: Member, large: Checkpoint
) -> None:
    """Those that came have consumed all that the window holds before the next one starts."""
    before = daemon.read_bytes()
    members = []
    for number in range(1, 5):
        members.append(member(daemon, 4))
        if number < 4:
            wait_until(lambda: starved(daemon, len(members)), "the members to have all that there is")
            (stage,) = daemon.status()["stages"]
            assert stage["ready_bytes"] <= LIMIT
    for one in members:
        assert one.hear("loaded")["found"] == expected(large[1])
    assert daemon.read_bytes() - before == 8 * LIMIT


def starved(daemon: DaemonProcess, members: int) -> bool:
    """Every one of so many members has been told of all that is in the window."""
    status = daemon.status()
    return (
        len(status["loads"]) == members
        and len(status["stages"]) == 1
        and status["stages"][0]["ready_bytes"] >= LIMIT // 2
        and all(load["delivered_bytes"] == status["stages"][0]["ready_bytes"] for load in status["loads"])
    )


def test_a_member_killed_in_mid_load_is_counted_out(
    daemon: DaemonProcess, member: Member, large: Checkpoint
) -> None:
    before = daemon.read_bytes()
    members = [member(daemon, 3, pause_after=0) for _ in range(2)]
    victim = member(daemon, 3, pause_after=1)
    for one in (*members, victim):
        one.hear("paused")
    for one in members:
        one.go()
    wait_until(lambda: daemon.read_bytes() - before >= LIMIT // 2, "the window to be full")
    victim.kill()
    for one in members:
        assert one.hear("loaded")["found"] == expected(large[1])
    assert daemon.read_bytes() - before == 8 * LIMIT


def test_a_member_killed_before_the_others_came_is_counted_as_one_that_came(
    daemon: DaemonProcess, member: Member, large: Checkpoint
) -> None:
    before = daemon.read_bytes()
    first = member(daemon, 3)
    wait_until(lambda: starved(daemon, 1), "the first member to have all that there is")
    victim = member(daemon, 3, pause_after=1)
    victim.hear("paused")
    victim.kill()
    third = member(daemon, 3)
    for one in (first, third):
        assert one.hear("loaded")["found"] == expected(large[1])
    assert daemon.read_bytes() - before == 8 * LIMIT


def test_a_member_that_never_comes_is_given_up_after_the_timeout(
    start_daemon: StartDaemon, member: Member, large: Checkpoint
) -> None:
    daemon = start_daemon("--memory-limit", str(LIMIT), "--group-timeout", "2")
    members = [member(daemon, 3, pause_after=0) for _ in range(2)]
    for one in members:
        one.hear("paused")
        one.go()
    for one in members:
        assert one.hear("loaded")["found"] == expected(large[1])
    assert daemon.read_bytes() == 8 * LIMIT


def test_a_member_that_comes_after_the_timeout_is_served_by_itself(
    start_daemon: StartDaemon, nursery: Nursery, member: Member, large: Checkpoint
) -> None:
    daemon = start_daemon("--memory-limit", "8MiB", "--window-size", str(LIMIT), "--group-timeout", "0.1")
    first = member(daemon, 2, pause_after=20)
    first.hear("paused")  # 10 MiB: more than the window, so it was recycled
    late = member(daemon, 2)
    assert late.hear("loaded")["found"] == expected(large[1])
    first.go()
    assert first.hear("loaded")["found"] == expected(large[1])
    assert daemon.read_bytes() == 16 * LIMIT


def test_groups_of_different_names_do_not_wait_for_each_other(
    start_daemon: StartDaemon, member: Member, large: Checkpoint
) -> None:
    daemon = start_daemon("--memory-limit", "8MiB", "--window-size", str(LIMIT))
    held_back = member(daemon, 2, name="one")
    wait_until(lambda: starved(daemon, 1), "the first group's member to have all that there is")
    others = [member(daemon, 2, name="other") for _ in range(2)]
    for one in others:
        assert one.hear("loaded")["found"] == expected(large[1])
    assert held_back.exit_code() is None
    last = member(daemon, 2, name="one")
    for one in (held_back, last):
        assert one.hear("loaded")["found"] == expected(large[1])
    assert daemon.read_bytes() == 16 * LIMIT


def test_a_group_may_run_again_under_the_same_name(
    daemon: DaemonProcess, member: Member, large: Checkpoint
) -> None:
    for _ in range(2):
        before = daemon.read_bytes()
        members = [member(daemon, 2) for _ in range(2)]
        for one in members:
            assert one.hear("loaded")["found"] == expected(large[1])
        assert daemon.read_bytes() - before == 8 * LIMIT


def test_a_group_s_load_that_waits_for_no_one_is_a_plain_load(
    daemon: DaemonProcess, member: Member, large: Checkpoint
) -> None:
    assert member(daemon, 1).hear("loaded")["found"] == expected(large[1])
