"""The staging buffer against a model of its clients: any order of what they, operators and storage do.

Real slabs, real files, the real reader threads; time passes only when a rule says so. What a rule draws never
depends on how far the threads came, so that a failure can be replayed and made smaller. After most rules
everything comes to rest (`_settle`); then whoever still waits must have a reason to.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from penstock.server.checkpoint.files import Checkpoint
from penstock.server.errors import (
    CheckpointChangedError,
    MemoryLimitTooSmallError,
    PenstockError,
    SourceUnavailableError,
    StagingExhaustedError,
)
from penstock.server.staging.entry import CacheEntry
from penstock.server.staging.sharing import Group
from penstock.server.system.limits import is_privileged

from ..bench import GROUP, Visit, running
from ..support import MIB, SLAB_BYTES, advance, clock_loop, header_json

_T = TypeVar("_T")

SLABS = 5
KIB = 1 << 10
CHECKPOINTS = {
    "small": {"small": [400 * KIB, 0, 300 * KIB + 1]},
    "pair": {"left": [700 * KIB, 900 * KIB], "right": [500 * KIB] * 3},
    "four": {"four": [650 * KIB + 7] * 11},
    "large": {"head": [800 * KIB, 2600 * KIB, 1, 900 * KIB], "tail": [700 * KIB] * 9},
}
"""Tensor sizes by file: of 1, 2, 4 and more slabs than there are."""
RESUMED = Group(GROUP.name, GROUP.size, window="before", released_tensors=1, members=2)
"""The group after a restart; its members had got one tensor or more."""
uids = st.sampled_from([0, 1, 2])
NOISE = memoryview(random.Random(0).randbytes(16 * MIB))
names_of_checkpoints = st.sampled_from(sorted(CHECKPOINTS))


@dataclass(eq=False)
class Client:
    """One load, as it knows itself."""

    visit: Visit
    checkpoint: str
    kind: str
    uid: int
    since: float
    read: int = 0
    """Slices whose bytes were right."""
    released: int = 0
    may_fail: set[type[PenstockError]] = field(default_factory=set)
    error: PenstockError | None = None
    task: asyncio.Task[None] | None = None

    @property
    def prefetch(self) -> bool:
        return self.kind == "prefetch"

    @property
    def entry(self) -> CacheEntry:
        return self.visit.entry

    async def go_on(self, count: int, *, release: bool) -> None:
        """Reads that many slices more. Waits for them as a client does."""
        try:
            await self.entry.wait_started()
            end = min(self.read + count, len(self.entry.contents.slices(*self.visit.slices_of)))
            while self.read < end:
                await self.visit.read(self.read + 1, begin=self.read, release=release)
                self.read += 1
                self.released = self.read if release else self.released
        except PenstockError as error:
            self.error = error

    async def look_again(self) -> None:
        """What it has not released is still there."""
        if self.entry.started:
            begin = 0 if self.entry.full else self.released
            await asyncio.wait_for(self.visit.read(self.read, begin=begin, release=False), 10)

    def waits_for(self) -> str:
        """Empty: its next slice is there, or it has all."""
        ring = self.entry.ring
        assert ring is not None
        slices = self.entry.contents.slices(*self.visit.slices_of)
        return ring.waits_for(self.visit, slices[self.read].segment) if self.read < len(slices) else ""


def line_of(client: Client) -> int:
    """The user in whose line its checkpoint waits."""
    return client.uid if client.entry.owner_uid is None else client.entry.owner_uid


class StagingMachine(RuleBasedStateMachine):
    """Knows who came in which order, what each has read and released, which files changed, what is pinned."""

    clients = Bundle("clients")

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.loop = self.stack.enter_context(clock_loop())
        self.directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.all: list[Client] = []
        self.queue: list[Client] = []
        """The first of each checkpoint that waits for slabs, in the order in which they came."""
        self.overtaken: dict[Client, Counter[int]] = {}
        """By whose loads, since the time stood still, each that is the first of its user."""
        self.pinned: list[CacheEntry] = []
        self.uid_of_slab: dict[int, int] = {}
        self.broken: list[CacheEntry] = []
        """Whose storage fails, also for those who join later."""
        self.written: set[str] = set()
        self.writes = 0
        self.stands_still = False

    def run(self, what: Coroutine[Any, Any, _T]) -> _T:
        return self.loop.run_until_complete(what)

    @initialize(keeps_warm=st.sampled_from([True, True, True, False]))
    def make(self, keeps_warm: bool) -> None:
        self.bench_stack = AsyncExitStack()
        limit = SLABS * SLAB_BYTES if keeps_warm else 0
        opening = self.bench_stack.enter_async_context(
            running(memory_limit=limit, capacity_bytes=SLABS * SLAB_BYTES)
        )
        self.bench = self.run(opening)

    # ---- clients --------------------------------------------------------------------------------

    @rule(
        target=clients,
        checkpoint=names_of_checkpoints,
        uid=uids,
        kind=st.sampled_from(["load", "load", "prefetch", "window", "part", "group", "resumed"]),
        settle=st.booleans(),
    )
    def enter(self, checkpoint: str, uid: int, kind: str, settle: bool) -> Client | MultipleResults[Client]:
        alone = not self.all and not self.pinned and not self._reading() and not self._stuck_bytes()
        client = self.run(self._enter(checkpoint, uid, kind))
        if client is None:
            return multiple()
        if settle:
            self.run(self._settle())
            assert client.entry.started or not alone, "an idle system lets a load wait"
        return client

    @rule(target=clients, like=clients)
    def enter_again(self, like: Client) -> Client | MultipleResults[Client]:
        return self.enter(like.checkpoint, like.uid, like.kind, True)

    @rule(checkpoint=names_of_checkpoints, uid=uids)
    def come_and_go(self, checkpoint: str, uid: int) -> None:
        """Reads what it gets without waiting for anybody."""
        client = self.enter(checkpoint, uid, "load", True)
        if isinstance(client, Client):
            self.go_on(client, 99, True)
            self.leave(client, True)

    async def _enter(self, checkpoint: str, uid: int, kind: str) -> Client | None:
        files = CHECKPOINTS[checkpoint]
        if checkpoint not in self.written:
            self._write(checkpoint)
        uid = 0 if kind == "prefetch" else uid
        known = set(self.bench.staging.entries)
        try:
            visit = self.bench.enter(
                *(self._path(file) for file in files),
                uid=uid,
                memory_limit=2 * SLAB_BYTES if kind in ("window", "group", "resumed") else None,
                names=[f"{file}0" for file in files] if kind == "part" else None,
                group={"group": GROUP, "resumed": RESUMED}.get(kind),
                skip=len(self.all) % 3 + 1 if kind == "resumed" else 0,
                prefetch=kind == "prefetch",
                gated=True,
            )
        except MemoryLimitTooSmallError:
            return None
        if visit.slices_of[1].tensor_count:  # else any entry has all of it, and no old one is looked for
            self._unpin_old_versions(visit.slices_of[0])
        if not self.stands_still:
            visit.open_gates()
        client = Client(visit, checkpoint, kind, uid, self.loop.time())
        assert client.entry.error is None, "joined one that had failed"
        if client.entry.id not in known:
            self.queue.append(client)
        self.all.append(client)
        return client

    def _unpin_old_versions(self, found: Checkpoint) -> None:
        versions = {file.uri: file.version for file in found.files}
        for entry in list(self.pinned):
            if any(versions.get(file.uri, file.version) != file.version for file in entry.checkpoint.files):
                self.pinned.remove(entry)
                assert not entry.pinned
                assert entry.closed or entry.holders, "memory is kept for what cannot be loaded again"

    @rule(client=clients, count=st.sampled_from([1, 2, 99]), release=st.booleans())
    def go_on(self, client: Client, count: int, release: bool) -> None:
        if client.error is None and (client.task is None or client.task.done()):
            client.task = self.loop.create_task(client.go_on(count, release=release))
        self.run(self._settle())

    @rule(client=consumes(clients), settle=st.booleans())
    def leave(self, client: Client, settle: bool) -> None:
        self.run(self._leave(client))
        if settle:
            self.run(self._settle())

    async def _leave(self, client: Client) -> None:
        if client.task is not None:
            client.task.cancel()
            await asyncio.wait([client.task])
        await client.look_again()
        self.all.remove(client)
        client.visit.leave()

    # ---- operators ------------------------------------------------------------------------------

    @rule(checkpoint=names_of_checkpoints)
    def pin(self, checkpoint: str) -> None:
        """A prefetch, if it gets its memory now."""
        prefetch = self.enter(checkpoint, 0, "prefetch", True)
        if isinstance(prefetch, Client):
            entry = prefetch.entry
            if entry.full and entry.complete:
                entry.pin(entry.names[0])
                self.pinned = [*(other for other in self.pinned if other is not entry), entry]
            self.leave(prefetch, True)

    @rule(checkpoint=names_of_checkpoints)
    def evict(self, checkpoint: str) -> None:
        """Unpins too."""
        paths = {str(self._path(file)) for file in CHECKPOINTS[checkpoint]}

        def matches(entry: CacheEntry) -> bool:
            return paths == {file.uri for file in entry.checkpoint.files}

        async def evict() -> None:
            self.bench.staging.evict(matches)
            await self._settle()

        self.pinned = [entry for entry in self.pinned if not matches(entry)]
        self.run(evict())
        for entry in self.bench.staging.entries.values():
            assert not (matches(entry) and entry.started and entry.idle)

    # ---- storage and time -----------------------------------------------------------------------

    @rule(client=clients, in_place=st.booleans())
    def overwrite(self, client: Client, in_place: bool) -> None:
        self._write(client.checkpoint, in_place=in_place)
        for other in self.all:
            if in_place and other.checkpoint == client.checkpoint:
                other.may_fail.add(CheckpointChangedError)

    @rule(client=clients)
    def fail_reads(self, client: Client) -> None:
        for file in client.entry.checkpoint.files:
            file.error = SourceUnavailableError("storage went away")  # type: ignore[attr-defined]
        self.broken.append(client.entry)

    @rule(still=st.booleans())
    def stand_still(self, still: bool) -> None:
        """Reads wait, or go on."""
        self.stands_still = still
        for file in self.bench.gates:
            (file.gate.clear if still else file.gate.set)()
        self.run(self._settle())

    @rule(seconds=st.sampled_from([2.1, 61, 601]))
    def time_passes(self, seconds: float) -> None:
        async def pass_time() -> None:
            self.overtaken.clear()  # turns are given away as time passes
            advance(seconds)
            await self._settle()

        self.run(pass_time())

    # ---- what must always hold ------------------------------------------------------------------

    @precondition(lambda self: hasattr(self, "bench"))
    @invariant()
    def memory_is_where_it_should_be(self) -> None:
        self.bench.assert_within_the_limit()
        slabs = [slab.fd for entry in self.bench.staging.entries.values() for slab in entry.slabs]
        assert len(slabs) == len(set(slabs)), "a slab is given twice"
        pool = self.bench.staging.pool
        assert len(slabs) <= pool.max_slabs - pool.available

    @precondition(lambda self: hasattr(self, "bench"))
    @invariant()
    def slabs_go_to_one_user_only(self) -> None:
        for client in self.all:
            for slab in [] if client.prefetch else client.entry.slabs:
                assert slab.owner_uid == client.uid
                assert self.uid_of_slab.setdefault(os.fstat(slab.fd).st_ino, client.uid) == client.uid

    @precondition(lambda self: hasattr(self, "bench"))
    @invariant()
    def what_is_pinned_stays(self) -> None:
        """Until it is evicted, or found changed."""
        for entry in self.pinned:
            assert self.bench.staging.entries.get(entry.id) is entry
            assert entry.pinned
            assert entry.complete
            assert not entry.closed

    @precondition(lambda self: hasattr(self, "bench"))
    @invariant()
    def errors_have_a_cause(self) -> None:
        timeout = self.bench.config.queue_timeout_seconds
        for client in self.all:
            if isinstance(client.error, StagingExhaustedError):
                assert any(self.loop.time() - other.since >= timeout for other in self._sharing(client))
            elif isinstance(client.error, SourceUnavailableError):
                assert client.entry in self.broken
            elif client.error is not None:
                assert type(client.error) in client.may_fail

    def teardown(self) -> None:
        """Everybody goes; one more gets all it wants; nothing is left."""
        failed = sys.exc_info()
        try:
            if failed[0] is None and hasattr(self, "bench"):
                self.stand_still(False)
                for client in list(self.all):
                    self.run(self._leave(client))
                self.run(self._settle())
                for checkpoint in CHECKPOINTS:
                    self.evict(checkpoint)
                self._last_load()
        except BaseException:
            failed = sys.exc_info()
            raise
        finally:
            if hasattr(self, "bench"):
                self.run(self.bench_stack.__aexit__(*failed))
            self.stack.__exit__(*failed)

    def _last_load(self) -> None:
        client = self.run(self._enter("pair", 3, "load"))
        assert client is not None
        self.run(asyncio.wait_for(client.go_on(99, release=True), 60))
        assert client.error is None
        self.run(self._leave(client))

    # ---- inside ---------------------------------------------------------------------------------

    def _path(self, file: str) -> Path:
        return self.directory / f"{file}.safetensors"

    def _write(self, checkpoint: str, *, in_place: bool = False) -> None:
        self.written.add(checkpoint)
        for file, sizes in CHECKPOINTS[checkpoint].items():
            self.writes += 1
            path = self._path(file)
            to = path if in_place else path.with_suffix(".new")
            with to.open("r+b" if in_place else "wb") as out:
                header = header_json(sizes, prefix=file)
                begin = self.writes * 40_009 % (len(NOISE) - sum(sizes))
                out.write(len(header).to_bytes(8, "little") + header)
                out.write(NOISE[begin : begin + sum(sizes)])
            os.utime(to, ns=(self.writes, self.writes))  # two writes may lie in one tick of the file system
            to.rename(path)

    def _reading(self) -> list[CacheEntry]:
        return [entry for entry in self.bench.staging.entries.values() if entry.reading]

    def _stuck_bytes(self) -> int:
        """Of what was evicted while it was read: they come back when these reads end."""
        return self.bench.staging.usage().stuck_bytes

    def _sharing(self, client: Client) -> Sequence[Client]:
        return [other for other in self.all if other.entry is client.entry]

    def _at_rest(self) -> bool:
        """Only clients wait for something, and reads for storage that stands still."""
        waiting = {client.task for client in self.all} | {asyncio.current_task()}
        if asyncio.all_tasks() - waiting:
            return False
        if self.stands_still and self.bench.readers.busy:
            return True
        return not self._reading() and not self._stuck_bytes()

    async def _settle(self) -> None:
        calm = 0
        while calm < 20:
            calm = calm + 1 if self._at_rest() else 0
            await (asyncio.sleep(0) if calm else self.loop.look_again())
        self._assert_served_in_order()
        if not self.stands_still:
            self._assert_the_first_waits_for_memory()
            for client in self.all:
                self._assert_waits_with_a_reason(client)

    def _assert_served_in_order(self) -> None:
        """First in, first out for each user, but a prefetch is no use as a window. Users in turn: the first
        of one user is overtaken once at most by each of the others, unless it gave its turn away."""
        staging = self.bench.staging
        queue = [queued for queued in self.queue if not queued.entry.closed and queued.entry.error is None]
        self.queue = [queued for queued in queue if not queued.entry.started]
        places = {queued: staging.place(queued.entry) for queued in self.queue}
        assert sorted(places.values()) == list(range(1, self.bench.queued + 1))
        started = [queued for queued in queue if queued.entry.started]
        firsts: dict[int, Client] = {}
        for queued in self.queue:
            first = firsts.setdefault(line_of(queued), queued)
            assert places[first] <= places[queued], "told a later place than one that came later"
            if is_privileged(line_of(queued)) and not queued.prefetch:
                later = queue[queue.index(queued) :]
                own = [other for other in later if line_of(other) == line_of(queued)]
                assert not any(other.entry.started for other in own), "overtaken by its own user's"
        self.overtaken = {first: self.overtaken.get(first, Counter()) for first in firsts.values()}
        for first, by in self.overtaken.items():
            by.update(line_of(other) for other in started if line_of(other) != line_of(first))
            if is_privileged(line_of(first)) and not first.prefetch:
                assert all(count <= 1 for count in by.values()), "overtaken more than once"

    def _assert_the_first_waits_for_memory(self) -> None:
        staging = self.bench.staging
        first = next((queued for queued in self.queue if staging.place(queued.entry) == 1), None)
        if first is None or not is_privileged(line_of(first)):
            return
        demand = first.visit.demand
        idle = [entry for entry in staging.entries.values() if entry.state == "warm" and entry.idle]
        warm = sum(len(entry.slabs) for entry in idle if not entry.pinned)
        assert staging.pool.available + warm < (demand.whole or demand.window), "memory lies idle"

    def _assert_waits_with_a_reason(self, client: Client) -> None:
        if client.task is None or client.task.done():
            return
        if not client.entry.started:
            assert self.bench.staging.place(client.entry) > 0
            return
        assert client.entry.error is None, "not told that it failed"
        reason = client.waits_for()
        assert reason, "what it waits for is there"
        assert reason != "storage", "nobody reads what it waits for"


TestStaging = pytest.mark.timeout(360)(StagingMachine.TestCase)  # to make a failure small takes minutes
TestStaging.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=40, stateful_step_count=50
)
