"""One fetch: the files beside the weights, from the list of a directory to the last byte.

    list (as a whole, so that bounds hold before a byte is sent) -> plan -> each file in turn, read ahead

Every file is sent in the version that was listed, or the fetch fails. So a complete copy has the contents
that the directory had at one moment, if the storage's own list has those. Nothing goes through the staging
buffer, and nothing is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from ..checkpoint.headers.budget import Budget, Charge
from ..config.units import show_size
from ..errors import CheckpointInvalidError, InvalidRequestError
from ..sources import Access, Listed, Source, choose
from ..sources.looking import ListingCost
from ..sources.stores import kind_of
from ..system.counts import Totals
from ..system.fair import FairExecutor
from ..system.quota import Quota
from ..system.shown import shown_source
from .choice import Choice, check_name, check_together
from .readahead import Part, ReadAhead
from .request import Caller, Emit

MAX_FILES = 10_000
MAX_BYTES = 1 << 30
"""The bounds of a fetch, unless the client asks for more."""
BUFFER_BYTES = 32 << 20
"""Of all fetches together: bytes that are read and not yet sent."""
TAKING_SECONDS = 60.0
"""In so many seconds a client must take one message, and write it to its disk. Meanwhile it holds buffers and
files."""
LISTED_BYTES = 320
"""Memory of a listed file, besides the bytes of its name and its version."""
_CHARGE_FILES = 500
"""How many listed files are charged at once."""


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """The client's request. `has` are the digests (`digest`) of the files that the client has."""

    source: str
    choice: Choice
    has: frozenset[bytes] = frozenset()
    max_bytes: int = MAX_BYTES
    max_files: int = MAX_FILES
    list_only: bool = False
    client_name: str = ""

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True, slots=True)
class FetchContext:
    """What all fetches of the daemon share. `resolvers` are as for a load."""

    sources: Sequence[Source]
    resolvers: Callable[[Sequence[str], int], Executor]
    totals: Totals
    memory: Budget
    """The budget for lists."""
    descriptors: Quota
    buffers: Quota
    matcher: FairExecutor | None = None
    """The thread that compares names with the patterns of clients, which may take milliseconds a name: on the
    threads that list, dozens of which would keep the interpreter from all others."""


@dataclass(frozen=True, slots=True)
class Plan:
    load_id: str
    files: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Done:
    """All files were sent."""


Event = Plan | Part | Done


def digest(name: str, version: str) -> bytes:
    """A short stand-in for a version of a file, since clients may send long ones."""
    return hashlib.blake2b(f"{name}\0{version}".encode(errors="surrogatepass"), digest_size=16).digest()


