"""One request's stream at the gate: which of its bytes may pass to gRPC, and how much memory they hold there.

gRPC has no bound for the memory of requests, and a handler sees a message only when it is complete. So the
gate reads the prefix of each message (a flag, and its length in four bytes). It charges the cost of the
message to the user's share of `memory` (quota.py), and only then lets the message pass:

    gate: accept(bytes) -> gRPC -> handler: took() -> finish_message(), or keep() for what it makes of it
                                 approve(), once the token is known

A message that breaks a rule is refused: nothing more of the stream passes, and the handler ends the call with
the error. A message that has to wait is held, and with it the connection, until `wake`.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable

from ..errors import InvalidRequestError, PenstockError, TooManyLoadsError
from ..system.quota import Quota

MAX_MESSAGE_BYTES = 1 << 20
UNAPPROVED_MESSAGE_BYTES = 4096
"""The largest message of a call without a token: health checks and reflection never need more."""
UNAPPROVED_MESSAGES = 4
MAX_WAITING_MESSAGES = 16
"""The most messages that have passed and that the handler has not taken."""
STREAM_BYTES = 16 << 10
"""The cost of a call to gRPC and Python: measured, 15 KiB with gRPC 1.85."""
MESSAGE_OVERHEAD_BYTES = 512
FRAME_OVERHEAD_BYTES = 64
"""A frame is a slice of 32 bytes to gRPC until its message is taken, however few bytes are in it."""
_PREFIX_BYTES = 5


class RequestStream:
    """Lives on the event loop. The gate makes it and calls `end`, after which it holds nothing."""

    def __init__(self, uid: int, memory: Quota, wake: Callable[[], None], freed: Callable[[], None]) -> None:
        """The caller has taken `STREAM_BYTES` for it. `wake` is called when more may pass, `freed` when
        memory was given back."""
        self.uid = uid
        self.key = secrets.token_hex(16)
        """By this key the handler finds the stream. Nobody else knows it."""
        self.approved = False
        self.taken_up = False
        """gRPC has given the call to its handler. Until then the gate passes on no reset and no end of the
        connection: gRPC would keep the rest of the call in its queue, and not report when it is gone."""
        self.ended = False
        self.refusal: PenstockError | None = None
        self.starved = False
        """A message waits for memory that other requests of the user hold."""
        self.messages = 0
        """How many messages have been admitted so far."""
        self.on_refused: Callable[[], None] | None = None
        self._memory = memory
        self._wake = wake
        self._freed = freed
        self._small = False
        self._waiting: deque[int] = deque()
        """The cost of each message that is passing, or has passed and is not taken yet; oldest first."""
        self._in_hand = 0
        self._kept = 0
        self._prefix = b""
        self._remaining = 0

    # ---- for the gate ---------------------------------------------------------------------------

    def accept(self, payload: bytes) -> int:
        """How many bytes of a DATA frame may pass now, from its beginning."""
        passed, size = 0, len(payload)
        if self._remaining and not self._charge_frame():
            return 0
        while passed < size and self.refusal is None:
            if self._remaining:
                count = min(self._remaining, size - passed)
                self._remaining -= count
                passed += count
                continue
            prefix = self._prefix + payload[passed : passed + _PREFIX_BYTES - len(self._prefix)]
            if len(prefix) == _PREFIX_BYTES:
                # The prefix passes only when the message is admitted: an empty message is nothing but its
                # prefix.
                if not self._admit_message(prefix[0], int.from_bytes(prefix[1:], "big")):
                    break
                passed += _PREFIX_BYTES - len(self._prefix)
                self._prefix = b""
            else:
                passed = size
                self._prefix = prefix
        return passed

    def refuse(self, error: PenstockError) -> None:
        if self.refusal is None and not self.ended:
            self.refusal = error
            if self.on_refused is not None:
                self.on_refused()

    def end(self) -> None:
        """Gives everything back. The handler's later calls charge nobody."""
        if self.ended:
            return
        self.ended = True
        self._release(STREAM_BYTES + sum(self._waiting) + self._in_hand + self._kept)
        self._waiting.clear()
        self._in_hand = self._kept = 0

    # ---- for the handler ------------------------------------------------------------------------

    def take_up(self) -> None:
        self.taken_up = True
        self._wake()

    def approve(self) -> None:
        """The call has a valid token: messages of full size may pass."""
        self.approved = True
        self._wake()

    def stay_small(self) -> None:
        """The call needs no token, so larger messages are refused instead of held."""
        self._small = True
        self._wake()

    def took(self) -> None:
        """The handler has the next message; the one before is finished."""
        self.finish_message()
        if self._waiting:
            self._in_hand = self._waiting.popleft()
        self._wake()

    def finish_message(self) -> None:
        """The handler is done with the message that it took. Only what it kept stays charged."""
        cost, self._in_hand = self._in_hand, 0
        self._release(cost)

    def keep(self, size_bytes: int) -> None:
        """Charges memory for objects made from a message, until `release` or the end. Raises
        TooManyLoadsError."""
        if self.ended:
            return
        if not self._memory.take(self.uid, size_bytes):
            raise self.no_memory()
        self._kept += size_bytes

    def release(self, size_bytes: int) -> None:
        if not self.ended:
            self._kept -= size_bytes
            self._release(size_bytes)

    def no_memory(self) -> TooManyLoadsError:
        return TooManyLoadsError(
            f"the requests of uid {self.uid} hold {self._memory.used_by(self.uid)} bytes of the daemon's "
            f"memory, and those of all users {self._memory.used} of {self._memory.total}: send fewer at a "
            "time, or try again in a moment"
        )

    # ---- inside ---------------------------------------------------------------------------------

    def _admit_message(self, compressed: int, size_bytes: int) -> bool:
        if compressed:
            self.refuse(
                InvalidRequestError(
                    "the request message is compressed, which penstockd does not take; send it plain"
                )
            )
            return False
        if size_bytes > MAX_MESSAGE_BYTES:
            self.refuse(
                InvalidRequestError(
                    f"the request message has {size_bytes} bytes, and penstockd takes at most "
                    f"{MAX_MESSAGE_BYTES}: update penstock, whose clients send a long list of tensor names "
                    "in several messages, or select fewer tensors"
                )
            )
            return False
        if not self.approved and (
            size_bytes > UNAPPROVED_MESSAGE_BYTES or len(self._waiting) >= UNAPPROVED_MESSAGES
        ):
            if self._small and size_bytes > UNAPPROVED_MESSAGE_BYTES:
                self.refuse(
                    InvalidRequestError(
                        f"the request message has {size_bytes} bytes, and this call takes at most "
                        f"{UNAPPROVED_MESSAGE_BYTES}; send a smaller one"
                    )
                )
            return False
        if len(self._waiting) >= MAX_WAITING_MESSAGES:
            return False
        cost = _PREFIX_BYTES + size_bytes + MESSAGE_OVERHEAD_BYTES
        self.starved = not self._memory.take(self.uid, cost)
        if self.starved:
            return False
        self._waiting.append(cost)
        self._remaining = size_bytes
        self.messages += 1
        return True

    def _charge_frame(self) -> bool:
        """Charges one more frame of a message that has begun. False: the message is refused."""
        if self.refusal is not None:
            return False
        if not self._memory.take(self.uid, FRAME_OVERHEAD_BYTES):
            self.refuse(self.no_memory())
            return False
        self._waiting[-1] += FRAME_OVERHEAD_BYTES  # it is not complete, so the handler has not taken it
        return True

    def _release(self, size_bytes: int) -> None:
        if size_bytes:
            self._memory.release(self.uid, size_bytes)
            self._freed()
