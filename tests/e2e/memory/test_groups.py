"""Groups: loads that share one pass over a checkpoint far larger than the memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.client.cli.status_text import show

from ..conftest import StartDaemon
from ..support import (
    MIB,
    Checkpoint,
    ClientProcess,
    DaemonProcess,
    Nursery,
    RawLoad,
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
    """The time begins when the group has its memory. Another load has it until two members are there."""
    daemon = start_daemon("--memory-limit", str(LIMIT), "--group-timeout", "0.1")
    with RawLoad(daemon, large[0]) as other:
        other.next("manifest")
        keeps = ["its client to release what it has"]
        wait_until(lambda: [load["waits_for"] for load in daemon.status()["loads"]] == keeps, "a full window")
        before = daemon.read_bytes()
        members = [member(daemon, 3) for _ in range(2)]
        states = ["streaming", "waiting", "waiting"]
        wait_until(lambda: [load["state"] for load in daemon.status()["loads"]] == states, "both to wait")
    for one in members:
        assert one.hear("loaded")["found"] == expected(large[1])
    assert daemon.read_bytes() - before == 8 * LIMIT


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


def test_status_log_and_metrics_tell_of_a_group_and_its_members(
    start_daemon: StartDaemon, nursery: Nursery, member: Member, large: Checkpoint
) -> None:
    daemon = start_daemon("--memory-limit", str(LIMIT))
    first = member(daemon, 2)

    def kept_waiting() -> dict[str, Any] | None:
        (load,) = daemon.status()["loads"] or [None]
        return load if load is not None and load["group_waited_seconds"] > 0 else None

    load = wait_until(kept_waiting, "the first member to wait for the other")
    assert load["group"] == {"name": "job", "size": 2, "joined": 1}
    assert load["waits_for"].startswith("others of its window")
    (stage,) = daemon.http_status()["stages"]
    assert stage["group"] == {"name": "job", "size": 2, "joined": 1}
    assert [(holder["pid"], holder["group"]) for holder in stage["holders"]] == [(first.pid, "job")]
    shown = show(daemon.status())
    assert "job 1/2" in shown
    second = member(daemon, 2)
    for one in (first, second):
        one.hear("loaded")
    alone = nursery.start("load", socket_dir=daemon.socket_dir, source=large[0])
    alone.hear("loaded")
    daemon.wait_idle()
    opened = {line["pid"]: line for line in logged(daemon, "opened")}
    ended = {line["pid"]: line for line in logged(daemon, "load")}
    for one in (first, second):
        begin, end = opened[str(one.pid)], ended[str(one.pid)]
        assert (begin["group"], begin["group_size"]) == ("job", "2")
        assert (end["group"], end["group_size"], end["group_joined"]) == ("job", "2", "2")
    assert float(ended[str(first.pid)]["group_waited_seconds"]) >= load["group_waited_seconds"]
    plain = {**opened[str(alone.pid)], **ended[str(alone.pid)]}
    assert not [key for key in plain if key.startswith("group")]
    counted = metrics(daemon)
    waited = counted['penstock_group_loads_total{waited="yes"}']
    assert waited >= 1
    assert waited + counted['penstock_group_loads_total{waited="no"}'] == 2
    assert counted["penstock_group_wait_seconds_count"] == 2
    assert counted["penstock_group_wait_seconds_sum"] >= load["group_waited_seconds"]
    assert counted["penstock_group_timeouts_total"] == 0


def test_a_group_that_stays_incomplete_is_logged_and_counted(
    start_daemon: StartDaemon, member: Member, large: Checkpoint
) -> None:
    daemon = start_daemon("--memory-limit", str(LIMIT), "--group-timeout", "0.1")
    assert member(daemon, 3).hear("loaded")["found"] == expected(large[1])
    (incomplete,) = logged(daemon, "group not complete")
    told = {key: value for key, value in incomplete.items() if key.startswith("group")}
    assert told == {"group": "job", "group_size": "3", "group_joined": "1"}
    assert metrics(daemon)["penstock_group_timeouts_total"] == 1


def logged(daemon: DaemonProcess, event: str) -> list[dict[str, str]]:
    """The fields of each line of such an event."""
    lines = [line.split(" ", 2)[2] for line in daemon.log().splitlines()]
    return [
        dict(field.split("=", 1) for field in line.removeprefix(f"{event} ").split() if "=" in field)
        for line in lines
        if line.startswith(f"{event} ")
    ]


def metrics(daemon: DaemonProcess) -> dict[str, float]:
    """By name and labels, as in the text."""
    _, body = daemon.http("/metrics")
    lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
