"""That the kernel's word of writes reaches the watches of a file, of all who watch it, and no others."""

from __future__ import annotations

import fcntl
import os
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.server.sources.file import watches as module
from penstock.server.sources.file.watches import Watch, Watches


@pytest.fixture
def watches() -> Iterator[Watches]:
    watches = Watches()
    yield watches
    watches.close()


def watch(watches: Watches, path: Path) -> Watch:
    fd = os.open(path, os.O_RDONLY)
    try:
        found = watches.watch(fd)
    finally:
        os.close(fd)
    assert found is not None
    return found


def watches_of(watches: Watches) -> int:
    """How many files the kernel watches."""
    lines = Path(f"/proc/self/fdinfo/{watches._fd}").read_text().splitlines()
    return sum(line.startswith("inotify ") for line in lines)


def queued_bytes(watches: Watches) -> int:
    """Of events that the kernel has queued."""
    answer = fcntl.ioctl(watches._fd, termios.FIONREAD, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


def state(one: Watch) -> tuple[bool, bool]:
    one.look()
    return one.modified, one.lost


def test_a_write_is_told_to_all_watches_of_the_file_and_to_no_other(watches: Watches, tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"old")
    other.write_bytes(b"old")
    first, second, unrelated = watch(watches, path), watch(watches, path), watch(watches, other)
    assert state(first) == state(second) == (False, False)
    with open(path, "r+b") as file:
        file.write(b"new")
    assert state(first) == state(second) == (True, False)
    assert state(unrelated) == (False, False)


def test_closing_one_watch_of_a_file_leaves_the_other(watches: Watches, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    first, second = watch(watches, path), watch(watches, path)
    first.close()
    first.close()
    path.write_bytes(b"new")
    assert state(second) == (True, False)
    second.close()
    assert watches._by_number == {}


def test_a_new_watch_knows_nothing_of_earlier_writes(watches: Watches, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    first = watch(watches, path)
    path.write_bytes(b"new")
    assert state(first) == (True, False)
    assert state(watch(watches, path)) == (False, False)


def test_a_file_that_is_removed_is_watched_as_long_as_somebody_writes_to_it(
    watches: Watches, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with open(path, "r+b") as file:
        one = watch(watches, path)
        path.unlink()
        assert state(one) == (False, False)
        file.write(b"new")
        file.flush()
        assert state(one) == (True, False)


def test_a_file_that_is_gone_is_not_watched_any_more(watches: Watches, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with open(path, "rb"):
        one = watch(watches, path)
        path.unlink()
        assert state(one) == (False, False)
    assert state(one) == (False, True)  # the last that had it open is gone, and so is the file


def test_writes_before_a_watch_are_told_to_the_watches_before_it_only(
    watches: Watches, tmp_path: Path
) -> None:
    """Though nobody has looked for them yet."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    first = watch(watches, path)
    path.write_bytes(b"new")
    second = watch(watches, path)
    assert state(second) == (False, False)
    assert state(first) == (True, False)
    path.write_bytes(b"newer")
    assert state(second) == (True, False)


def test_writes_that_end_after_a_watch_was_closed_count_for_the_next(
    watches: Watches, tmp_path: Path
) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    for one in (path, other):
        one.write_bytes(b"old")
    first, second = watch(watches, path), watch(watches, path)
    first.close()
    second.close()
    assert watch(watches, path).writes_before == 0
    path.write_bytes(b"new")
    assert [watch(watches, one).writes_before for one in (path, other, path)] == [1, 0, 1]


def test_watches_of_closed_files_are_few(
    watches: Watches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_KEPT", 2)
    monkeypatch.setattr(module, "MOST_COUNTED", 1)
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.write_bytes(b"old")
        watch(watches, path).close()
    assert watches_of(watches) == 2
    for path in paths:
        path.write_bytes(b"new")
    assert [watch(watches, path).writes_before for path in paths] == [0, 0, 0, 1]
    assert len(watches._writes) == 1


def test_a_file_that_was_written_to_is_told_of_once(watches: Watches, tmp_path: Path) -> None:
    """A user who writes without end costs the others nothing: of each open file there is one event to read,
    and what comes meanwhile."""
    path, other = tmp_path / "a", tmp_path / "b"
    for one in (path, other):
        one.write_bytes(b"old")
    first, second, unrelated = watch(watches, path), watch(watches, path), watch(watches, other)
    fds = [os.open(one, os.O_WRONLY) for one in (path, path, other)]
    os.pwrite(fds[0], b"new", 0)
    assert state(first) == state(second) == (True, False)
    assert watches_of(watches) == 1
    queued_before = queued_bytes(watches)  # that the watch has ended
    for _ in range(10):
        os.pwrite(fds[1], b"new", 0)
    assert queued_bytes(watches) == queued_before
    os.pwrite(fds[2], b"new", 0)
    assert state(unrelated) == (True, False)
    assert watches_of(watches) == 0
    for fd in fds:
        os.close(fd)


def test_a_look_reads_what_was_written_before_it_and_ends(
    watches: Watches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a user writes to other files as fast as it reads."""
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.write_bytes(b"old")
    watched = [watch(watches, path) for path in paths]
    unwritten = iter(paths)
    next(unwritten).write_bytes(b"new")
    tell = watches._tell

    def tell_while_somebody_writes(number: int, mask: int) -> None:
        tell(number, mask)
        for path in unwritten:
            with open(path, "r+b") as file:
                file.write(b"new")
            break

    monkeypatch.setattr(watches, "_tell", tell_while_somebody_writes)
    watched[0].look()
    assert [one.modified for one in watched] == [True, False, False, False]
    watched[1].look()
    assert [one.modified for one in watched] == [True, True, False, False]


def test_more_writes_than_the_kernel_remembers_leave_all_watches_uncertain(
    watches: Watches, tmp_path: Path
) -> None:
    quiet, noisy = tmp_path / "quiet", [tmp_path / "a", tmp_path / "b"]
    for path in (quiet, *noisy):
        path.write_bytes(b"old")
    one = watch(watches, quiet)
    for path in noisy:
        watch(watches, path)
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 100_000:
        pytest.skip(f"the kernel remembers {most} events")
    fds = [os.open(path, os.O_WRONLY) for path in noisy]
    for number in range(most + 2):  # in turn, as equal ones that follow each other count once
        os.pwrite(fds[number % 2], b"x", 0)
    for fd in fds:
        os.close(fd)
    assert state(one) == (False, True)


def test_watches_made_and_removed_by_many_threads_all_hear_of_a_write(
    watches: Watches, tmp_path: Path
) -> None:
    """Each first number may be of a watch that another thread is just removing."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    deaf: list[int] = []

    def work() -> None:
        fd = os.open(path, os.O_RDWR)
        for number in range(300):
            one = watches.watch(fd)
            assert one is not None
            os.pwrite(fd, b"x", 0)
            if state(one) != (True, False):
                deaf.append(number)
            one.close()
        os.close(fd)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert deaf == []
    assert watches._by_number == {}


def test_without_inotify_nothing_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoInotify:
        @staticmethod
        def inotify_init1(flags: int) -> int:
            return -1

    monkeypatch.setattr(module, "_libc", NoInotify)
    watches = Watches()
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert watches.watch(fd) is None
    finally:
        os.close(fd)
    watches.drain()
    watches.close()
