"""One connection through the gate, in both directions.

    client -> _ClientEnd -> Passage: frames, one by one -> gRPC
    client <- Passage: which streams end <- _ServerEnd <- gRPC

The client's bytes are held until a frame is complete. They are held longer if the stream's message may not
pass yet, if the user has caused too much work, or if gRPC reads nothing. The connection is not read
meanwhile. So at most `MAX_BUFFERED_BYTES` and a frame are held, and they are charged to the user.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING

from ..system.quota import Quota
from . import fields, frames
from .allowance import Allowance
from .streams import STREAM_BYTES, RequestStream

if TYPE_CHECKING:
    from .gate import Gate

logger = logging.getLogger(__name__)

MAX_BUFFERED_BYTES = 16 << 10
"""Bytes of one read, in either direction. While so many wait to be passed on, the client's end is not
read."""
WIDE_BYTES = 64 << 10
"""Read at once of what gRPC answers to calls with a token, on few connections (`gate.WIDE_CONNECTIONS`).
The descriptions of 100,000 tensors are 11 MB: in pieces of 16 KiB they cost a tenth more of the daemon's CPU
time."""
STREAM_HEADER = b"penstock-stream"
MAX_HEADER_BLOCK_BYTES = frames.MAX_PAYLOAD_BYTES - 64
"""A request's headers, compressed, in all their frames. With the gate's own header they fit into one
frame."""
MAX_CONTINUATIONS = 8
CONTROL_PER_SECOND = 500.0
CONTROL_AT_ONCE = 2000.0
"""Frames of a connection that carry no request; more are a flood. Measured: a client that loads 100,000
tensors in a second sends about 120 of them, nearly all WINDOW_UPDATE."""

FRAME_WORK, MESSAGE_WORK, CALL_WORK, RESET_WORK = 1, 3, 20, 10
"""The price of each in the user's work (`gate.WORK_PER_SECOND`)."""
_BYTES_A_WORK = 64
_WAITS_FOR_STREAM, _WAITS_FOR_WORK, _WAITS_FOR_GRPC, _WAITS_FOR_TURN = "stream", "work", "grpc", "turn"


