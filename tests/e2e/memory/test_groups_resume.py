"""A group whose daemon is killed: its members find each other at the next one, wherever each of them was.

`--group-timeout` is far longer than a test may take: who waits for it fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ..conftest import StartDaemon
from ..support import (
    MIB,
    Checkpoint,
    ClientProcess,
    DaemonProcess,
    Nursery,
    expected,
    random_tensors,
    wait_until,
    write_checkpoint,
)

LIMIT = 4 * MIB
TENSOR = MIB // 2
FLAGS = ("--memory-limit", str(LIMIT), "--group-timeout", "3600")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Eight times the limit, in 64 tensors."""
    tensors = random_tensors(64, TENSOR // 4, seed=4)
    return write_checkpoint(tmp_path_factory.mktemp("groups") / "m.safetensors", tensors), tensors


def members_at(
    nursery: Nursery, daemon: DaemonProcess, path: Path, *positions: int | list[int]
) -> list[ClientProcess]:
    """Members of a group that stand still once they have got so many tensors; of several, at each in turn."""
    members = [
        nursery.start(
            "load",
            socket_dir=daemon.socket_dir,
            source=path,
            group=("job", len(positions)),
            pause_after=position,
        )
        for position in positions
    ]
    for member in members:
        member.hear("paused")
    return members


def shared_pass(daemon: DaemonProcess) -> int:
    """Bytes that it has read, once nobody loads."""
    daemon.wait_idle()
    return daemon.read_bytes()


@pytest.mark.parametrize("positions", [[6, 9], [9, 6], [5, 5, 8]])
def test_members_at_different_tensors_go_on_through_one_window(
    start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint, positions: list[int]
) -> None:
    daemon = start_daemon(*FLAGS)
    members = members_at(nursery, daemon, large[0], *positions)
    daemon.kill()
    daemon = start_daemon(*FLAGS)
    for member in members:
        member.go()
    for member in members:
        assert member.hear("loaded")["found"] == expected(large[1])
    assert shared_pass(daemon) <= 8 * LIMIT  # once, and not again for each of them


def test_one_that_notices_long_after_the_others_is_waited_for(
    start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    """It still had tensors to go through. Until it comes the first gets what fits the window and no more."""
    daemon = start_daemon(*FLAGS)
    first, late = members_at(nursery, daemon, large[0], 8, 6)
    daemon.kill()
    daemon = start_daemon(*FLAGS)
    first.go()

    def window_is_full() -> bool:
        (load,) = daemon.status()["loads"] or [None]
        return load is not None and load["waits_for"].startswith("others of its window")

    wait_until(window_is_full, "the first to have all that the window holds")
    late.go()
    for member in (first, late):
        assert member.hear("loaded")["found"] == expected(large[1])
    assert shared_pass(daemon) <= 8 * LIMIT


def test_a_member_that_was_killed_before_is_not_waited_for(
    start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    daemon = start_daemon(*FLAGS)
    victim, one, other = members_at(nursery, daemon, large[0], 2, [4, 20], [5, 22])
    victim.kill()
    for member in (one, other):
        member.go()
    for member in (one, other):
        member.hear("paused")
    daemon.kill()
    daemon = start_daemon(*FLAGS)
    for member in (one, other):
        member.go()
    for member in (one, other):
        assert member.hear("loaded")["found"] == expected(large[1])
    assert shared_pass(daemon) <= 8 * LIMIT


def test_the_last_member_goes_on_when_the_others_have_ended(
    start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    daemon = start_daemon(*FLAGS)
    last, ended = members_at(nursery, daemon, large[0], [1, 58], 1)
    for member in (last, ended):
        member.go()
    last.hear("paused")
    assert ended.hear("loaded")["found"] == expected(large[1])
    daemon.kill()
    start_daemon(*FLAGS)
    last.go()
    assert last.hear("loaded")["found"] == expected(large[1])


def test_a_checkpoint_that_fits_is_read_once_for_all_members_that_go_on(
    start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    flags = ("--memory-limit", str(16 * LIMIT), "--group-timeout", "3600")
    daemon = start_daemon(*flags)
    members = members_at(nursery, daemon, large[0], 0, 30, 50)
    daemon.kill()
    daemon = start_daemon(*flags)
    for member in members:
        member.go()
    for member in members:
        assert member.hear("loaded")["found"] == expected(large[1])
    assert shared_pass(daemon) <= 8 * LIMIT


def test_a_group_goes_on_after_every_daemon_that_is_killed(
    start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    daemon = start_daemon(*FLAGS)
    members = members_at(nursery, daemon, large[0], [5, 20, 40], [8, 22, 38])
    for _ in range(2):
        daemon.kill()
        daemon = start_daemon(*FLAGS)
        for member in members:
            member.go()
        for member in members:
            member.hear("paused")
    daemon.kill()
    daemon = start_daemon(*FLAGS)
    for member in members:
        member.go()
    for member in members:
        assert member.hear("loaded")["found"] == expected(large[1])