class Fetch:
    """One client's copy of a directory. Call `run` once; see `running.Running`."""

    kind = "fetch"
    entry = None
    waited_seconds = queued_since = 0.0

    def __init__(self, request: FetchRequest, caller: Caller, access: Access, context: FetchContext) -> None:
        self.id = secrets.token_hex(4)
        self.request = request
        self.caller = caller
        self.state = "resolving"
        self.delivered_bytes = 0
        self.memory_bytes = self.tier_bytes = 0
        self.total_bytes = 0
        self.files = 0
        self.began = asyncio.get_running_loop().time()
        self.finished = False
        self._access = replace(access, listing=ListingCost())
        self._context = context

    @property
    def source(self) -> str:
        """The kind of the store that it reads from."""
        return kind_of(self.request.source)

    @property
    def waits_for(self) -> str:
        return "storage" if self.state == "resolving" else ""

    async def run(self, emit: Emit) -> None:
        """Raises PenstockError, and CancelledError when the caller goes away."""
        source = choose(self._context.sources, self.request.source)
        top = source.location(self.request.source)
        files, charge = await self._list(source, top)
        try:
            self.total_bytes = sum(listed.size_bytes for listed in files)
            self.state = "streaming"
            await self._tell(emit, Plan(self.id, len(files), self.total_bytes))
            async with contextlib.aclosing(self._parts(source, top, files)) as parts:
                async for part in parts:
                    await self._tell(emit, part)
                    self._count_part(part)
            self.finished = True
            await self._tell(emit, Done())
        finally:
            charge.resize(0)

    async def _list(self, source: Source, top: str) -> tuple[list[Listed], Charge]:
        """Lists on a thread of the store's. The charge is for the list."""
        resolvers = self._context.resolvers(self.request.sources, self.caller.uid)
        try:
            return await asyncio.wrap_future(resolvers.submit(self._list_now, source, top))
        finally:
            self._access.listing.stop()  # else the thread would go on for nobody

    def _list_now(self, source: Source, top: str) -> tuple[list[Listed], Charge]:
        """Raises CheckpointInvalidError for more files or bytes than the client asked for."""
        names = self._context.memory.charge(self.caller.uid)
        access = replace(self._access, listing=self._access.listing.charged(names.resize))
        try:
            return self._list_with(source, top, access)
        finally:
            access.listing.release()

    def _list_with(self, source: Source, top: str, access: Access) -> tuple[list[Listed], Charge]:
        request, charge = self.request, self._context.memory.charge(self.caller.uid)
        files: list[Listed] = []
        total_bytes = listed_bytes = 0
        for listed in source.tree(top, access, self._wanted):
            check_name(top, listed.name)
            files.append(listed)
            total_bytes += listed.size_bytes
            listed_bytes += LISTED_BYTES + len(listed.name) + len(listed.version)
            if len(files) % _CHARGE_FILES == 1:
                charge.resize(listed_bytes + _CHARGE_FILES * LISTED_BYTES)
            if len(files) > request.max_files:
                raise CheckpointInvalidError(
                    f"{top} holds more than {request.max_files} files that are no weights; name a directory "
                    "below it, choose by `allow` and `ignore`, or raise `max_files`",
                    file=top,
                )
            if total_bytes > request.max_bytes:
                largest = max(files, key=lambda listed: listed.size_bytes)
                raise CheckpointInvalidError(
                    f"{top}: what is to be fetched of it is larger than {show_size(request.max_bytes)} "
                    f"({largest.name[:200]!r} alone has {show_size(largest.size_bytes)}); leave files out by "
                    "`ignore`, or raise `max_bytes`",
                    file=top,
                )
        charge.resize(listed_bytes)
        check_together(top, (listed.name for listed in files))
        return files, charge

    async def _parts(self, source: Source, top: str, files: Sequence[Listed]) -> AsyncGenerator[Part, None]:
        if self.request.list_only:
            for listed in files:
                yield Part(listed, 0, b"", unchanged=True)
            return
        ahead = ReadAhead(
            source,
            top,
            self._access,
            buffers=self._context.buffers,
            descriptors=self._context.descriptors,
            has=self._has,
        )
        async with contextlib.aclosing(ahead.parts(files)) as parts:
            async for part in parts:
                yield part

    def _wanted(self, name: str) -> bool:
        """As `sources.Wanted`. Asked of every name, so a fetch that nobody waits for ends here."""
        self._access.listing.look(self.request.source, 0)
        choice, matcher = self.request.choice, self._context.matcher
        if matcher is None or not choice.is_own:
            return choice.wanted(name)
        return matcher.submit(self.caller.uid, choice.wanted, name).result()

    def _has(self, name: str, version: str) -> bool:
        return bool(self.request.has) and digest(name, version) in self.request.has

    async def _tell(self, emit: Emit, event: Event) -> None:
        """Sends an event. Raises InvalidRequestError if the client does not take it in time."""
        telling = asyncio.current_task()
        assert telling is not None
        late = False

        def interrupt() -> None:
            nonlocal late
            late = True
            telling.cancel()

        timer = asyncio.get_running_loop().call_later(TAKING_SECONDS, interrupt)
        try:
            await emit(event)
        except asyncio.CancelledError:
            if late and not self.caller.closed:
                raise InvalidRequestError(
                    f"fetch: the client took no message for {TAKING_SECONDS:.0f} s; check the disk that it "
                    "writes to, and fetch again"
                ) from None
            raise
        finally:
            timer.cancel()

    def _count_part(self, part: Part) -> None:
        totals = self._context.totals
        self.delivered_bytes += len(part.data)
        totals.fetched_bytes[self.source] += len(part.data)
        if part.unchanged or part.offset + len(part.data) == part.listed.size_bytes:
            self.files += 1

    def count(self, result: str) -> None:
        self._context.totals.fetches[self.source, result] += 1

    def first_line(self) -> dict[str, object]:
        return {
            "load": self.id,
            "kind": self.kind,
            "source": shown_source(self.request.sources),
            "uid": self.caller.uid,
            "pid": self.caller.pid,
            "client": self.request.client_name,
        }

    def log_line(self) -> dict[str, object]:
        return {
            "load": self.id,
            "source": shown_source(self.request.sources),
            "uid": self.caller.uid,
            "pid": self.caller.pid,
            "files": self.files,
            "bytes": self.delivered_bytes,
            "size": show_size(self.delivered_bytes),
            "seconds": round(asyncio.get_running_loop().time() - self.began, 4),
        }
