"""Arrangements of clients in which each waits for another: every load goes on, or fails and says why."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..e2e.support import DaemonProcess, wait_until
from . import checkpoints
from .fleet import Fleet, WorkerProcess

PATIENCE_SECONDS = 60.0
"""Far more than any of these needs."""
_OTHER_EXACT = (("2MiB", False), ("4MiB", True), ("4MiB", False))


class Scene:
    """One daemon, some files, some workers."""

    def __init__(self, fleet: Fleet, *flags: str) -> None:
        self.top = Path(tempfile.mkdtemp(prefix="pst-"))
        self.top.chmod(0o755)
        self._fleet = fleet
        self._workers: list[WorkerProcess] = []
        self.daemon = DaemonProcess(self.top / "s", *flags, f"--allow={self.top}")

    def file(self, name: str) -> str:
        path = self.top / f"{name}.safetensors"
        if not path.exists():
            checkpoints.replace(path, 1)
        return str(path)

    def worker(self, uid: int = 0) -> WorkerProcess:
        worker = self._fleet.start(self.top / "s", uid=uid, reconnect_timeout=5.0)
        self._workers.append(worker)
        return worker

    def wish(self, name: str, **wishes: Any) -> dict[str, Any]:
        """All of one file, from the first tensor to the last, unless wished otherwise."""
        plain = {
            "sources": [self.file(name)],
            "files": [name],
            "selection": None,
            "names": None,
            "missing": False,
            "memory_limit": None,
            "owned": True,
            "group": None,
            "hold": False,
            "scribble": False,
            "leave": "break",
            "leave_after": None,
            "pause_after": None,
            "pause_seconds": 0.0,
        }
        return plain | wishes

    def wait_blocked(self, loads: int) -> None:
        """Until so many loads got something and none of them gets anywhere by itself."""

        def progress() -> list[tuple[str, int]]:
            found = self.daemon.status()["loads"]
            return [(load["load_id"], load["delivered_bytes"]) for load in found]

        def blocked() -> bool:
            before = progress()
            begun = sum(delivered > 0 for _, delivered in before)
            time.sleep(0.3)
            return begun == len(before) == loads and progress() == before

        wait_until(blocked, f"{loads} loads to be blocked")

    def end(self) -> None:
        """Nobody is left, and nothing of them."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        self.daemon.end()

    def clear(self) -> None:
        for worker in self._workers:
            worker.kill()
        self.daemon.kill()
        shutil.rmtree(self.top)


@pytest.fixture
def scene(fleet: Fleet) -> Iterator[Callable[..., Scene]]:
    scenes: list[Scene] = []

    def make(*flags: str) -> Scene:
        made = Scene(fleet, *flags)
        scenes.append(made)
        made.daemon.wait_ready()
        return made

    yield make
    try:
        for made in scenes:
            made.end()
    finally:
        for made in scenes:
            made.clear()


def heard(worker: WorkerProcess) -> dict[str, Any]:
    answer = worker.hear(PATIENCE_SECONDS)
    if answer is None:
        raise AssertionError(f"the worker hangs:\n{worker.stacks()}")
    assert "wrong" not in answer, answer["wrong"]
    return answer


def parts(worker: WorkerProcess) -> list[dict[str, Any]]:
    """The answers of several loads in one."""
    found: list[dict[str, Any]] = heard(worker)["parts"]
    for part in found:
        assert "wrong" not in part, part["wrong"]
    return found


@pytest.mark.parametrize("owned", [True, pytest.param(False, marks=pytest.mark.stress)])
def test_a_load_inside_a_load_of_the_same_checkpoint(scene: Callable[..., Scene], owned: bool) -> None:
    """The inner one must not wait for what only the outer one, which waits for it, can release."""
    made = scene("--memory-limit=8MiB", "--queue-timeout=2")
    worker = made.worker()
    wish = made.wish("large-0", owned=owned)
    worker.tell("nested", {"outer": wish | {"pause_after": 1}, "inner": wish})
    outer, inner = parts(worker)
    assert "error" not in outer
    assert outer["count"] == len(checkpoints.layout("large-0", 1))
    assert inner.get("error") in (None, "StagingExhaustedError")


@pytest.mark.stress
@pytest.mark.parametrize("limit", ["0", "-1", "2MiB", "8MiB", "64MiB"])
def test_a_load_inside_a_load_of_another_checkpoint(scene: Callable[..., Scene], limit: str) -> None:
    made = scene(f"--memory-limit={limit}", "--queue-timeout=2")
    worker = made.worker()
    worker.tell("nested", {"outer": made.wish("large-0", pause_after=1), "inner": made.wish("large-1")})
    outer, inner = parts(worker)
    assert "error" not in outer
    assert inner.get("error") in (None, "StagingExhaustedError")


def test_a_client_that_stops_in_a_shared_window_holds_up_nobody_for_ever(scene: Callable[..., Scene]) -> None:
    made = scene("--memory-limit=8MiB", "--queue-timeout=2")
    stopped, other = made.worker(), made.worker()
    stopped.tell("load", made.wish("large-0", pause_after=1, pause_seconds=3600))
    made.wait_blocked(1)
    other.tell("load", made.wish("large-0"))
    assert heard(other).get("error") in (None, "StagingExhaustedError")


