"""What the tests of the server share: real files, counted descriptors, a loop whose clock can be moved."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import resource
import selectors
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from penstock.server.checkpoint.catalog import Catalog
from penstock.server.checkpoint.headers.decode import parse_header
from penstock.server.checkpoint.headers.table import Header
from penstock.server.config.settings import Config, load_config
from penstock.server.sources import Access
from penstock.server.sources.file.source import FileSource
from penstock.server.sources.objects import ObjectSettings
from penstock.server.sources.s3.settings import S3Settings
from penstock.server.sources.s3.source import S3Source
from penstock.server.sources.stores import FLAGS
from penstock.server.staging.slab import Slab
from penstock.server.system.limits import MemoryBound

_P = ParamSpec("_P")
_T = TypeVar("_T")

MIB = 1 << 20
SLAB_BYTES = 2 * MIB
ROOT = Access(uid=0, privileged=True, prefixes=())


def header_json(sizes: Sequence[int], *, pad_bytes: int = 0, prefix: str = "t") -> bytes:
    """A header of U8 tensors of these sizes, in order, padded with spaces."""
    entries: dict[str, object] = {}
    at = 0
    for number, size in enumerate(sizes):
        entries[f"{prefix}{number}"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    return json.dumps(entries).encode() + b" " * pad_bytes


def header_of(sizes: Sequence[int], *, pad_bytes: int = 0) -> Header:
    raw = header_json(sizes, pad_bytes=pad_bytes)
    return parse_header(raw, file_bytes=8 + len(raw) + sum(sizes))


def checkpoint_bytes(sizes: Sequence[int], *, pad_bytes: int = 0, seed: int = 1, prefix: str = "t") -> bytes:
    """A safetensors file, no two ranges of which are alike."""
    raw = header_json(sizes, pad_bytes=pad_bytes, prefix=prefix)
    return len(raw).to_bytes(8, "little") + raw + random.Random(seed).randbytes(sum(sizes))


def write_checkpoint(
    path: Path, sizes: Sequence[int], *, pad_bytes: int = 0, seed: int = 1, prefix: str = "t"
) -> Path:
    path.write_bytes(checkpoint_bytes(sizes, pad_bytes=pad_bytes, seed=seed, prefix=prefix))
    return path


def write_index(path: Path, weight_map: dict[str, str]) -> Path:
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def wait_for_tick(directory: Path) -> None:
    """Until a file that is written there gets another time than those before: kernels older than 6.13 count
    these times in hundredths of a second or so, and what changes within one looks unchanged."""
    probe = directory / "tick"
    probe.touch()
    began = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == began:
        probe.touch()
    probe.unlink()


def bytes_in(slabs: float) -> int:
    """Of a checkpoint that takes so many slabs: less than they have, as segments take whole pages."""
    return int(slabs * SLAB_BYTES) - 64 * 1024


def configuration_of(*flags: str, **variables: str) -> Config:
    """What penstockd makes of flags and variables, on a machine with a lot of memory."""
    return load_config(flags, variables, lambda: MemoryBound(1 << 40, "the machine"), FLAGS)


def make_config(socket_dir: Path = Path("/nonexistent"), **changes: Any) -> Config:
    """A limit of 8 slabs of 2 MiB, unless `changes` says otherwise."""
    values: dict[str, Any] = {
        "socket_dir": socket_dir,
        "memory_limit": 8 * SLAB_BYTES,
        "capacity_bytes": 8 * SLAB_BYTES,
        "slab_bytes": SLAB_BYTES,
        "concurrency": 2,
        "block_bytes": 256 << 10,
        "window_bytes": 4 << 30,
        "allow": (),
        "warm_set": None,
        "warm_set_interval_seconds": 300.0,
        "node_features": None,
        "trim_after_seconds": 900.0,
        "queue_timeout_seconds": 600.0,
        "group_timeout_seconds": 60.0,
        "grace_seconds": 30.0,
        "max_loads": 256,
        "populate": False,
        "log_format": "text",
        "log_level": "info",
        "exit_with_stdin": False,
        "object_concurrency": 2,
        "store_options": {
            option.field: option.parse(option.default) for store in FLAGS for option in store.options
        },
        "object_block_bytes": 256 << 10,
    }
    fields = Config.__dataclass_fields__
    values.update({name: () for name in fields if name not in values})
    return Config(**{**values, **changes})


def no_objects(workers: Executor) -> S3Source:
    """For tests that load none."""
    settings = ObjectSettings(retries=1, timeout_seconds=1, connections=1)
    return S3Source(settings, S3Settings(), lambda uid: workers, print)


@contextmanager
def file_catalog(threads: int = 4) -> Iterator[Catalog]:
    """Of files, opened by threads of its own."""
    with ThreadPoolExecutor(threads) as workers:
        catalog = Catalog([FileSource(lambda path, uid: workers), no_objects(workers)])
        yield catalog
        catalog.shutdown()


def open_fds() -> dict[int, str]:
    """This process's descriptors and what they refer to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the one that listed the directory
            continue
    return found


def more_fds(before: dict[int, str]) -> dict[int, str]:
    """Descriptors of this process that were not open before. That some are gone means nothing: what earlier
    tests left, as the idle connections of a server in a thread, closes when it likes."""
    return {fd: target for fd, target in open_fds().items() if before.get(fd) != target}


