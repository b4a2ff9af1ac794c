"""Whose turn it is to be answered."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from penstock.server.edge import service

from ..support import advance, on_clock_loop, until

ANNE, BERT = 1201, 1202


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
