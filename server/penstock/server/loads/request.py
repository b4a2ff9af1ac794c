"""The request and the surroundings of a load or a prefetch, and its first events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..checkpoint.catalog import Catalog
from ..checkpoint.headers.table import TensorTable
from ..checkpoint.selection import Indices
from ..errors import CheckpointCorruptError, PenstockError
from ..sources.verification import AUTO
from ..staging.buffer import StagingBuffer
from ..staging.sharing import Group
from ..system.counts import Totals
from ..system.fair import FairExecutor
from .names import Names

Emit = Callable[[Any], Awaitable[None]]
"""Sends an event to the client."""


class Caller(Protocol):
    """The one that asks, a client or the daemon itself; it can report that it is gone."""

    uid: int
    pid: int
    closed: bool

    def on_close(self, release: Callable[[], None]) -> Callable[[], object]:
        """Calls `release` when the caller goes away, unless the returned function was called before."""


class Client(Caller, Protocol):
    """A caller that can receive slabs."""

    async def send_slabs(self, fds: Sequence[int]) -> None:
        """Sends descriptors; the sender keeps its own. Raises SessionRequiredError if the client is gone."""

    def send_failure(self, error: PenstockError, load_id: str) -> None:
        """Tells it at once that bytes of its load that were announced are wrong. Does not wait."""


@dataclass(frozen=True, slots=True)
class Request:
    """The client's request."""

    sources: tuple[str, ...]
    names: Names | Sequence[str] | None = None
    list_tensors: bool = False
    memory_limit: int | None = None
    group: Group | None = None
    skip_tensors: int = 0
    expect_version: str = ""
    client_name: str = ""
    variant: str = ""
    patterns: tuple[str, ...] = ()
    """Instead of names: a tensor's name has to match one of them. Only from the daemon itself."""
    verify: str = ""
    """off, auto, require, or empty for the daemon's."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 by the name or URI of a file."""


@dataclass(frozen=True, slots=True)
class Queued:
    load_id: str
    place: int
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    tables: tuple[TensorTable, ...]
    delivered: tuple[Indices, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadContext:
    """What all loads of the daemon share. The executors serve users in turn."""

    catalog: Catalog
    staging: StagingBuffer
    totals: Totals
    resolvers: Callable[[Sequence[str], int], Executor]
    """Executors that resolve certain sources for a uid. They may hang with their storage."""
    cpu_pool: FairExecutor
    """Runs work that only takes long."""
    selector: FairExecutor
    """Looks up names, for one request at a time: this takes many times the memory of the names."""
    verify: str = AUTO
    """off, auto or require."""
    on_corrupt: Callable[[CheckpointCorruptError], object] = lambda error: None
    """Has everything forgotten that is known of a file whose bytes turned out to be wrong."""