def open_slabs() -> int:
    """How many slabs this process has, by the kernel's count."""
    return sum(target.startswith("/memfd:penstock") for target in open_fds().values())


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """As if the system had no memory: every attempt to open or make something fails with EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def identities(slabs: list[Slab]) -> set[int]:
    """Of the memory behind each: its inode."""
    return {os.fstat(slab.fd).st_ino for slab in slabs}


def close_leftovers() -> None:
    """Closes the descriptors that a failed test left, so that it fails no other."""
    for fd, target in open_fds().items():
        if target.startswith("/memfd:penstock") or target.endswith(".safetensors"):
            os.close(fd)


def until_true(condition: Callable[[], object]) -> None:
    """Waits, on a thread, until the condition holds; fails when it takes absurdly long."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class WatchedExecutor(Executor):
    """Runs calls on threads of its own and records the most slabs that existed after any of them."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads)
        self._lock = threading.Lock()
        self.most_slabs = 0
        self.under_way = 0
        """Calls that have not ended, or of whose end the loop has not been told."""

    def submit(self, call: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        future: Future[_T] = Future()
        self._executor.submit(self._run, future, functools.partial(call, *args, **kwargs))
        with self._lock:
            self.under_way += 1
        return future

    def of(self, uid: int) -> Executor:
        return self

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._executor.shutdown(wait, cancel_futures=cancel_futures)

    def _run(self, future: Future[_T], call: Callable[[], _T]) -> None:
        """The call counts as under way until whoever waits for it has been told."""
        try:
            if future.set_running_or_notify_cancel():
                try:
                    result = self._watched(call)
                except BaseException as error:
                    future.set_exception(error)
                    del future  # or the error, its traceback and the future would keep each other
                else:
                    future.set_result(result)
        finally:
            with self._lock:
                self.under_way -= 1

    def _watched(self, call: Callable[[], _T]) -> _T:
        try:
            return call()
        finally:
            with self._lock:
                self.most_slabs = max(self.most_slabs, open_slabs())


_LOOK_SECONDS = 0.0005


class _IdleWaits(selectors.DefaultSelector):
    """Counts the seconds that a loop waited for a timer, and for nothing else to happen before it."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.at_work: list[Callable[[], bool]] = []
        """Whether threads are at work, for whom the loop waits."""
        self.looking: list[asyncio.Future[None]] = []
        """Who wants to look again soon."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        looking, self.looking = self.looking, []
        if looking:
            timeout = _LOOK_SECONDS if timeout is None else min(timeout, _LOOK_SECONDS)
        events = super().select(timeout)
        if not events and timeout and not any(works() for works in self.at_work):
            self.seconds += timeout
        for one in looking:
            if not one.done():
                one.set_result(None)
        return events


class ClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock a test can set forward, so that it need not wait for timeouts.

    By itself the clock goes on only while the loop idles until a timer, and no threads work of which it was
    told: a machine that lets this process, its threads or its disk stand still for seconds brings no timeout
    nearer.
    """

    def __init__(self) -> None:
        self._idle = _IdleWaits()
        self._ahead_seconds = time.monotonic()
        super().__init__(self._idle)

    def time(self) -> float:
        return self._idle.seconds + self._ahead_seconds

    def advance(self, seconds: float) -> None:
        self._ahead_seconds += seconds

    def stand_still_while(self, threads_work: Callable[[], bool]) -> None:
        self._idle.at_work.append(threads_work)

    @property
    def threads_work(self) -> bool:
        return any(works() for works in self._idle.at_work)

    async def look_again(self) -> None:
        """Returns after a moment that needs no clock."""
        looking = self.create_future()
        self._idle.looking.append(looking)
        await looking


def running_clock() -> ClockLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ClockLoop)
    return loop


def advance(seconds: float) -> None:
    running_clock().advance(seconds)


@contextmanager
def clock_loop() -> Iterator[ClockLoop]:
    """A ClockLoop; an error that only reached its handler fails the test."""
    loop = ClockLoop()
    unhandled: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    try:
        yield loop
        assert not unhandled
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.close()


def on_clock_loop(test: Callable[_P, Coroutine[Any, Any, None]]) -> Callable[_P, None]:
    """Runs an async test on a ClockLoop."""

    @functools.wraps(test)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        with clock_loop() as loop:
            loop.run_until_complete(test(*args, **kwargs))

    return run


async def turns(count: int = 20) -> None:
    """Lets everything run that is ready to."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    """Turns the loop until the condition holds; the test's own timeout is the bound."""
    loop = asyncio.get_running_loop()
    while not condition():
        await (loop.look_again() if isinstance(loop, ClockLoop) else asyncio.sleep(_LOOK_SECONDS))


async def until_advanced(condition: Callable[[], object], *, step_seconds: float = 1.0) -> None:
    """The same on a ClockLoop, while time passes: so much at each look, but none while threads work."""
    clock = running_clock()

    def there() -> object:
        if not clock.threads_work:
            clock.advance(step_seconds)
        return condition()

    await until(there)


async def at_rest(count: int = 50) -> None:
    """Turns a ClockLoop until no threads have worked, and nothing else has come, for so many turns."""
    clock, calm = running_clock(), 0
    while calm < count:
        calm = 0 if clock.threads_work else calm + 1
        await (asyncio.sleep(0) if calm else clock.look_again())
