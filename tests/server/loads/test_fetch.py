"""Fetches: every byte of every file, in order, as listed; what they cost; and how they end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from penstock.server.checkpoint.headers.budget import Budget
from penstock.server.errors import (
    CheckpointChangedError,
    CheckpointInvalidError,
    InvalidRequestError,
    SourceUnavailableError,
    TooManyLoadsError,
)
from penstock.server.loads.choice import Choice
from penstock.server.loads.fetch import (
    LISTED_BYTES,
    TAKING_SECONDS,
    Done,
    Fetch,
    FetchContext,
    FetchRequest,
    Plan,
    digest,
)
from penstock.server.loads.readahead import PART_BYTES, PARTS_AT_ONCE, SMALL_PART_BYTES, Part
from penstock.server.sources import Access, Listed, Wanted
from penstock.server.sources.file.local_file import LocalFile
from penstock.server.sources.file.source import FileSource
from penstock.server.system.counts import Totals
from penstock.server.system.fair import FairExecutor
from penstock.server.system.quota import Quota

from ..support import ROOT, advance, on_clock_loop, open_fds, turns, until, wait_for_tick
from .test_admission import Client

UID = 70001
"""Nobody's here: for it shares count."""


class Watched(FileSource):
    """Files whose opening and reading the test can hold up and count."""

    def __init__(self, threads: FairExecutor) -> None:
        super().__init__(lambda path, uid: threads.of(uid))
        self.gate = threading.Event()
        self.gate.set()
        self.after_listing: Callable[[], object] = lambda: None
        self.opening = 0
        self.opened: list[str] = []
        self.most_opening = 0
        self._lock = threading.Lock()

    def tree(self, location: str, access: Access, wanted: Wanted) -> Iterator[Listed]:
        yield from super().tree(location, access, wanted)
        self.after_listing()

    def open(self, location: str, access: Access) -> LocalFile:
        with self._lock:
            self.opened.append(location)
            self.opening += 1
            self.most_opening = max(self.opening, self.most_opening)
        assert self.gate.wait(60)
        try:
            return super().open(location, access)
        finally:
            with self._lock:
                self.opening -= 1


@dataclass
class Bench:
    source: Watched
    threads: FairExecutor
    """Those that open and read files. What they do is waited for at the end."""
    context: FetchContext
    totals: Totals

    def fetch(self, top: Path, *, uid: int = 0, **fields: Any) -> Fetch:
        fields.setdefault("choice", Choice((), ()))
        access = replace(ROOT, uid=uid)
        return Fetch(FetchRequest(str(top), **fields), Client(uid), access, self.context)


@asynccontextmanager
async def running(**changes: Any) -> AsyncIterator[Bench]:
    before = set(open_fds())
    threads, resolvers = FairExecutor(64, "test"), FairExecutor(4, "resolver")
    source = Watched(threads)
    totals = Totals(["file", "s3"])
    context = FetchContext(
        [source], lambda _, uid: resolvers.of(uid), totals, Budget(8 << 20), Quota(4096), Quota(32 << 20)
    )
    context = replace(context, **changes)
    yield Bench(source, threads, context, totals)
    source.gate.set()
    while not (threads.idle and resolvers.idle):  # closed by the threads that come back
        await turns(1)
    await until(lambda: set(open_fds()) <= before | set(list(open_fds())[-1:]))
    await until(
        lambda: (context.descriptors.used, context.buffers.used, context.memory.used_bytes) == (0, 0, 0)
    )
    threads.shutdown()
    resolvers.shutdown()


def told_by(fetch: Fetch) -> list[Any]:
    assert isinstance(fetch.caller, Client)
    return fetch.caller.told


async def run(fetch: Fetch) -> None:
    assert isinstance(fetch.caller, Client)
    await fetch.run(fetch.caller.hear)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    top = tmp_path / "m"
    (top / "deep" / "er").mkdir(parents=True)
    for name, size in {"a": 10, "empty": 0, "deep/b": PART_BYTES, "deep/er/c": 3 * PART_BYTES + 7}.items():
        (top / name).write_bytes(bytes(index % 251 for index in range(size)))
    (top / "model.safetensors").write_bytes(b"weights")
    wait_for_tick(top)
    return top


def contents(told: Sequence[Any]) -> dict[str, bytes]:
    """What the events give, if each file's parts follow each other."""
    files: dict[str, bytes] = {}
    for event in told:
        if isinstance(event, Part) and not event.unchanged:
            assert event.offset == len(files.setdefault(event.listed.name, b""))
            assert list(files)[-1] == event.listed.name
            files[event.listed.name] += event.data
    return files


