"""The rules for the HTTP/2 frames of one client: which of them pass to gRPC, and which have to wait.

The filter holds the client's bytes until a frame is complete and may pass. It charges the bytes to the user's
memory, and each frame, message and call to the user's work. It adds the gate's own field to the headers of
each request. It does no I/O: the passage reads from the client, and writes to gRPC.
"""

from __future__ import annotations

from typing import Protocol

from ..system.quota import Quota
from . import fields, frames
from .allowance import Allowance
from .streams import STREAM_BYTES, RequestStream

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

STREAM, WORK, TURN = "stream", "work", "turn"
"""Why a frame waits: its stream takes no more yet, its user has caused too much work, or it is not the turn
of this connection to pass a call."""


class Violation(Exception):
    """The client broke a rule, so its connection has to end. `reason` is one of `counts.CLOSED_REASONS`."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason


class Connection(Protocol):
    """The filter's owner: it knows the gate, which has the calls of all connections."""

    def may_open(self) -> bool:
        """Whether a call may pass now. If not, the owner calls `take` again when one may."""

    def open_stream(self) -> RequestStream:
        """The stream of a call that passes now. `STREAM_BYTES` are charged for it."""

    def end_stream(self, number: int) -> None:
        """The client has reset the stream."""


class FrameFilter:
    """The frames of one connection. Lives on the event loop."""

    def __init__(self, uid: int, memory: Quota, work: Allowance, now: float) -> None:
        self.held = bytearray()
        """Bytes that the client has sent and that have not passed. The owner appends to them."""
        self.streams: dict[int, RequestStream] = {}
        """The calls that have not ended, by number. The owner removes them."""
        self.last_stream = 0
        self._uid = uid
        self._memory = memory
        self._work = work
        self._control = Allowance(CONTROL_PER_SECOND, CONTROL_AT_ONCE, now)
        self._charged = 0
        """Memory charged for the bytes that are held."""
        self._preface_seen = False
        self._block: bytearray | None = None
        """The header block that is being received."""
        self._block_stream = self._block_flags = self._continuations = 0

    # ---- for the owner --------------------------------------------------------------------------

    def take(self, connection: Connection, passing: list[bytes], now: float) -> tuple[str, float] | None:
        """Appends the held bytes that may pass to `passing`. Returns why the next frame has to wait, and for
        how many seconds (0: not known). None: there is no complete frame left.

        Raises Violation. `passing` has the frames before the violation then.
        """
        held, position = self.held, 0
        if not self._preface_seen:
            size = len(frames.PREFACE)
            if held[:size] != frames.PREFACE[: len(held)]:
                raise Violation("protocol", "the connection does not begin with HTTP/2's preface")
            if len(held) < size:
                return None
            self._preface_seen = True
            passing.append(frames.PREFACE)
            position = size
        try:
            while len(held) - position >= frames.HEADER_BYTES:
                length = int.from_bytes(held[position : position + 3], "big")
                if length > frames.MAX_PAYLOAD_BYTES:
                    raise Violation(
                        "protocol", f"a frame has {length} bytes, more than {frames.MAX_PAYLOAD_BYTES}"
                    )
                end = position + frames.HEADER_BYTES + length
                if len(held) < end:
                    return None
                wait_seconds = self._work.wait_seconds(now)
                if wait_seconds:
                    return WORK, wait_seconds
                kind, flags = held[position + 3], held[position + 4]
                number = int.from_bytes(held[position + 5 : position + 9], "big") & 0x7FFFFFFF
                waits_for = self._waits_for(connection, kind, flags, number)
                if waits_for is not None:
                    return waits_for
                payload = bytes(held[position + frames.HEADER_BYTES : end])
                if kind == frames.DATA:
                    passed = self._take_data(flags, number, payload, passing, now)
                    if passed < length:
                        # The rest becomes a frame of its own.
                        position += passed
                        rest = frames.header(length - passed, kind, flags, number)
                        held[position : position + frames.HEADER_BYTES] = rest
                        return STREAM, 0.0
                else:
                    self._take_other(connection, kind, flags, number, payload, passing, now)
                position = end
            return None
        finally:
            del held[:position]

    def charge(self) -> None:
        """Charges the held bytes to the user. Raises Violation if the user has too little memory left."""
        size = len(self.held) + len(self._block or b"")
        if size > self._charged and not self._memory.take(self._uid, size - self._charged):
            raise self._no_memory()
        if size < self._charged:
            self._memory.release(self._uid, self._charged - size)
        self._charged = size

    def clear(self) -> None:
        """Drops the held bytes: the connection has ended."""
        self.held.clear()
        self._block = None
        self.charge()

    # ---- inside ---------------------------------------------------------------------------------

    def _waits_for(
        self, connection: Connection, kind: int, flags: int, number: int
    ) -> tuple[str, float] | None:
        """A call waits for its user's turn, and a reset until gRPC has taken the call
        (`RequestStream.taken_up`)."""
        if kind in (frames.HEADERS, frames.CONTINUATION) and flags & frames.END_HEADERS:
            if not connection.may_open():
                return TURN, 0.0
        elif kind == frames.RST_STREAM:
            stream = self.streams.get(number)
            if stream is not None and not stream.taken_up:
                return STREAM, 0.0
        return None

    def _take_data(self, flags: int, number: int, payload: bytes, passing: list[bytes], now: float) -> int:
        """How many bytes of it passed. The rest has to wait."""
        if self._block is not None or flags & ~frames.END_STREAM or not self._is_known(number):
            raise Violation(
                "protocol", f"a DATA frame of stream {number} with flags {flags} makes no sense here"
            )
        stream = self.streams.get(number)
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
        elif passed:
            passing.append(frames.frame(frames.DATA, 0, number, payload[:passed]))
        return passed

    def _take_other(
        self,
        connection: Connection,
        kind: int,
        flags: int,
        number: int,
        payload: bytes,
        passing: list[bytes],
        now: float,
    ) -> None:
        if (self._block is not None) != (kind == frames.CONTINUATION):
            raise Violation("protocol", f"a {frames.name_of(kind)} frame where it may not be")
        if kind in (frames.HEADERS, frames.CONTINUATION):
            self._take_headers(kind, flags, number, payload, now)
            if flags & frames.END_HEADERS:
                self._open_stream(connection, passing)
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
            raise Violation("protocol", f"a {frames.name_of(kind)} frame that makes no sense")
        passing.append(frames.frame(kind, flags, number, payload))
        if kind == frames.RST_STREAM:
            self._work.spend(RESET_WORK, now)
            connection.end_stream(number)

    def _take_headers(self, kind: int, flags: int, number: int, payload: bytes, now: float) -> None:
        if kind == frames.HEADERS:
            part = frames.fragment(flags, payload)
            if part is None or not number & 1 or number <= self.last_stream:
                raise Violation("protocol", f"a HEADERS frame of stream {number} makes no sense here")
            self.last_stream = number
            self._block, self._block_stream, self._continuations = bytearray(part), number, 0
            self._block_flags = flags & frames.END_STREAM
            self._work.spend(CALL_WORK, now)
        else:
            assert self._block is not None
            self._continuations += 1
            if number != self._block_stream or self._continuations > MAX_CONTINUATIONS:
                raise Violation("flood", "too many CONTINUATION frames, or of another stream")
            self._block += payload
            self._work.spend(FRAME_WORK, now)
        if len(self._block) > MAX_HEADER_BLOCK_BYTES:
            raise Violation(
                "flood", f"the headers of a request have more than {MAX_HEADER_BLOCK_BYTES} bytes; send fewer"
            )

    def _open_stream(self, connection: Connection, passing: list[bytes]) -> None:
        """Passes a request's headers on, with the gate's own."""
        assert self._block is not None
        number, flags = self._block_stream, self._block_flags | frames.END_HEADERS
        try:
            fields.check(bytes(self._block))
        except fields.BadFieldsError as error:
            raise Violation("protocol", str(error)) from None
        if not self._memory.take(self._uid, STREAM_BYTES):
            raise self._no_memory()
        self.streams[number] = stream = connection.open_stream()
        self._block += frames.literal_field(STREAM_HEADER, stream.key.encode())
        passing.append(frames.frame(frames.HEADERS, flags, number, self._block))
        self._block = None

    def _is_known(self, number: int) -> bool:
        return bool(number & 1) and number <= self.last_stream

    def _count_control(self, kind: int, payload: bytes, now: float) -> None:
        cost = FRAME_WORK + len(payload) // _BYTES_A_WORK
        self._work.spend(cost, now)
        self._control.spend(cost, now)
        if self._control.wait_seconds(now):
            raise Violation("flood", f"too many {frames.name_of(kind)} frames; send fewer")

    def _no_memory(self) -> Violation:
        return Violation(
            "memory", f"the requests of uid {self._uid} hold all the memory that they may have; send fewer"
        )
