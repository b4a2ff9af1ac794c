"""Where the system has no memory, thread or descriptor for a load, it fails with a reason and its remedy,
leaves nothing, and the next one works. Failures are made at the system calls.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.server.checkpoint import plan
from penstock.server.errors import (
    CheckpointCorruptError,
    PenstockError,
    StagingExhaustedError,
    TooManyLoadsError,
)
from penstock.server.staging import entry
from penstock.server.staging.pool import SlabPool
from penstock.server.staging.reading import pipeline
from penstock.server.staging.reading.reader import ReaderPool
from penstock.server.system import linux
from penstock.server.system.failure import NoThreadError, explain
from penstock.server.system.fair import FairExecutor

from ..bench import running
from ..support import SLAB_BYTES, more_fds, on_clock_loop, open_fds, open_slabs, turns, until

NO_MEMORY = OSError(errno.ENOMEM, "Cannot allocate memory")
NO_DESCRIPTOR = OSError(errno.EMFILE, "Too many open files")

INJECTED: dict[str, tuple[object, str, BaseException, type[PenstockError]]] = {
    "memfd_create": (os, "memfd_create", NO_DESCRIPTOR, TooManyLoadsError),
    "ftruncate": (os, "ftruncate", NO_MEMORY, StagingExhaustedError),
    "mmap": (linux, "map_shared_aligned", NO_MEMORY, StagingExhaustedError),
    "seals": (fcntl, "fcntl", NO_MEMORY, StagingExhaustedError),
    "planning": (plan, "segments_within", MemoryError(), StagingExhaustedError),
    "ring": (entry, "SegmentRing", MemoryError(), StagingExhaustedError),
    "filling": (pipeline, "Filling", MemoryError(), StagingExhaustedError),
    "fault": (plan, "segments_within", ZeroDivisionError("a fault"), PenstockError),
}


@contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str, error: BaseException
) -> Iterator[None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, name, fail)
        yield


@pytest.mark.parametrize("what", INJECTED)
@pytest.mark.parametrize("uid", [0, 70001])
@on_clock_loop
async def test_a_load_that_gets_no_slabs_fails_with_a_reason_and_leaves_nothing(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, what: str, uid: int
) -> None:
    where, name, error, kind = INJECTED[what]
    path = make("a", 4)
    async with running() as bench:
        before = open_fds()
        with failing(monkeypatch, where, name, error):
            visits = [bench.enter(path, uid=uid), bench.enter(path, uid=uid)]
            for visit in visits:
                with pytest.raises(kind) as caught:
                    await visit.entry.wait_started()
                assert type(caught.value) is kind
            for visit in visits:
                visit.leave()
            await until(lambda: not bench.staging.entries)
        bench.assert_nothing_is_left()
        assert not [name for name in more_fds(before).values() if "memfd" not in name]
        again = bench.enter(path, uid=uid)
        await again.read()
        again.leave()


@on_clock_loop
async def test_a_load_that_fails_lets_those_behind_it_go_on(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as bench:
        first, behind = bench.enter(make("a", 8)), bench.enter(make("b", 8))
        with failing(monkeypatch, linux, "map_shared_aligned", NO_MEMORY):
            with pytest.raises(StagingExhaustedError):
                await first.entry.wait_started()
            with pytest.raises(StagingExhaustedError):
                await behind.entry.wait_started()
        third = bench.enter(make("c", 8))
        await third.read()
        for visit in (first, behind, third):
            visit.leave()


@on_clock_loop
async def test_a_load_for_which_no_reader_can_be_started_fails_with_a_reason(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make("a", 4)
    async with running() as bench:
        with failing(monkeypatch, ReaderPool, "_start", RuntimeError("can't start new thread")):
            visit = bench.enter(path)
            with pytest.raises(TooManyLoadsError, match=r"reading .*/a.* failed.*pids\.max"):
                await visit.read()
            visit.leave()
            await until(lambda: not bench.staging.entries)
        bench.assert_nothing_is_left()
        again = bench.enter(path)
        await again.read()
        again.leave()


@on_clock_loop
async def test_slabs_are_given_back_although_no_thread_can_be_started_to_close_them() -> None:
    class NoThreads:
        def of(self, uid: int) -> Any:
            return self

        def submit(self, *_: object) -> None:
            raise NoThreadError("can't start new thread")

    threads = FairExecutor(1, "test")
    before = open_slabs()
    pool = SlabPool(slab_bytes=SLAB_BYTES, max_slabs=4, workers=threads, on_free=lambda: None)
    slabs = await pool.take(3, 70001)
    for slab in slabs:
        slab.owner_uid = 70001
    pool.release(slabs)
    pool._workers = NoThreads()
    with pytest.raises(NoThreadError):
        await pool.take(4, 70002)  # closes what the other user had, and can make no new ones
    assert open_slabs() - before == pool.existing_slabs
    assert pool.available == 4
    await pool.stop()
    assert open_slabs() == before
    threads.shutdown()


@on_clock_loop
async def test_a_buffer_that_cannot_be_populated_serves_loads_all_the_same(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(populate=True) as bench:
        for error in (NO_MEMORY, MemoryError(), NoThreadError("can't start new thread")):
            with failing(monkeypatch, linux, "advise", error):
                await bench.staging.pool.populate(lambda: True)
        await turns()
        visit = bench.enter(make("a", 4))
        await visit.read()
        visit.leave()


def test_threads_that_cannot_be_started_are_told_and_keep_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that was refused must not run later: nobody would take what it opens."""
    executor = FairExecutor(2, "test")
    ran: list[str] = []
    no_more = RuntimeError("can't start new thread")
    with failing(monkeypatch, threading.Thread, "start", no_more), pytest.raises(NoThreadError):
        executor.submit(70001, ran.append, "refused")
    assert executor.submit(70001, len, "ab").result(60) == 2
    with failing(monkeypatch, threading.Thread, "start", RuntimeError("can't start new thread")):
        assert executor.submit(70001, len, "abc").result(60) == 3  # by the thread that there is
    assert not ran
    executor.shutdown()