def on_disk(top: Path) -> dict[str, bytes]:
    paths = [path for path in top.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    return {str(path.relative_to(top)): path.read_bytes() for path in paths}


@on_clock_loop
async def test_every_file_comes_whole_and_in_order(top: Path) -> None:
    async with running() as bench:
        fetch = bench.fetch(top)
        told: list[Any] = told_by(fetch)
        await run(fetch)
        total = sum(map(len, on_disk(top).values()))
        assert told[0] == Plan(fetch.id, 4, total)
        assert isinstance(told[-1], Done)
        assert contents(told) == on_disk(top)
        assert max(len(event.data) for event in told[1:-1]) == PART_BYTES
        assert (fetch.files, fetch.delivered_bytes, fetch.finished) == (4, total, True)
        assert bench.totals.fetched_bytes["file"] == total


@on_clock_loop
async def test_of_what_the_client_has_no_byte_is_read(top: Path) -> None:
    async with running() as bench:
        first = bench.fetch(top)
        await run(first)
        versions = {e.listed.name: e.listed.version for e in told_by(first) if isinstance(e, Part)}
        (top / "a").write_bytes(b"changed")
        bench.source.opened.clear()
        has = frozenset(digest(name, version) for name, version in versions.items())
        second = bench.fetch(top, has=has)
        await run(second)
        told: list[Any] = told_by(second)
        assert contents(told) == {"a": b"changed"}
        assert sorted(e.listed.name for e in told if isinstance(e, Part) and e.unchanged) == [
            "deep/b",
            "deep/er/c",
            "empty",
        ]
        assert bench.source.opened == [str(top / "a")]


@on_clock_loop
async def test_where_lists_tell_no_versions_the_open_files_do(top: Path) -> None:
    class Silent(Watched):
        def tree(self, location: str, access: Access, wanted: Wanted) -> Iterator[Listed]:
            for listed in super().tree(location, access, wanted):
                yield replace(listed, version="")

    async with running() as bench:
        silent = Silent(bench.threads)
        context = replace(bench.context, sources=[silent])
        first, second = Client(), Client()
        await Fetch(FetchRequest(str(top), Choice((), ())), first, ROOT, context).run(first.hear)
        versions = {e.listed.name: e.listed.version for e in first.told if isinstance(e, Part)}
        assert all(versions.values())
        has = frozenset(digest(name, version) for name, version in versions.items() if name != "a")
        await Fetch(FetchRequest(str(top), Choice((), ()), has), second, ROOT, context).run(second.hear)
        assert contents(first.told) == on_disk(top)
        assert contents(second.told) == {"a": (top / "a").read_bytes()}
        unchanged = [e.listed for e in second.told if isinstance(e, Part) and e.unchanged]
        assert {listed.name: listed.version for listed in unchanged} == {
            name: version for name, version in versions.items() if name != "a"
        }
        assert len(unchanged) == 3


@on_clock_loop
async def test_a_list_alone_opens_no_file(top: Path) -> None:
    async with running() as bench:
        fetch = bench.fetch(top, list_only=True, choice=Choice(["*"], ()))
        await run(fetch)
        listed = {e.listed.name: e.listed.size_bytes for e in told_by(fetch) if isinstance(e, Part)}
        assert listed["model.safetensors"] == 7
        assert len(listed) == 5
        assert not bench.source.opened


# ---- changes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "deep/er/c"])
@on_clock_loop
async def test_a_file_that_changes_after_the_list_fails_the_fetch(top: Path, name: str) -> None:
    async with running() as bench:
        path = top / name
        bench.source.after_listing = lambda: path.write_bytes(bytes(path.stat().st_size))
        fetch = bench.fetch(top)
        with pytest.raises(CheckpointChangedError, match=f"/{name} was changed after its directory was"):
            await run(fetch)
        assert not fetch.finished


@pytest.mark.parametrize("change", ["rewritten", "in place"])
@on_clock_loop
async def test_a_file_that_changes_while_it_is_read_fails_before_it_is_whole(top: Path, change: str) -> None:
    path = top / "deep" / "er" / "c"
    path.write_bytes(bytes((PARTS_AT_ONCE + 3) * PART_BYTES))
    wait_for_tick(top)
    async with running() as bench:
        fetch = bench.fetch(top, choice=Choice(["deep/er/*"], ()))
        got = 0

        async def take(event: object) -> None:
            nonlocal got
            if isinstance(event, Part):
                got += len(event.data)
                if change == "rewritten":
                    path.write_bytes(b"x" * path.stat().st_size)
                else:  # where it was read already, so that no later read meets anything odd
                    with path.open("r+b") as file:
                        file.write(b"x")

        with pytest.raises(CheckpointChangedError, match="/c was changed while it was read"):
            await fetch.run(take)
        assert got < path.stat().st_size


@on_clock_loop
async def test_a_file_that_goes_after_the_list_is_named(top: Path) -> None:
    async with running() as bench:
        bench.source.after_listing = lambda: (top / "a").unlink()
        fetch = bench.fetch(top)
        with pytest.raises(Exception, match="/a does not exist"):
            await run(fetch)


# ---- bounds -----------------------------------------------------------------------------------------


@on_clock_loop
async def test_too_many_files_and_too_many_bytes_are_refused_before_any_is_read(top: Path) -> None:
    asked = FetchRequest(str(top), Choice((), ()))
    assert (asked.max_files, asked.max_bytes) == (10_000, 1 << 30)
    async with running() as bench:
        for fields, said in (
            ({"max_files": 3}, "holds more than 3 files that are no weights; .*`max_files`"),
            ({"max_bytes": 2 * PART_BYTES}, "larger than 1.0 MB .'deep/er/c' alone has .*`max_bytes`"),
        ):
            fetch = bench.fetch(top, **fields)
            with pytest.raises(CheckpointInvalidError, match=said):
                await run(fetch)
            assert not told_by(fetch)
        assert not bench.source.opened


@on_clock_loop
async def test_a_list_is_charged_to_its_user(top: Path) -> None:
    async with running(memory=Budget(500 * LISTED_BYTES)) as bench:
        fetch = bench.fetch(top, uid=UID)
        with pytest.raises(CheckpointInvalidError, match=r"more than the .* that one user may have"):
            await run(fetch)


@on_clock_loop
async def test_a_few_files_are_read_at_a_time_and_not_all(tmp_path: Path) -> None:
    for number in range(PARTS_AT_ONCE + 20):
        (tmp_path / f"{number:03}").write_bytes(b"x")
    async with running() as bench:
        bench.source.gate.clear()
        fetch = bench.fetch(tmp_path)
        task = asyncio.ensure_future(run(fetch))
        while bench.source.opening < PARTS_AT_ONCE:
            await turns(1)
        await turns()
        assert bench.source.most_opening == PARTS_AT_ONCE
        bench.source.gate.set()
        await task
        assert len(contents(told_by(fetch))) == PARTS_AT_ONCE + 20
        assert bench.source.most_opening == PARTS_AT_ONCE


@on_clock_loop
async def test_what_is_read_ahead_is_within_the_user_s_share_and_others_go_on_in_small_parts(
    top: Path,
) -> None:
    buffers = Quota(4 * PART_BYTES)
    async with running(buffers=buffers) as bench:
        first = bench.fetch(top, uid=UID)
        stopped = asyncio.Event()

        async def take_nothing(event: object) -> None:
            if isinstance(event, Part):
                stopped.set()
                await asyncio.Event().wait()

        greedy = asyncio.ensure_future(first.run(take_nothing))
        await stopped.wait()
        assert 0 < buffers.used_by(UID) <= buffers.most(UID)
        second = bench.fetch(top, uid=UID)
        await run(second)
        told: list[Any] = told_by(second)
        assert contents(told) == on_disk(top)
        assert SMALL_PART_BYTES in {len(e.data) for e in told if isinstance(e, Part)}
        greedy.cancel()
        with pytest.raises(asyncio.CancelledError):
            await greedy


@on_clock_loop
async def test_files_are_opened_within_the_user_s_share_of_descriptors(top: Path) -> None:
    async with running(descriptors=Quota(4)) as bench:
        fetch = bench.fetch(top, uid=UID)
        await run(fetch)
        assert bench.source.most_opening == 1
    descriptors = Quota(8)
    assert descriptors.take(UID, descriptors.left(UID))
    async with running() as bench:
        fetch = Fetch(
            FetchRequest(str(top), Choice((), ())),
            Client(UID),
            replace(ROOT, uid=UID),
            replace(bench.context, descriptors=descriptors),
        )
        with pytest.raises(TooManyLoadsError, match="descriptors"):
            await run(fetch)


# ---- how it ends ------------------------------------------------------------------------------------


@on_clock_loop
async def test_a_client_that_takes_nothing_is_not_waited_for(top: Path) -> None:
    async with running() as bench:
        fetch = bench.fetch(top)
        stopped = asyncio.Event()

        async def take_nothing(event: object) -> None:
            stopped.set()
            await asyncio.Event().wait()

        task = asyncio.ensure_future(fetch.run(take_nothing))
        await stopped.wait()
        advance(TAKING_SECONDS - 1)
        await turns()
        assert not task.done()
        advance(2)
        with pytest.raises(InvalidRequestError, match=f"took no message for {TAKING_SECONDS:.0f} s"):
            await task


@on_clock_loop
async def test_storage_that_gives_nothing_is_given_up_and_its_file_closed_when_it_comes(top: Path) -> None:
    async with running() as bench:
        bench.source.gate.clear()
        fetch = bench.fetch(top)
        task = asyncio.ensure_future(run(fetch))
        while not bench.source.opening:
            await turns(1)
        advance(bench.source.patience_seconds + 1)
        with pytest.raises(SourceUnavailableError, match="storage gave nothing of a file within 60 s"):
            await task
        assert bench.context.buffers.used > 0, "threads still write there"


@on_clock_loop
async def test_a_client_that_goes_leaves_nothing(top: Path) -> None:
    async with running() as bench:
        bench.source.gate.clear()
        fetch = bench.fetch(top)
        task = asyncio.ensure_future(run(fetch))
        while not bench.source.opening:
            await turns(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@on_clock_loop
async def test_a_list_that_nobody_waits_for_ends_early(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:03}").write_bytes(b"x")
    listed = 0
    first, go_on = threading.Event(), threading.Event()

    class Slow(Watched):
        def tree(self, location: str, access: Access, wanted: Wanted) -> Iterator[Listed]:
            nonlocal listed
            for one in super().tree(location, access, wanted):
                listed += 1
                first.set()
                assert go_on.wait(60)
                yield one

    async with running() as bench:
        slow = Slow(FairExecutor(1, "test"))
        fetch = Fetch(
            FetchRequest(str(tmp_path), Choice((), ())),
            Client(),
            ROOT,
            replace(bench.context, sources=[slow]),
        )
        task = asyncio.ensure_future(run(fetch))
        while not first.is_set():
            await turns(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
    assert listed == 1


@on_clock_loop
async def test_a_list_that_wants_nothing_ends_when_nobody_waits_for_it(tmp_path: Path) -> None:
    """Patterns may cost seconds a name."""
    first = threading.Event()

    class Endless(Watched):
        def tree(self, location: str, access: Access, wanted: Wanted) -> Iterator[Listed]:
            while not wanted("no"):
                first.set()
            yield Listed("no", 0, "")

    async with running() as bench:
        fetch = Fetch(
            FetchRequest(str(tmp_path), Choice((), ("*",))),
            Client(),
            ROOT,
            replace(bench.context, sources=[Endless(FairExecutor(1, "test"))]),
        )
        task = asyncio.ensure_future(run(fetch))
        while not first.is_set():
            await turns(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@on_clock_loop
async def test_names_that_are_looked_at_are_charged_while_they_are_held(tmp_path: Path) -> None:
    """Also those that nobody wants."""
    for number in range(3000):
        (tmp_path / f"{number}.safetensors").touch()
    async with running(memory=Budget(300_000)) as bench:
        with pytest.raises(CheckpointInvalidError, match="that one user may have"):
            await run(bench.fetch(tmp_path, uid=UID))
    async with running(memory=Budget(8 << 20)) as bench:
        await run(bench.fetch(tmp_path, uid=UID))


@on_clock_loop
async def test_patterns_of_clients_are_compared_on_one_thread_that_serves_users_in_turn(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may take milliseconds a name, and dozens of threads list."""
    threads: set[str] = set()
    wanted = Choice.wanted

    def watched(choice: Choice, name: str) -> bool:
        threads.add(threading.current_thread().name.rpartition("-")[0])
        return wanted(choice, name)

    monkeypatch.setattr(Choice, "wanted", watched)
    matcher = FairExecutor(1, "matcher")
    async with running(matcher=matcher) as bench:
        fetch = bench.fetch(top, choice=Choice(("deep/*",), ()))
        await run(fetch)
        assert contents(told_by(fetch)).keys() == {"deep/b", "deep/er/c"}
        assert threads == {"matcher"}
        threads.clear()
        await run(bench.fetch(top))
        assert threads == {"resolver"}
    matcher.shutdown()
