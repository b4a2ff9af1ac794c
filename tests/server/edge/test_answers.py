"""The memory of answers that wait for their clients."""

from __future__ import annotations

import asyncio

import pytest

from penstock.server.edge.answers import COPIES, Answers
from penstock.server.system import quota

from ..support import turns, until

ANNE, BERT = 1201, 1202


class Message:
    """One that was made, and waits for its client until `read`."""

    def __init__(self, answers: Answers, uid: int, most_bytes: int, size_bytes: int | None = None) -> None:
        self.made = False
        self._read = asyncio.Event()
        self._size_bytes = most_bytes if size_bytes is None else size_bytes
        self.task = asyncio.ensure_future(self._send(answers, uid, most_bytes))

    async def _send(self, answers: Answers, uid: int, most_bytes: int) -> None:
        async with answers.room(uid, most_bytes) as settle:
            self.made = True
            settle(self._size_bytes)
            await self._read.wait()

    async def read(self) -> None:
        self._read.set()
        await self.task


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    monkeypatch.setattr(quota, "is_privileged", lambda uid: False)
    return Answers(COPIES * 1000)


async def test_messages_that_nobody_reads_hold_up_their_user_and_no_other(answers: Answers) -> None:
    stuck = [Message(answers, ANNE, 100) for _ in range(10)]
    await turns()
    assert [message.made for message in stuck] == [True] * 7 + [False] * 3  # 7/8 of what is not the reserve
    other = Message(answers, BERT, 100)
    await until(lambda: other.made)
    await other.read()
    await stuck[0].read()
    await until(lambda: stuck[7].made)
    assert not stuck[8].made
    for message in stuck[1:]:
        await message.read()
    assert answers._quota.used == 0


async def test_a_user_with_nothing_waiting_may_always_send_one(answers: Answers) -> None:
    large = Message(answers, ANNE, 5000)
    await until(lambda: large.made)
    second = Message(answers, ANNE, 5000)
    other = Message(answers, BERT, 5000)
    await until(lambda: other.made)
    assert not second.made
    await large.read()
    await until(lambda: second.made)
    await second.read()
    await other.read()


async def test_what_a_message_does_not_need_is_others_at_once(answers: Answers) -> None:
    small = [Message(answers, ANNE, 700, 10) for _ in range(5)]
    await until(lambda: all(message.made for message in small))
    for message in small:
        await message.read()
    assert answers._quota.used == 0


async def test_a_message_that_is_cancelled_in_the_queue_leaves_its_place(answers: Answers) -> None:
    first, second, third = (Message(answers, ANNE, 600) for _ in range(3))
    await until(lambda: first.made)
    second.task.cancel()
    await first.read()
    await until(lambda: third.made)
    await third.read()
    assert answers._quota.used == 0
    assert not second.made
