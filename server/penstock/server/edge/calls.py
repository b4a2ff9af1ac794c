"""How a handler takes the messages of a call and sends its answers: raw, one by one, and with bounds.

gRPC calls the handler of a method that takes a stream as soon as the headers are there. So all methods are
registered as such (`rpc.py`), and a handler can check the token before a message of full size may pass the
gate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from ..errors import InvalidRequestError
from .answers import Answers
from .streams import RequestStream

FIRST_MESSAGE_SECONDS = 30.0
"""A client that has opened a call has its request ready; so has one that sends a list in parts."""
MAX_FIELDS = 4096
"""The most fields of one message, without fields of messages in it. A field that a later one replaces costs
memory too while the message is parsed."""
LARGEST_BYTES = (1 << 20) + (64 << 10)
"""The largest answer, unless its sender says otherwise."""
WRITE_TIMEOUT_SECONDS = 5.0
"""How long a call that ends early waits for a client that does not read."""

Context = grpc.aio.ServicerContext[Any, Any]
_M = TypeVar("_M", bound=Message)


class Call:
    """One call, for its handler. `next` and `send` may be used at the same time."""

    def __init__(self, context: Context, stream: RequestStream, answers: Answers) -> None:
        self.context = context
        self.stream = stream
        self._answers = answers

    async def next(self, kind: type[_M], *, seconds: float | None = FIRST_MESSAGE_SECONDS) -> _M | None:
        """The next message; None after the last. None for `seconds` waits for ever.

        Raises the error with which the gate refused the message, and InvalidRequestError for a message that
        does not come or cannot be parsed.
        """
        raw = await self._read(kind, seconds)
        if raw is None:
            return None
        try:
            if not _fields_within(raw, MAX_FIELDS):
                raise InvalidRequestError(
                    f"the {kind.__name__} has more than {MAX_FIELDS} fields; send a smaller one"
                )
            return kind.FromString(raw)
        except DecodeError:
            raise InvalidRequestError(f"the message is not a valid {kind.__name__}; send one") from None

    async def only(self, kind: type[_M]) -> _M:
        """A message that has to come. Raises as `next`."""
        message = await self.next(kind)
        if message is None:
            raise InvalidRequestError(f"the {kind.__name__} is missing: the call ended before it; send one")
        return message

    async def send(self, make: Callable[[], bytes], *, most_bytes: int = LARGEST_BYTES) -> None:
        """Makes a message of at most so many bytes once there is room for it, and returns when gRPC has
        passed it on. Raises the errors of `make`."""
        async with self._answers.room(self.stream.uid, most_bytes) as settle:
            message = make()
            settle(len(message))
            await self._write(message)

    async def send_all(self, messages: Iterator[bytes]) -> None:
        """Each in turn, as `send`."""
        while True:
            async with self._answers.room(self.stream.uid, LARGEST_BYTES) as settle:
                message = next(messages, None)
                if message is None:
                    return
                settle(len(message))
                await self._write(message)

    async def _write(self, message: bytes) -> None:
        """Cancelled, it first lets the write end: gRPC takes no status while a message is on its way."""
        writing = asyncio.ensure_future(self.context.write(message))
        # A client that goes may cancel twice, by its call and by its connection: the wait below ends early
        # then.
        writing.add_done_callback(lambda write: write.cancelled() or write.exception())
        try:
            await asyncio.shield(writing)
        except grpc.aio.InternalError:  # the client is gone
            raise asyncio.CancelledError from None
        except asyncio.CancelledError:
            await asyncio.wait([writing], timeout=WRITE_TIMEOUT_SECONDS)
            if not writing.done():
                writing.cancel()
            raise

    async def _read(self, kind: type[Message], seconds: float | None) -> bytes | None:
        stream, interrupted = self.stream, False
        stream.finish_message()
        if stream.refusal is not None:
            raise stream.refusal
        reading = asyncio.current_task()
        assert reading is not None

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            reading.cancel()

        stream.on_refused = interrupt
        timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, interrupt)
        try:
            raw = await self.context.read()
        except asyncio.CancelledError:
            if not interrupted:
                raise
            if stream.refusal is not None:
                raise stream.refusal from None
            raise InvalidRequestError(
                f"the {kind.__name__} did not arrive completely within {seconds:g} s; send it at once "
                "when the call is opened"
            ) from None
        finally:
            stream.on_refused = None
            if timer is not None:
                timer.cancel()
        if raw is grpc.aio.EOF:
            return None
        stream.took()
        return bytes(raw)


def _fields_within(raw: bytes, most: int) -> bool:
    """Whether a message has at most `most` fields. The parser refuses malformed messages."""
    position, end = 0, len(raw)
    for _ in range(most):
        if position >= end:
            return True
        key, position = _varint(raw, position)
        wire_type = key & 7
        if wire_type == 0:
            _, position = _varint(raw, position)
        elif wire_type == 1:
            position += 8
        elif wire_type == 2:
            length, position = _varint(raw, position)
            position += length
        elif wire_type == 5:
            position += 4
        else:  # groups, which no message here has
            return False
    return position >= end


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(raw) and shift < 70:
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, position
