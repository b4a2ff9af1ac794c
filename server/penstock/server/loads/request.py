"""What a load or a prefetch is given, who asks, what it works with; and the first events that it tells."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..checkpoint.catalog import Catalog
from ..checkpoint.plan import Indices
from ..checkpoint.table import TensorTable
from ..sources.verification import AUTO
from ..staging.buffer import StagingBuffer
from ..staging.sharing import Group
from ..system.counts import Totals
from ..system.fair import FairExecutor
from .names import Names

Emit = Callable[[Any], Awaitable[None]]
"""Passes an event on to the client."""


class Caller(Protocol):
    """Who asks, and how to learn that it is gone: a client, or the daemon itself."""

    uid: int
    pid: int
    closed: bool

    def on_close(self, release: Callable[[], None]) -> Callable[[], object]:
        """Calls `release` when it goes away, unless what this returns was called before."""


class Client(Caller, Protocol):
    """A caller that slabs can be handed to."""

    async def send_slabs(self, fds: Sequence[int]) -> None:
        """Hands out descriptors; the caller keeps its own. Raises SessionRequiredError if it is gone."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the client asked for."""

    sources: tuple[str, ...]
    names: Names | Sequence[str] | None = None
    list_tensors: bool = False
    memory_limit: int | None = None
    group: Group | None = None
    skip_tensors: int = 0
    expect_version: str = ""
    client_name: str = ""
    variant: str = ""
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
    """What every load of the daemon works with. The executors serve users in turn."""

    catalog: Catalog
    staging: StagingBuffer
    totals: Totals
    resolvers: Callable[[Sequence[str], int], Executor]
    """What resolves certain sources for a uid, where it may hang with their storage."""
    cpu_pool: FairExecutor
    """Runs what only takes long."""
    selector: FairExecutor
    """Looks up names, for one request at a time: they take many times their space meanwhile."""
    verify: str = AUTO
    """off, auto or require."""
