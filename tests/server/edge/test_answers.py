"""What waits for clients, and what of a caller's text is kept."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.server.edge import service
from penstock.server.edge.allowance import Allowance
from penstock.server.edge.answers import COPIES, Answers
from penstock.server.edge.service import MAX_MESSAGE_BYTES, to_status
from penstock.server.errors import CheckpointNotFoundError, InvalidRequestError
from penstock.server.loads.names import MAX_UNPACKED_BYTES, NAME_COST_BYTES, Names
from penstock.server.system import quota
from penstock.server.system.shown import SHOWN_BYTES, cut, shown_sources
from penstock.v1 import streamer_pb2 as pb

from ..support import advance, on_clock_loop, turns, until

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


def test_an_allowance_may_be_overdrawn_and_fills_up_again() -> None:
    allowance = Allowance(10, 20, now=0.0)
    allowance.spend(20, 0.0)
    assert allowance.wait_seconds(0.0) == 0
    allowance.spend(5, 0.0)
    assert allowance.wait_seconds(0.0) == 0.5
    assert allowance.wait_seconds(0.25) == 0.25
    assert not allowance.is_full(2.0)
    assert allowance.is_full(100.0)
    allowance.spend(21, 100.0)
    assert allowance.wait_seconds(100.0) > 0


def test_names_are_counted_packed_and_given_back_once() -> None:
    held = [0]
    names = Names(
        lambda count: held.__setitem__(0, held[0] + count), lambda c: held.__setitem__(0, held[0] - c)
    )
    names.add(pb.SelectTensors(names=["a", "b"], more=True))
    assert names.more
    names.add(pb.SelectTensors(names=["c"]))
    assert not names.more
    assert list(names) == list(names) == ["a", "b", "c"]
    assert 0 < held[0] < 20
    names.close()
    names.close()
    assert held == [0]


def test_names_that_would_be_too_many_unpacked_are_refused() -> None:
    names = Names(lambda count: None, lambda count: None)
    with pytest.raises(InvalidRequestError, match="more than penstockd looks up at once"):
        names.add(pb.SelectTensors(names=[""] * (MAX_UNPACKED_BYTES // NAME_COST_BYTES)))


def test_names_of_wide_characters_count_as_the_strings_that_they_become() -> None:
    """One wide character makes all of its string four times as long."""
    count = MAX_UNPACKED_BYTES // 10_000
    for name in ("x" * 8000, "\U0001f600" + "x" * 8000):
        names = Names(lambda count: None, lambda count: None)
        part = pb.SelectTensors(names=[name] * count)
        if name.isascii():
            names.add(part)
        else:
            with pytest.raises(InvalidRequestError, match="more than penstockd looks up at once"):
                names.add(part)


@pytest.mark.parametrize("text", ["x" * 5000, "\U0001f600" + "x" * 5000, "é" * 5000])
def test_texts_that_a_load_keeps_are_charged_as_the_strings_that_they_are(text: str) -> None:
    kept: list[int] = []
    call: Any = SimpleNamespace(stream=SimpleNamespace(keep=kept.append))
    sources = service._kept_sources(call, [text] * 10)
    assert kept == [sum(map(sys.getsizeof, sources)) + 10 * service.SOURCE_COST_BYTES]
    digests = service._kept_digests(call, {text: "0" * 64})
    assert kept[1] > sum(map(sys.getsizeof, (*digests, *digests.values())))


@on_clock_loop
async def test_a_user_who_asks_for_status_without_end_waits_and_no_other_does() -> None:
    nothing: Any = None
    answering = service.StreamerService(nothing, nothing, nothing)
    loop = asyncio.get_running_loop()
    answered: list[tuple[int, float]] = []

    async def ask(uid: int) -> None:
        session: Any = SimpleNamespace(uid=uid)
        await answering._status_turn(session)
        answered.append((uid, loop.time()))

    began = loop.time()
    asking = [asyncio.ensure_future(ask(uid)) for uid in (ANNE, ANNE, ANNE, BERT, 0, 0)]
    await until(lambda: len(answered) == 4)
    assert {at for _, at in answered} == {began}
    assert sorted(uid for uid, _ in answered) == [0, 0, ANNE, BERT]
    advance(service.STATUS_SECONDS)
    await until(lambda: len(answered) == 5)
    advance(service.STATUS_SECONDS)
    await until(lambda: len(answered) == 6)
    assert [uid for uid, _ in answered[4:]] == [ANNE, ANNE]
    await asyncio.gather(*asking)
    advance(10 * service.STATUS_SECONDS)
    await ask(BERT)
    assert set(answering._status_turns) == {BERT}, "who asks no more is forgotten"


@pytest.mark.parametrize("text", ["x" * 5000, "\U0001f600" * 5000, "é%" * 5000])
@pytest.mark.parametrize("size", [len, lambda text: len(text.encode())])
def test_a_text_is_cut_to_its_bound_with_a_mark(text: str, size: Callable[[str], int]) -> None:
    shown = cut(text, size=size)
    assert SHOWN_BYTES - 8 <= size(shown) <= SHOWN_BYTES
    kept, _, mark = shown.partition("...[")
    assert text.startswith(kept)
    assert mark == f"{len(text) - len(kept)} more characters]"
    assert cut("short", size=size) == "short"


def test_sources_are_cut_together() -> None:
    assert shown_sources(["/a"] * 20) == ["/a"] * 16
    assert sum(map(len, shown_sources(["/" + "x" * 8000] * 20))) <= SHOWN_BYTES


@pytest.mark.parametrize("text", ["x", "%", "\n", "é", "\U0001f600", "\udcff"])
def test_an_error_of_any_text_fits_into_trailers(text: str) -> None:
    error = CheckpointNotFoundError(text * 5000, **{f"key{number}": text * 5000 for number in range(20)})
    status = to_status(error, "12345678")
    encoded = sum(1 if 32 <= byte < 127 and byte != 37 else 3 for byte in status.message.encode())
    assert 400 < encoded <= MAX_MESSAGE_BYTES
    assert encoded + len(status.SerializeToString()) * 4 / 3 < 7500
