"""One connection through the gate, in both directions.

    client -> ClientEnd -> Passage: frames that the filter lets pass -> gRPC
    client <- Passage: looks which streams end <- ServerEnd <- gRPC

The client's bytes are held until a frame is complete. They are held longer if the filter says that the frame
has to wait (`frame_filter.py`), or if gRPC reads nothing. The connection is not read meanwhile. So at most
`MAX_BUFFERED_BYTES` and a frame are held, and they are charged to the user."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING

from ..system.quota import Quota
from . import frames
from .allowance import Allowance
from .ends import ClientEnd, ServerEnd
from .frame_filter import STREAM, TURN, WORK, FrameFilter, Violation
from .streams import RequestStream

if TYPE_CHECKING:
    from .gate import Gate

logger = logging.getLogger(__name__)

MAX_BUFFERED_BYTES = 16 << 10
"""Bytes of one read, in either direction. While so many wait to be passed on, the client's end is not
read."""
WIDE_BYTES = 64 << 10
"""Bytes of one read of gRPC's answers to calls with a token, on few connections (`gate.WIDE_CONNECTIONS`).
The descriptions of 100,000 tensors are 11 MB: in pieces of 16 KiB they cost a tenth more of the daemon's CPU
time."""
_GRPC = "grpc"
"""Beside the reasons of the filter: the client waits for gRPC to read."""


class Passage:
    """A connection of a client, and its connection to gRPC. Made by the gate, which has charged the cost of
    both. `gate.gone` is called at the end."""

    def __init__(self, gate: Gate, uid: int, memory: Quota, work: Allowance) -> None:
        self.uid = uid
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._gate = gate
        self._memory = memory
        self._filter = FrameFilter(uid, memory, work, loop.time())
        self._client: asyncio.Transport | None = None
        self._server: asyncio.Transport | None = None
        self._ended_streams = frames.EndedStreams()
        self._waits_for: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._processing = False
        self._trusted = False
        """A call on this connection had a valid token."""
        self.wide = False
        """The connection may read `WIDE_BYTES` of answers at once."""
        self._since = loop.time()
        """When the connection was made, or when its last call ended."""
        self._early = b""
        """Bytes that gRPC sent before the client's end was made."""
        self._client_lost = False
        self._server_lost = True
        self._ending = self._gone = False
        self._reason = ""

    async def run(self, connection: socket.socket, inner: str) -> None:
        """Connects the two ends. Takes `connection`."""
        try:
            await self._loop.create_unix_connection(lambda: ServerEnd(self), inner)
            await self._loop.connect_accepted_socket(lambda: ClientEnd(self), connection)
        except OSError as error:
            logger.warning("a connection could not be passed on to gRPC: %s", error)
        finally:
            if self._client is None:
                connection.close()
                self._client_lost = True
                self.abort()
                self._lost()

    # ---- for the gate ---------------------------------------------------------------------------

    @property
    def idle_since(self) -> float:
        """Since when the connection is idle. Infinite if it is not, or may stay although it is."""
        return float("inf") if not self._ending and (self._filter.streams or self._trusted) else self._since

    def drop_idle(self) -> None:
        if self._ending:
            self.abort()
            return
        self._drop("idle", "no call with a valid token came; connect again to make one")

    def retry(self) -> bool:
        """Goes on if there is memory now. Returns whether no message waits for memory any more."""
        self._wake_stream()
        return not self._starved()

    def refuse_starved(self) -> None:
        for stream in self._filter.streams.values():
            if stream.starved:
                stream.starved = False
                stream.refuse(stream.no_memory())

    def take_turn(self) -> None:
        """The next call may pass."""
        self._go_on(TURN)

    def abort(self) -> None:
        for transport in (self._client, self._server):
            if transport is not None:
                transport.abort()

    # ---- for its two ends -----------------------------------------------------------------------

    def client_buffer(self) -> memoryview:
        return self._gate.read_buffer[:MAX_BUFFERED_BYTES]

    def server_buffer(self) -> memoryview:
        return self._gate.read_buffer if self.wide else self.client_buffer()

    def client_made(self, transport: asyncio.Transport) -> None:
        self._client = transport
        transport.set_write_buffer_limits(high=0)
        transport.write(self._early)
        self._early = b""
        if self._server_lost or self._ending:
            transport.close()

    def server_made(self, transport: asyncio.Transport) -> None:
        self._server = transport
        self._server_lost = False
        transport.set_write_buffer_limits(high=MAX_BUFFERED_BYTES)

    def client_said(self, count: int) -> None:
        self._filter.held += self._gate.read_buffer[:count]
        self._process()

    def server_said(self, count: int) -> None:
        data = bytes(self._gate.read_buffer[:count])
        ended = self._ended_streams.feed(data)
        if self._client is None:
            self._early += data  # gRPC's settings
        elif not self._client.is_closing():
            self._client.write(data)
        if count == MAX_BUFFERED_BYTES and not self.wide:
            approved = any(stream.approved for stream in self._filter.streams.values())
            self.wide = approved and self._gate.widen(self)
        for number in ended:
            self.end_stream(number)

    def client_full(self, full: bool) -> None:
        if self._server is not None:
            if full:
                self._server.pause_reading()
            elif not self._server.is_closing():
                self._server.resume_reading()

    def server_full(self, full: bool) -> None:
        if full:
            self._wait_for(_GRPC)
        else:
            self._go_on(_GRPC)

    def client_lost(self) -> None:
        self._client_lost = True
        self._lost()

    def server_lost(self) -> None:
        self._server_lost = True
        self._lost()

    # ---- waiting --------------------------------------------------------------------------------

    def _wait_for(self, what: str) -> None:
        if not self._waits_for and self._client is not None and not self._client.is_closing():
            self._client.pause_reading()
        self._waits_for.add(what)

    def _go_on(self, what: str) -> None:
        self._waits_for.discard(what)
        self._process()
        if not self._waits_for and self._client is not None and not self._client.is_closing():
            self._client.resume_reading()

    def _wake_stream(self) -> None:
        if self._ending:
            self._lost()
        elif STREAM in self._waits_for:
            self._go_on(STREAM)

    def _on_work_allowed(self) -> None:
        self._timer = None
        self._go_on(WORK)

    def _starved(self) -> bool:
        """A message waits for memory that other requests of the user hold."""
        return any(stream.starved for stream in self._filter.streams.values())

    def _process(self) -> None:
        """Passes on the held bytes that may pass."""
        if self._processing or self._ending or self._server is None or self._waits_for:
            return
        self._processing = True
        passing: list[bytes] = []
        wrong: Violation | None = None
        try:
            waits = self._filter.take(self, passing, self._loop.time())
            if waits is not None:
                self._hold(*waits)
            self._filter.charge()
        except Violation as violation:
            wrong = violation
        finally:
            self._processing = False
        if passing and not self._server.is_closing():
            self._server.write(b"".join(passing))  # frames before a violation too: their calls are counted
        if wrong is not None:
            self._drop(wrong.reason, str(wrong))

    def _hold(self, waits_for: str, seconds: float) -> None:
        """The next frame has to wait."""
        self._wait_for(waits_for)
        if waits_for == WORK and self._timer is None:
            self._timer = self._loop.call_later(seconds, self._on_work_allowed)
        elif waits_for == STREAM and self._starved():
            self._gate.starve(self)

    # ---- for the filter -------------------------------------------------------------------------

    def may_open(self) -> bool:
        return self._gate.may_open(self)

    def open_stream(self) -> RequestStream:
        stream = RequestStream(self.uid, self._memory, self._wake_stream, self._gate.memory_freed)
        self._gate.open_stream(stream)
        return stream

    def end_stream(self, number: int) -> None:
        stream = self._filter.streams.pop(number, None)
        if stream is None:
            return
        self._trusted = self._trusted or stream.approved
        self._since = self._loop.time()
        self._gate.end_stream(stream)
        self._wake_stream()

    # ---- ends -----------------------------------------------------------------------------------

    def _lost(self) -> None:
        """One end is closed. Closes the other end too, after its last bytes, and gRPC's end only when gRPC
        has taken all calls. The connection is gone when both ends are closed."""
        if not self._ending:
            self._ending = True
            self._since = self._loop.time()
            if self._timer is not None:
                self._timer.cancel()
            if self._client is not None:
                self._client.close()
            self._filter.clear()
        streams = self._filter.streams
        if not self._server_lost and not all(stream.taken_up for stream in streams.values()):
            return
        if self._server is not None:
            self._server.close()
        while streams:
            self._gate.end_stream(streams.popitem()[1])
        if self._client_lost and self._server_lost and not self._gone:
            self._gone = True
            self._gate.gone(self, self._reason)

    def _drop(self, reason: str, words: str) -> None:
        logger.debug("a connection of uid %d was closed (%s): %s", self.uid, reason, words)
        self._reason = self._reason or reason
        client = self._client
        if client is not None and self._ended_streams.between_frames and not client.get_write_buffer_size():
            client.write(frames.goaway(self._filter.last_stream, frames.ENHANCE_YOUR_CALM, words))
        if client is not None:
            client.abort()
        self._lost()
