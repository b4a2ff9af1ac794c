"""The memory of answers that their clients have not received yet, bounded for each user and in all.

gRPC keeps one message of a call until the client reads, however long that takes: a client in a debugger may
stop for hours. So before a message is made, its largest cost is charged to the user's share. When calls whose
clients do not read have used up the share, the next message waits for one of them. That holds up only the
same user. No call is ever cut off because its client reads slowly.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable

from ..system.quota import Quota

ANSWER_BYTES = 24 << 20
"""The total for all users. A user with no waiting message may always send one message more."""
COPIES = 2
"""A message that waits exists twice: in Python and in gRPC."""


class Answers:
    """Lives on the event loop."""

    def __init__(self, total_bytes: int = ANSWER_BYTES) -> None:
        self._quota = Quota(total_bytes, newcomers=0)
        self._beyond: set[int] = set()
        """Users who are sending the one message beyond their quota."""
        self._waiting: deque[tuple[int, int, asyncio.Future[bool]]] = deque()

    @contextlib.asynccontextmanager
    async def room(self, uid: int, most_bytes: int) -> AsyncIterator[Callable[[int], None]]:
        """Memory for a message of at most `most_bytes`, until the client received it. Waits if there is too
        little; messages of one user wait in order. Yields a function that takes the message's real size."""
        cost = COPIES * most_bytes
        beyond = self._take(uid, cost)
        if beyond is None:
            beyond = await self._wait(uid, cost)

        def settle(size_bytes: int) -> None:
            nonlocal cost
            left_over = cost - COPIES * size_bytes
            if left_over > 0 and not beyond:
                cost -= left_over
                self._release(uid, left_over, False)

        try:
            yield settle
        finally:
            self._release(uid, cost, beyond)

    def _take(self, uid: int, cost: int) -> bool | None:
        """Whether it goes beyond the quota; None: it has to wait."""
        if any(waiting == uid for waiting, _, _ in self._waiting):
            return None
        return self._take_now(uid, cost)

    def _take_now(self, uid: int, cost: int) -> bool | None:
        if self._quota.take(uid, cost):
            return False
        if uid in self._beyond or self._quota.used_by(uid):
            return None
        self._beyond.add(uid)
        return True

    async def _wait(self, uid: int, cost: int) -> bool:
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        entry = (uid, cost, turn)
        self._waiting.append(entry)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release(uid, cost, turn.result())
            else:
                self._waiting.remove(entry)
                self._serve()
            raise

    def _release(self, uid: int, cost: int, beyond: bool) -> None:
        if beyond:
            self._beyond.discard(uid)
        else:
            self._quota.release(uid, cost)
        self._serve()

    def _serve(self) -> None:
        held_up: set[int] = set()
        for entry in list(self._waiting):
            uid, cost, future = entry
            if uid in held_up or future.done():
                continue
            beyond = self._take_now(uid, cost)
            if beyond is None:
                held_up.add(uid)
            else:
                self._waiting.remove(entry)
                future.set_result(beyond)
