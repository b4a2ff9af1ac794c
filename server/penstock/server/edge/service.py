"""The methods of the gRPC service. Each checks the token, reads its request, and runs it in `loads`.

`requests.py` parses the messages of clients, `events.py` makes those of the daemon, and `fetching.py` does
both for Fetch. `statuses.py` makes the status of a call that fails. No policy is decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn

from penstock.v1 import streamer_pb2 as pb

from ..errors import PenstockError, SessionRequiredError
from ..loads.control import Control
from ..loads.load import Load
from . import events, fetching
from .calls import Call, Context
from .handoff import Session
from .requests import check_sources, complete_names, first_names, read_load, read_prefetch
from .statuses import abort

STATUS_BYTES = 4 << 20
"""The most bytes of an answer of GetStatus. It waits until its user may have as many."""


class StreamerService:
    """Answers for one daemon."""

    def __init__(
        self,
        control: Control,
        session_of: Callable[[str | None], Session],
        tell_status: Callable[[Session], pb.GetStatusResponse],
    ) -> None:
        """`session_of` raises SessionRequiredError for a token that opens no session."""
        self._control = control
        self._session_of = session_of
        self._tell_status = tell_status
        self.methods = {
            "Load": self.load,
            "Prefetch": self.prefetch,
            "Fetch": self.fetch,
            "Evict": self.evict,
            "GetStatus": self.get_status,
        }
        """The handler of each method, whatever kind of call the service declares."""

    async def load(self, call: Call) -> None:
        session = None
        try:
            session = self._session(call)
            if session.loaded:
                raise SessionRequiredError(
                    "this session's token opened a load already; open another connection"
                )
            session.loaded = True
            load = self._control.new_load(await read_load(call), session)
        except PenstockError as error:
            await self._refuse(call, error, session)
        handler = asyncio.current_task()
        assert handler is not None
        wrong: list[PenstockError] = []

        def heard(listening: asyncio.Task[None]) -> None:
            if not listening.cancelled() and (error := listening.exception()) is not None:
                if not isinstance(error, PenstockError):
                    raise error
                wrong.append(error)
                handler.cancel()

        listening = asyncio.create_task(_listen(call, load))
        listening.add_done_callback(heard)
        try:
            await self._control.run(load, lambda event: events.send(call, event))
        except PenstockError as error:
            listening.remove_done_callback(heard)
            await abort(call.context, error, load.id)
        except asyncio.CancelledError:
            if not wrong:
                raise
            self._control.refused(wrong[0], session)
            await abort(call.context, wrong[0], load.id)
        finally:
            listening.remove_done_callback(heard)
            listening.cancel()

    async def prefetch(self, call: Call) -> None:
        session = None
        try:
            session = self._session(call)
            request, pin = await read_prefetch(call)
            prefetch = self._control.new_prefetch(request, session, pin=pin)
        except PenstockError as error:
            await self._refuse(call, error, session)
        call.stream.finish_message()
        try:
            await self._control.run(prefetch, lambda event: events.send_progress(call, event))
        except PenstockError as error:
            await abort(call.context, error, prefetch.id)

    async def fetch(self, call: Call) -> None:
        session = None
        try:
            session = self._session(call)
            request = await fetching.read(call)
            fetch = self._control.new_fetch(request, session, session.gids)
        except PenstockError as error:
            await self._refuse(call, error, session)
        call.stream.finish_message()
        try:
            await self._control.run(fetch, lambda event: fetching.send(call, event))
        except PenstockError as error:
            await abort(call.context, error, fetch.id)

    async def evict(self, call: Call) -> None:
        session = None
        try:
            session = self._session(call)
            message = await call.only(pb.EvictRequest)
            check_sources(message.sources)
            freed, leased = self._control.evict(session, message.sources)
        except PenstockError as error:
            await self._refuse(call, error, session)
        answer = pb.EvictResponse(freed_bytes=freed, leased_bytes=leased)
        await call.send(answer.SerializeToString)

    async def get_status(self, call: Call) -> None:
        try:
            session = self._session(call)
            await call.only(pb.GetStatusRequest)
            await call.send(lambda: self._tell_status(session).SerializeToString(), most_bytes=STATUS_BYTES)
        except PenstockError as error:
            await self._refuse(call, error, None)

    def _session(self, call: Call) -> Session:
        """The caller's session. From now on messages of full size pass the gate."""
        session = self._session_of(_token(call.context))
        call.stream.approve()
        return session

    async def _refuse(self, call: Call, error: PenstockError, session: Session | None) -> NoReturn:
        """Ends a call that began no load, prefetch or fetch."""
        self._control.refused(error, session)
        await abort(call.context, error, "")


async def _listen(call: Call, load: Load) -> None:
    """Passes on the client's messages while its load runs."""
    while True:
        message = await call.next(pb.LoadRequest, seconds=None)
        if message is None:
            return
        kind, names = message.WhichOneof("request"), None
        if kind == "release":
            load.release(message.release.segments)
        elif kind == "select" and load.awaits_choice:
            names = first_names(call, message.select)
        del message  # while waiting: parsed, it may have many times its size
        if names is not None:
            await complete_names(call, names)
            load.choose(names)


def _token(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == "penstock-session":
            return value if isinstance(value, str) else None
    return None