@pytest.mark.parametrize(
    ("error", "kind", "remedy"),
    [
        (MemoryError(), StagingExhaustedError, "ulimit -v"),
        (OSError(errno.ENOSPC, "No space left on device"), StagingExhaustedError, "memory"),
        (OSError(errno.ENFILE, "Too many open files in system"), TooManyLoadsError, "LimitNOFILE"),
        (NoThreadError("can't start new thread"), TooManyLoadsError, "pids.max"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), TooManyLoadsError, "ulimit -u"),
        (ZeroDivisionError("secret"), PenstockError, "report"),
    ],
)
def test_every_shortage_is_told_with_what_failed_and_its_remedy(
    error: BaseException, kind: type[PenstockError], remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = explain(error, "load 1a2b3c4d")
    assert type(told) is kind
    assert told.message.startswith("load 1a2b3c4d failed")
    assert remedy in told.message
    assert "secret" not in told.message
    assert ("ZeroDivisionError: secret" in caplog.text) == (kind is PenstockError)


@on_clock_loop
async def test_what_is_kept_of_a_damaged_file_is_forgotten_before_its_loads_hear_of_it(
    make: Callable[..., Path],
) -> None:
    """A client that hears of it may end its load at once, and load the file again."""
    path = make("a", 4)
    async with running() as bench:
        visits = [bench.enter(path, gated=True), bench.enter(path)]
        await visits[0].entry.wait_started()
        error = CheckpointCorruptError("its bytes are wrong; load it again")
        visits[0].entry.fail(error)
        assert bench.told == [(who, error) for who in (bench.staging, *visits)]
        visits[0].open_gates()
        for visit in visits:
            visit.leave()
