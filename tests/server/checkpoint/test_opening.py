"""Opening files within a user's descriptors and storage's time: real files, and threads that really hang."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.server.checkpoint import opening
from penstock.server.checkpoint.catalog import Catalog
from penstock.server.checkpoint.headers.keep import Keep
from penstock.server.errors import (
    CheckpointInvalidError,
    CheckpointNotFoundError,
    PenstockError,
    SourceUnavailableError,
    TooManyLoadsError,
)
from penstock.server.sources import Access
from penstock.server.sources.file.local_file import LocalFile, open_file
from penstock.server.sources.file.source import FileSource
from penstock.server.system.fair import FairExecutor
from penstock.server.system.quota import Quota

from ..support import ROOT, more_fds, no_objects, open_fds, until_true, write_checkpoint

ANNE, BERT = 1001, 1002


def access(uid: int, top: Path) -> Access:
    return Access(uid, privileged=False, prefixes=(str(top),))


class HangingFile(LocalFile):
    """Reads of a file whose name begins with `hung` hang until `go_on`."""

    go_on = threading.Event()
    reached = threading.Semaphore(0)

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        if os.path.basename(self.uri).startswith("hung"):
            self.reached.release()
            assert self.go_on.wait(60)
        super().read_into(offset, views)


class HangingSource(FileSource):
    def open(self, location: str, access: Access) -> LocalFile:
        file = open_file(location, access)
        file.__class__ = HangingFile
        return file


class Bench:
    def __init__(self, *, descriptors: int = 1000, patience_seconds: float = 60.0, threads: int = 16) -> None:
        HangingFile.go_on, HangingFile.reached = threading.Event(), threading.Semaphore(0)
        self.workers = FairExecutor(threads, "opener")
        self.descriptors = Quota(descriptors)
        self.objects = ThreadPoolExecutor(1)
        source = HangingSource(lambda path, uid: self.workers.of(uid), patience_seconds=patience_seconds)
        self.catalog = Catalog(
            [source, no_objects(self.objects)], descriptors=self.descriptors, keep=Keep(80 << 20, 0)
        )

    def close(self) -> None:
        HangingFile.go_on.set()
        self.workers.shutdown()
        self.objects.shutdown()
        self.catalog.shutdown()


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    before = open_fds()
    bench = Bench(descriptors=getattr(request, "param", 1000))
    yield bench
    bench.close()
    until_true(lambda: not more_fds(before))
    assert bench.descriptors.used == 0
    # Errors that a test caught hold its checkpoints, and so do threads a moment after a call has ended.
    until_true(lambda: gc.collect() >= 0 and bench.catalog.keep.budget.used_bytes == 0)


def files(top: Path, count: int, *, stem: str = "f") -> list[str]:
    return [str(write_checkpoint(top / f"{stem}{n}.safetensors", [8], prefix=f"{n}-")) for n in range(count)]


def test_open_files_are_counted_until_they_are_closed_and_only_once(bench: Bench, tmp_path: Path) -> None:
    checkpoint = bench.catalog.resolve(files(tmp_path, 3), access(ANNE, tmp_path))
    assert bench.descriptors.used_by(ANNE) == 6
    checkpoint.without_headers().close()
    assert bench.descriptors.used == 0
    checkpoint.close()
    assert bench.descriptors.used == 0


def test_a_file_that_is_named_twice_is_open_once_and_there_twice(bench: Bench, tmp_path: Path) -> None:
    one, two = files(tmp_path, 2)
    checkpoint = bench.catalog.resolve([one, two, one, one], ROOT)
    assert [file.uri for file in checkpoint.files] == [one, two, one, one]
    assert checkpoint.files[0] is checkpoint.files[2] is checkpoint.files[3]
    assert [list(table.names()) for table in checkpoint.tables] == [["0-0"], ["1-0"], ["0-0"], ["0-0"]]
    assert bench.descriptors.used_by(0) == 4
    checkpoint.close()
    assert bench.descriptors.used == 0


@pytest.mark.parametrize("bench", [40], indirect=True)
def test_who_holds_its_share_is_refused_with_the_numbers_and_others_are_not(
    bench: Bench, tmp_path: Path
) -> None:
    paths = files(tmp_path, 12)
    held = bench.catalog.resolve(paths, access(ANNE, tmp_path))
    with pytest.raises(TooManyLoadsError) as caught:
        bench.catalog.resolve(paths[:8], access(ANNE, tmp_path))
    assert caught.value.message == (
        "8 files need 16 descriptors, and 4 are left for uid 1001: its loads hold 24, all loads 24 of 40; "
        "try again when other loads have ended, or raise the limit of open files where penstockd is started "
        "(ulimit -n, LimitNOFILE)"
    )
    assert caught.value.retryable
    with pytest.raises(CheckpointInvalidError, match="24 files need 48 descriptors, more than the 28"):
        bench.catalog.resolve(files(tmp_path, 24), access(ANNE, tmp_path))
    bench.catalog.resolve(paths[:4], access(BERT, tmp_path)).close()
    bench.catalog.resolve(paths[:7], ROOT).close()
    held.close()
    bench.catalog.resolve(paths[:8], access(ANNE, tmp_path)).close()


def test_a_file_that_cannot_be_opened_gives_all_descriptors_back(bench: Bench, tmp_path: Path) -> None:
    paths = files(tmp_path, 150)
    for place in (0, 70, 149):
        sources = [*paths[:place], str(tmp_path / "gone"), *paths[place:]]
        with pytest.raises(CheckpointNotFoundError):
            bench.catalog.resolve(sources, ROOT)
        assert bench.descriptors.used == 0


def test_files_that_nobody_has_begun_to_open_give_their_descriptors_back(tmp_path: Path) -> None:
    """The only thread hangs in the first until its time is over, and the others wait behind it."""
    bench = Bench(threads=1, patience_seconds=0.2)
    try:
        with pytest.raises(SourceUnavailableError, match="storage did not give its header"):
            bench.catalog.resolve(files(tmp_path, 40, stem="hung"), ROOT)
        assert bench.descriptors.used == 2  # of the first
        HangingFile.go_on.set()
        until_true(lambda: bench.descriptors.used == 0)
    finally:
        bench.close()


def test_a_file_that_hangs_costs_its_load_and_is_closed_when_it_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time passes when all others are open: a slow machine is no storage that hangs."""
    before = open_fds()
    bench = Bench()
    seconds = [time.monotonic()]
    monkeypatch.setattr(opening, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    try:
        hung, fine = files(tmp_path, 1, stem="hung")[0], files(tmp_path, 3)
        with ThreadPoolExecutor(1) as pool:
            sources = [fine[0], hung, fine[1]]
            load = pool.submit(bench.catalog.resolve, sources, access(ANNE, tmp_path))
            assert HangingFile.reached.acquire(timeout=60)
            until_true(lambda: len(bench.workers._began) == 1 and not bench.workers._queues)
            seconds[0] += 61
            with pytest.raises(
                SourceUnavailableError, match=r"hung0\.safetensors: storage did not give its header"
            ):
                load.result(60)
        assert bench.descriptors.used_by(ANNE) == 2  # of the one that still hangs
        bench.catalog.resolve(fine, access(ANNE, tmp_path)).close()
        HangingFile.go_on.set()
        until_true(lambda: bench.descriptors.used == 0)
        until_true(lambda: not more_fds(before))
    finally:
        bench.close()


def test_files_of_one_user_that_hang_leave_others_threads(bench: Bench, tmp_path: Path) -> None:
    hung = files(tmp_path, 40, stem="hung")
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(bench.catalog.resolve, hung, access(ANNE, tmp_path))
        assert HangingFile.reached.acquire(timeout=60)
        for uid in (BERT, 0):
            bench.catalog.resolve(files(tmp_path, 5), access(uid, tmp_path)).close()
        assert not load.done()
        HangingFile.go_on.set()
        load.result(60).close()


def test_an_index_that_hangs_costs_its_load(tmp_path: Path) -> None:
    bench = Bench(patience_seconds=0.2)
    try:
        index = tmp_path / "hung.safetensors.index.json"
        index.write_text('{"weight_map": {"t0": "f0.safetensors"}}')
        with pytest.raises(SourceUnavailableError, match="storage did not give"):
            bench.catalog.resolve([str(index)], access(ANNE, tmp_path))
        HangingFile.go_on.set()
        until_true(lambda: bench.descriptors.used == 0)
    finally:
        bench.close()


def test_a_read_that_trickles_ends_when_its_time_is_over(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a", [3 << 20])
    file = open_file(str(path), ROOT)
    try:
        buffer = memoryview(bytearray(1 << 20))
        file.give_up_at = -math.inf
        with pytest.raises(
            SourceUnavailableError,
            match="storage is too slow: reading had reached byte",
        ):
            file._read_once(file._fd, 0, 0, [buffer])
        file.give_up_at = math.inf
        assert file._read_once(file._fd, 0, 0, [buffer]) == 1 << 20
    finally:
        file.close()


def test_without_a_descriptor_opening_says_so_leaks_nothing_and_works_again(
    bench: Bench, tmp_path: Path, limit_open_files: None
) -> None:
    paths = files(tmp_path, 60)
    before = open_fds()
    for left, sources in (
        (20, paths),
        (1, paths[:1]),
    ):  # with one, the file is open, but not for direct reads
        with all_descriptors_but(left), pytest.raises(PenstockError) as caught:
            bench.catalog.resolve(sources, ROOT)
        assert isinstance(caught.value, TooManyLoadsError)
        assert "as many files open as it may" in caught.value.message
        assert "LimitNOFILE" in caught.value.message
    until_true(lambda: not more_fds(before))
    bench.catalog.resolve(paths, ROOT).close()


@contextmanager
def all_descriptors_but(left: int) -> Iterator[None]:
    """Takes them, so that this process has so many left."""
    source = os.open(os.devnull, os.O_RDONLY)
    fillers = [source]
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.dup(source))
        for _ in range(left):
            os.close(fillers.pop())
        yield
    finally:
        for fd in fillers:
            os.close(fd)


@pytest.fixture
def limit_open_files() -> Iterator[None]:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_fds()) + 200, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_without_a_thread_a_load_is_refused_and_leaves_nothing_open(bench: Bench, tmp_path: Path) -> None:
    bench.workers.shutdown()
    with pytest.raises(TooManyLoadsError, match=r"f0\.safetensors: penstockd has no thread to read it"):
        bench.catalog.resolve(files(tmp_path, 3), ROOT)
    assert bench.descriptors.used == 0