@pytest.mark.stress
def test_a_stopped_process_in_a_shared_window_holds_up_nobody_for_ever(scene: Callable[..., Scene]) -> None:
    made = scene("--memory-limit=8MiB", "--queue-timeout=2")
    stopped, other = made.worker(), made.worker()
    stopped.tell("load", made.wish("large-0", pause_after=1, pause_seconds=3600))
    made.wait_blocked(1)
    os.kill(stopped.pid, signal.SIGSTOP)
    other.tell("load", made.wish("large-0"))
    assert heard(other).get("error") in (None, "StagingExhaustedError")


def test_a_member_of_a_group_that_stops_holds_up_the_others_no_longer_than_it_lives(
    scene: Callable[..., Scene],
) -> None:
    made = scene("--memory-limit=8MiB", "--group-timeout=60")
    members = [made.worker() for _ in range(3)]
    for number, member in enumerate(members):
        pause = {"pause_after": 1, "pause_seconds": 3600} if number == 0 else {}
        member.tell("load", made.wish("large-0", group=["ranks", 3], **pause))
    made.wait_blocked(3)
    members[0].kill()
    made._workers.remove(members[0])
    for member in members[1:]:
        assert "error" not in heard(member)


@pytest.mark.stress
def test_a_member_of_a_group_that_stops_for_ever_fails_the_others_with_a_reason(
    scene: Callable[..., Scene],
) -> None:
    made = scene("--memory-limit=8MiB", "--queue-timeout=2")
    members = [made.worker() for _ in range(2)]
    for number, member in enumerate(members):
        pause = {"pause_after": 1, "pause_seconds": 3600} if number == 0 else {}
        member.tell("load", made.wish("large-0", group=["ranks", 2], **pause))
    assert heard(members[1]).get("error") in (None, "StagingExhaustedError")


@pytest.mark.stress
def test_groups_whose_members_come_crosswise_end(scene: Callable[..., Scene]) -> None:
    """Each of two groups has one member staged and one in a process that first loads the other's."""
    made = scene("--memory-limit=4MiB", "--group-timeout=1", "--queue-timeout=20")
    workers = [made.worker() for _ in range(4)]
    for number, worker in enumerate(workers):
        name = f"large-{number % 2}"
        worker.tell("load", made.wish(name, group=[name, 2]))
    for worker in workers:
        assert "error" not in heard(worker)


@pytest.mark.stress
def test_a_client_slower_than_the_queue_timeout_is_slow_and_nothing_else(scene: Callable[..., Scene]) -> None:
    """What waits for itself to release has nobody to blame."""
    made = scene("--memory-limit=8MiB", "--queue-timeout=1")
    worker = made.worker()
    worker.tell("load", made.wish("large-0", pause_after=1, pause_seconds=3))
    assert "error" not in heard(worker)


@pytest.mark.parametrize(
    ("limit", "owned"),
    [("2MiB", True), *(pytest.param(*case, marks=pytest.mark.stress) for case in _OTHER_EXACT)],
)
def test_a_limit_that_fits_exactly_one_tensor(scene: Callable[..., Scene], limit: str, owned: bool) -> None:
    made = scene(f"--memory-limit={limit}", "--queue-timeout=20")
    workers = [made.worker() for _ in range(4)]
    for _ in range(3):
        for worker in workers:
            worker.tell("load", made.wish("exact-0", owned=owned))
        for worker in workers:
            assert "error" not in heard(worker)


@pytest.mark.stress
def test_a_load_gets_a_window_although_tensors_are_held_and_an_unfinished_checkpoint_lies_idle(
    scene: Callable[..., Scene],
) -> None:
    """What lies idle is evicted for it, what is held stays: a window is what there is."""
    made = scene("--memory-limit=32MiB", "--queue-timeout=8", "--concurrency=1", "--block-size=64KiB")
    holder, passer, comer = made.worker(), made.worker(), made.worker()
    holder.tell("load", made.wish("exact-0", hold=True))
    assert "error" not in heard(holder)
    passer.tell("prefetch", {"sources": [made.file("plain-0")], "pin": True})
    wait_until(lambda: len(made.daemon.status()["stages"]) == 2, "the prefetch to begin")
    passer.kill()
    made._workers.remove(passer)
    comer.tell("load", made.wish("large-0", owned=False))
    assert "error" not in heard(comer)


@pytest.mark.stress
def test_loads_wait_for_no_more_than_their_turn_behind_one_that_cannot_have_its_memory(
    scene: Callable[..., Scene],
) -> None:
    """A prefetch wants all its memory, of which tensors that are held keep a part."""
    made = scene("--memory-limit=32MiB", "--queue-timeout=2")
    holder, prefetcher, other = made.worker(), made.worker(), made.worker()
    holder.tell("load", made.wish("exact-0", hold=True))
    assert "error" not in heard(holder)
    prefetcher.tell("prefetch", {"sources": [made.file("large-0"), made.file("giant-0")], "pin": False})
    wait_until(lambda: made.daemon.status()["staging"]["waiting"], "the prefetch to wait")
    other.tell("load", made.wish("plain-0"))
    assert "error" not in heard(other)
    assert heard(prefetcher)["error"] == "StagingExhaustedError"
