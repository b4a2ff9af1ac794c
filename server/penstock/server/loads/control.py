"""Who may load, prefetch, pin and evict, and how many loads run at once. Each load is counted, logged, and
ended when its caller goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Protocol

from ..errors import (
    AccessDeniedError,
    PenstockError,
    SessionRequiredError,
    ShuttingDownError,
    TooManyLoadsError,
)
from ..sources import Access
from ..system import failure
from ..system.limits import is_privileged
from ..system.log import event
from ..system.quota import Quota
from ..system.shown import shown_source
from .fetch import Fetch, FetchContext, FetchRequest
from .load import Load
from .prefetch import Prefetch
from .request import Caller, Client, Emit, LoadContext, Request
from .running import Running

logger = logging.getLogger(__name__)


class OnFailed(Protocol):
    """Remembers an answer that is an error, for status."""

    def __call__(
        self, error: PenstockError, *, uid: int, pid: int, load_id: str, sources: tuple[str, ...]
    ) -> None: ...


class Control:
    """Over all loads, prefetches and fetches of a daemon. All on its event loop."""

    def __init__(
        self,
        context: LoadContext,
        fetching: FetchContext,
        *,
        max_loads: int,
        prefixes: tuple[str, ...],
        on_failed: OnFailed,
    ) -> None:
        """Users who are not privileged may load what lies below `prefixes`."""
        self.draining = False
        """No new ones are taken."""
        self._context = context
        self._fetching = fetching
        self._prefixes = prefixes
        self._on_failed = on_failed
        self._running: dict[Running, asyncio.Task[None]] = {}
        self._load_quota = Quota(max_loads)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> Collection[Running]:
        """Those that run or wait. A view, which changes as they come and go."""
        return self._running.keys()

    async def wait_idle(self) -> None:
        """Until none runs, or nobody is to wait any longer for them."""
        await self._idle.wait()

    def stop_waiting(self) -> None:
        self._idle.set()

    def allows(self, uid: int) -> bool:
        """That user may connect: there is something that it may load."""
        return is_privileged(uid) or bool(self._prefixes)

    def new_load(self, request: Request, client: Client) -> Load:
        return Load(request, client, self._access_of(client), self._context)

    def new_prefetch(self, request: Request, client: Client, *, pin: bool) -> Prefetch:
        access = self._access_of(client)
        if pin and not access.privileged:
            raise AccessDeniedError(
                f"uid {client.uid} may prefetch but not pin: that is for root and penstockd's own user; ask "
                "one of them"
            )
        return Prefetch(request, client, access, self._context, pin=pin)

    def new_fetch(self, request: FetchRequest, client: Client, gids: frozenset[int]) -> Fetch:
        """`gids` are the client's groups: of what is no checkpoint it gets only what it may read itself."""
        access = replace(self._access_of(client), for_fetch=True, gids=gids)
        return Fetch(request, client, access, self._fetching)

    def evict(self, client: Client, sources: Sequence[str]) -> tuple[int, int]:
        """Bytes (freed, still leased)."""
        if not is_privileged(client.uid):
            raise AccessDeniedError(
                f"uid {client.uid} may not evict: that is for root and penstockd's own user; ask one of them"
            )
        if sources:
            wanted = self._locations(sources)
            freed, leased = self._context.staging.evict(
                lambda entry: any(self._locations(names) == wanted for names in entry.names)
            )
        else:
            freed, leased = self._context.staging.evict(lambda entry: entry.started and entry.idle)
        event(logger, "evict", {"source": shown_source(sources), "freed": freed, "leased": leased})
        return freed, leased

    def _locations(self, sources: Sequence[str]) -> list[str]:
        """To compare names: a directory is the same with and without a slash at its end."""
        return [self._context.catalog.location(source).rstrip("/") for source in sources]

    def _access_of(self, client: Client) -> Access:
        """What the caller may read. Raises if the daemon takes nothing more."""
        if self.draining:
            raise ShuttingDownError("penstockd is stopping and takes no new loads; try again in a moment")
        if not self._load_quota.left(client.uid):
            raise self._too_many_loads(client.uid)
        return Access(client.uid, is_privileged(client.uid), self._prefixes)

    def _too_many_loads(self, uid: int) -> TooManyLoadsError:
        quota = self._load_quota
        return TooManyLoadsError(
            f"{quota.used} loads run or wait already, {quota.used_by(uid)} of them of uid {uid}; this "
            f"user may have no more of the {quota.total}; try again later, or raise --max-loads"
        )

    async def run(self, load: Running, emit: Emit) -> None:
        """Runs it, counts it, logs it; ends it when the caller's connection closes. Raises PenstockError for
        all that goes wrong in it."""
        task = asyncio.current_task()
        assert task is not None
        if not self._load_quota.take(load.caller.uid):
            raise self._too_many_loads(load.caller.uid)
        self._running[load] = task
        self._idle.clear()
        event(logger, "opened", load.first_line())

        def caller_gone() -> None:
            if not load.finished:
                task.cancel()

        unsubscribe = load.caller.on_close(caller_gone)
        outcome = result = "cancelled"
        try:
            await load.run(emit)
            outcome = result = "ok"
        except asyncio.CancelledError:
            # gRPC sends no status for a call that is cancelled here: the client would wait for ever.
            if load.caller.closed and self.draining:
                raise ShuttingDownError(
                    "penstockd stops, and this load was cut off; try again in a moment"
                ) from None
            if load.caller.closed:
                raise SessionRequiredError("the load's handoff connection was closed; keep it open") from None
            raise
        except Exception as caught:
            error = failure.explain(caught, f"{load.kind} {load.id}")
            outcome, result = error.reason, "failed"
            self.refused(error, load.caller, load.id, load.request.sources)
            try:
                raise error from None
            finally:
                del error  # or it and this frame would keep each other, and a header, until gc comes
        finally:
            unsubscribe()
            del self._running[load]
            self._load_quota.release(load.caller.uid)
            if not self._running:
                self._idle.set()
            load.count(result)
            level = logging.WARNING if result == "failed" else logging.INFO
            event(logger, load.kind, {"result": outcome, **load.log_line()}, level=level)

    def refused(
        self, error: PenstockError, caller: Caller | None, load_id: str = "", sources: Sequence[str] = ()
    ) -> None:
        """Counts an answer that is an error, and remembers it if it is known whose it is."""
        self._context.totals.rejected[error.reason] += 1
        if caller is not None:
            self._on_failed(error, uid=caller.uid, pid=caller.pid, load_id=load_id, sources=tuple(sources))