class _Violation(Exception):
    """The connection has to end."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason


class Passage:
    """Made by the gate, which has charged the cost of a connection. `gate.gone` is called at its end."""

    def __init__(self, gate: Gate, uid: int, memory: Quota, work: Allowance) -> None:
        self.uid = uid
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._gate = gate
        self._memory = memory
        self._work = work
        self._control = Allowance(CONTROL_PER_SECOND, CONTROL_AT_ONCE, loop.time())
        self._client: asyncio.Transport | None = None
        self._server: asyncio.Transport | None = None
        self._streams: dict[int, RequestStream] = {}
        self._last_stream = 0
        self._held = bytearray()
        self._charged = 0
        """Memory charged for the bytes that are held."""
        self._preface_seen = False
        self._block: bytearray | None = None
        """The header block that is being received."""
        self._block_stream = self._block_flags = self._continuations = 0
        self._ended_streams = frames.EndedStreams()
        self._waits_for: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._processing = False
        self._trusted = False
        """A call on it had a valid token."""
        self.wide = False
        """It may read `WIDE_BYTES` of answers at once."""
        self._since = loop.time()
        """When it came, or its last call ended."""
        self._early = b""
        """Bytes that gRPC sent before the client's end was made."""
        self._client_lost = False
        self._server_lost = True
        self._ending = self._gone = False
        self._reason = ""

    async def run(self, connection: socket.socket, inner: str) -> None:
        """Connects the two ends. Takes `connection`."""
        try:
            await self._loop.create_unix_connection(lambda: _ServerEnd(self), inner)
            await self._loop.connect_accepted_socket(lambda: _ClientEnd(self), connection)
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
        """Infinite unless it may be closed for being idle."""
        return float("inf") if not self._ending and (self._streams or self._trusted) else self._since

    def drop_idle(self) -> None:
        if self._ending:
            self.abort()
            return
        self._drop("idle", "no call with a valid token came; connect again to make one")

    def retry(self) -> bool:
        """Goes on, if there is memory for what waited; whether it does not wait any more."""
        self._wake_stream()
        return not any(stream.starved for stream in self._streams.values())

    def refuse_starved(self) -> None:
        for stream in self._streams.values():
            if stream.starved:
                stream.starved = False
                stream.refuse(stream.no_memory())

    def may_open(self) -> None:
        """The next call may pass."""
        self._go_on(_WAITS_FOR_TURN)

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
        self._held += self._gate.read_buffer[:count]
        self._process()

    def server_said(self, count: int) -> None:
        data = bytes(self._gate.read_buffer[:count])
        ended = self._ended_streams.feed(data)
        if self._client is None:
            self._early += data  # gRPC's settings
        elif not self._client.is_closing():
            self._client.write(data)
        if count == MAX_BUFFERED_BYTES and not self.wide:
            approved = any(stream.approved for stream in self._streams.values())
            self.wide = approved and self._gate.widen(self)
        for number in ended:
            self._end_stream(number)

    def client_full(self, full: bool) -> None:
        if self._server is not None:
            if full:
                self._server.pause_reading()
            elif not self._server.is_closing():
                self._server.resume_reading()

    def server_full(self, full: bool) -> None:
        if full:
            self._wait_for(_WAITS_FOR_GRPC)
        else:
            self._go_on(_WAITS_FOR_GRPC)

    def client_lost(self) -> None:
        self._client_lost = True
        self._lost()

    def server_lost(self) -> None:
        self._server_lost = True
        self._lost()

    # ---- what holds it up -----------------------------------------------------------------------

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
        elif _WAITS_FOR_STREAM in self._waits_for:
            self._go_on(_WAITS_FOR_STREAM)

    def _tired(self) -> None:
        self._timer = None
        self._go_on(_WAITS_FOR_WORK)

    # ---- frames of the client -------------------------------------------------------------------

    def _process(self) -> None:
        """Passes on those of the held bytes that may pass."""
        if self._processing or self._ending or self._server is None or self._waits_for:
            return
        self._processing = True
        passing: list[bytes] = []
        wrong: _Violation | None = None
        try:
            self._take_frames(passing)
            if not self._charge_held():
                raise _Violation(
                    "memory",
                    f"the requests of uid {self.uid} hold all the memory that they may have; send fewer",
                )
        except _Violation as violation:
            wrong = violation
        finally:
            self._processing = False
        if passing and not self._server.is_closing():
            self._server.write(b"".join(passing))  # what came before a violation too: its calls count already
        if wrong is not None:
            self._drop(wrong.reason, str(wrong))

    def _take_frames(self, passing: list[bytes]) -> None:
        held, position = self._held, 0
        now = self._loop.time()
        if not self._preface_seen:
            size = len(frames.PREFACE)
            if held[:size] != frames.PREFACE[: len(held)]:
                raise _Violation("protocol", "the connection does not begin with HTTP/2's preface")
            if len(held) < size:
                return
            self._preface_seen = True
            passing.append(frames.PREFACE)
            position = size
        try:
            while len(held) - position >= frames.HEADER_BYTES:
                length = int.from_bytes(held[position : position + 3], "big")
                if length > frames.MAX_PAYLOAD_BYTES:
                    raise _Violation(
                        "protocol", f"a frame has {length} bytes, more than {frames.MAX_PAYLOAD_BYTES}"
                    )
                end = position + frames.HEADER_BYTES + length
                if len(held) < end:
                    return
                wait_seconds = self._work.wait_seconds(now)
                if wait_seconds:
                    self._wait_for(_WAITS_FOR_WORK)
                    if self._timer is None:
                        self._timer = self._loop.call_later(wait_seconds, self._tired)
                    return
                kind, flags = held[position + 3], held[position + 4]
                number = int.from_bytes(held[position + 5 : position + 9], "big") & 0x7FFFFFFF
                if self._has_to_wait(kind, flags, number):
                    return
                payload = bytes(held[position + frames.HEADER_BYTES : end])
                if kind == frames.DATA:
                    passed = self._take_data(flags, number, payload, passing, now)
                    if passed < length:
                        # The rest becomes a frame of its own.
                        position += passed
                        rest = frames.header(length - passed, kind, flags, number)
                        held[position : position + frames.HEADER_BYTES] = rest
                        return
                else:
                    self._take_other(kind, flags, number, payload, passing, now)
                position = end
        finally:
            del held[:position]

    def _has_to_wait(self, kind: int, flags: int, number: int) -> bool:
        """A call for its user's turn, a reset for gRPC to take the call (`RequestStream.taken_up`)."""
        if kind in (frames.HEADERS, frames.CONTINUATION) and flags & frames.END_HEADERS:
            if not self._gate.may_open(self):
                self._wait_for(_WAITS_FOR_TURN)
                return True
        elif kind == frames.RST_STREAM:
            stream = self._streams.get(number)
            if stream is not None and not stream.taken_up:
                self._wait_for(_WAITS_FOR_STREAM)
                return True
        return False

    def _take_data(self, flags: int, number: int, payload: bytes, passing: list[bytes], now: float) -> int:
        """How much of it passed; less than all: the rest has to wait."""
        if self._block is not None or flags & ~frames.END_STREAM or not self._is_known(number):
            raise _Violation(
                "protocol", f"a DATA frame of stream {number} with flags {flags} makes no sense here"
            )
        stream = self._streams.get(number)
        if not payload and (stream is None or not flags & frames.END_STREAM):
            self._count_control(frames.DATA, payload, now)
        if stream is None:  # it ended: gRPC only counts the bytes for the connection
            self._work.spend(FRAME_WORK, now)
            passing.append(frames.frame(frames.DATA, flags, number, payload))
            return len(payload)
        messages, passed = stream.messages, stream.accept(payload)
        self._work.spend(FRAME_WORK + MESSAGE_WORK * (stream.messages - messages), now)
        if passed == len(payload):
            passing.append(frames.frame(frames.DATA, flags, number, payload))
            return passed
        if passed:
            passing.append(frames.frame(frames.DATA, 0, number, payload[:passed]))
        self._wait_for(_WAITS_FOR_STREAM)
        if stream.starved:
            self._gate.starve(self)
        return passed

    def _take_other(
        self, kind: int, flags: int, number: int, payload: bytes, passing: list[bytes], now: float
    ) -> None:
        if (self._block is not None) != (kind == frames.CONTINUATION):
            raise _Violation("protocol", f"a {frames.name_of(kind)} frame where it may not be")
        if kind in (frames.HEADERS, frames.CONTINUATION):
            self._take_headers(kind, flags, number, payload, passing, now)
            return
        self._count_control(kind, payload, now)
        if kind == frames.PRIORITY or kind > frames.CONTINUATION:
            return  # nobody needs it
        on_connection = kind in (frames.SETTINGS, frames.PING, frames.GOAWAY)
        sizes = {frames.RST_STREAM: 4, frames.PING: 8, frames.WINDOW_UPDATE: 4}
        if (
            kind == frames.PUSH_PROMISE
            or (on_connection and number)
            or len(payload) != sizes.get(kind, len(payload))
            or (kind == frames.RST_STREAM and not self._is_known(number))
        ):
            raise _Violation("protocol", f"a {frames.name_of(kind)} frame that makes no sense")
        passing.append(frames.frame(kind, flags, number, payload))
        if kind == frames.RST_STREAM:
            self._work.spend(RESET_WORK, now)
            self._end_stream(number)

    def _take_headers(
        self, kind: int, flags: int, number: int, payload: bytes, passing: list[bytes], now: float
    ) -> None:
        if kind == frames.HEADERS:
            part = frames.fragment(flags, payload)
            if part is None or not number & 1 or number <= self._last_stream:
                raise _Violation("protocol", f"a HEADERS frame of stream {number} makes no sense here")
            self._last_stream = number
            self._block, self._block_stream, self._continuations = bytearray(part), number, 0
            self._block_flags = flags & frames.END_STREAM
            self._work.spend(CALL_WORK, now)
        else:
            assert self._block is not None
            self._continuations += 1
            if number != self._block_stream or self._continuations > MAX_CONTINUATIONS:
                raise _Violation("flood", "too many CONTINUATION frames, or of another stream")
            self._block += payload
            self._work.spend(FRAME_WORK, now)
        if len(self._block) > MAX_HEADER_BLOCK_BYTES:
            raise _Violation(
                "flood", f"the headers of a request have more than {MAX_HEADER_BLOCK_BYTES} bytes; send fewer"
            )
        if flags & frames.END_HEADERS:
            self._open_stream(passing)

    def _open_stream(self, passing: list[bytes]) -> None:
        """Passes a request's headers on, with the gate's own."""
        assert self._block is not None
        number, flags = self._block_stream, self._block_flags | frames.END_HEADERS
        try:
            fields.check(bytes(self._block))
        except fields.BadFieldsError as error:
            raise _Violation("protocol", str(error)) from None
        if not self._memory.take(self.uid, STREAM_BYTES):
            raise _Violation(
                "memory", f"the requests of uid {self.uid} hold all the memory that they may have; send fewer"
            )
        stream = RequestStream(self.uid, self._memory, self._wake_stream, self._gate.memory_freed)
        self._streams[number] = stream
        self._gate.open_stream(stream)
        self._block += frames.literal_field(STREAM_HEADER, stream.key.encode())
        passing.append(frames.frame(frames.HEADERS, flags, number, self._block))
        self._block = None

    def _is_known(self, number: int) -> bool:
        return bool(number & 1) and number <= self._last_stream

    def _count_control(self, kind: int, payload: bytes, now: float) -> None:
        cost = FRAME_WORK + len(payload) // _BYTES_A_WORK
        self._work.spend(cost, now)
        self._control.spend(cost, now)
        if self._control.wait_seconds(now):
            raise _Violation("flood", f"too many {frames.name_of(kind)} frames; send fewer")

    # ---- ends -----------------------------------------------------------------------------------

    def _end_stream(self, number: int) -> None:
        stream = self._streams.pop(number, None)
        if stream is None:
            return
        self._trusted = self._trusted or stream.approved
        self._since = self._loop.time()
        self._gate.end_stream(stream)
        self._wake_stream()

    def _charge_held(self) -> bool:
        """Charges the held bytes to the user; False if the user has too little left."""
        size = len(self._held) + len(self._block or b"")
        if size > self._charged and not self._memory.take(self.uid, size - self._charged):
            return False
        if size < self._charged:
            self._memory.release(self.uid, self._charged - size)
        self._charged = size
        return True

    def _lost(self) -> None:
        """One end is closed. The other end is closed too, after its last bytes; gRPC's end only when gRPC has
        taken all calls. The connection is gone when both are."""
        if not self._ending:
            self._ending = True
            self._since = self._loop.time()
            if self._timer is not None:
                self._timer.cancel()
            if self._client is not None:
                self._client.close()
            self._held.clear()
            self._block = None
            self._charge_held()
        if not self._server_lost and not all(stream.taken_up for stream in self._streams.values()):
            return
        if self._server is not None:
            self._server.close()
        while self._streams:
            self._gate.end_stream(self._streams.popitem()[1])
        if self._client_lost and self._server_lost and not self._gone:
            self._gone = True
            self._gate.gone(self, self._reason)

    def _drop(self, reason: str, words: str) -> None:
        logger.debug("a connection of uid %d was closed (%s): %s", self.uid, reason, words)
        self._reason = self._reason or reason
        client = self._client
        if client is not None and self._ended_streams.between_frames and not client.get_write_buffer_size():
            client.write(frames.goaway(self._last_stream, frames.ENHANCE_YOUR_CALM, words))
        if client is not None:
            client.abort()
        self._lost()


class _End(asyncio.BufferedProtocol):
    def __init__(self, passage: Passage) -> None:
        self._passage = passage


class _ClientEnd(_End):
    def get_buffer(self, sizehint: int) -> memoryview:
        return self._passage.client_buffer()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._passage.client_made(transport)

    def buffer_updated(self, nbytes: int) -> None:
        self._passage.client_said(nbytes)

    def pause_writing(self) -> None:
        self._passage.client_full(True)

    def resume_writing(self) -> None:
        self._passage.client_full(False)

    def connection_lost(self, error: Exception | None) -> None:
        self._passage.client_lost()


class _ServerEnd(_End):
    def get_buffer(self, sizehint: int) -> memoryview:
        return self._passage.server_buffer()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._passage.server_made(transport)

    def buffer_updated(self, nbytes: int) -> None:
        self._passage.server_said(nbytes)

    def pause_writing(self) -> None:
        self._passage.server_full(True)

    def resume_writing(self) -> None:
        self._passage.server_full(False)

    def connection_lost(self, error: Exception | None) -> None:
        self._passage.server_lost()
