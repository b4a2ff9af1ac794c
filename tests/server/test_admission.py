"""How loads come into the staging buffer: what they wait for ends, what fails is told, nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from penstock.server.admission import CHOICE_SECONDS, WAITS_FOR_CHOICE, Listing, Parts, Request
from penstock.server.errors import (
    InvalidRequestError,
)
from penstock.server.fair import FairExecutor
from penstock.server.handoff import Session
from penstock.server.load import Load

from .bench import Bench, running
from .support import ROOT, advance, on_clock_loop, open_fds, turns


class Client:
    """Who asks, with what it was told and got."""

    uid, pid, closed = 0, 1, False

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.fds: list[int] = []
        self.releases: dict[object, Callable[[], None]] = {}

    def on_close(self, release: Callable[[], None]) -> Callable[[], object]:
        key = object()
        self.releases[key] = release
        return lambda: self.releases.pop(key, None)

    async def send_slabs(self, fds: list[int]) -> None:
        self.fds = fds

    async def hear(self, event: object) -> None:
        self.told.append(event)

    def go(self) -> None:
        for release in self.releases.values():
            release()


@asynccontextmanager
async def parts() -> AsyncIterator[tuple[Bench, Parts]]:
    async with running() as bench:
        threads = FairExecutor(2, "test")
        yield bench, Parts(bench.catalog, bench.staging, bench.totals, lambda _: threads, threads)
        threads.shutdown()


def load(client: Client, made_of: Parts, path: Path, **fields: Any) -> Load:
    return Load(Request((str(path),), **fields), cast(Session, client), ROOT, made_of)


@on_clock_loop
async def test_a_load_whose_client_never_chooses_ends_after_a_while(make: Callable[..., Path]) -> None:
    path = make("a", 2)
    async with parts() as (_, made_of):
        client = Client()
        one = load(client, made_of, path, list_tensors=True)
        running = asyncio.ensure_future(one.run(client.hear))
        while not client.told:
            await turns(1)
        assert isinstance(client.told[0], Listing)
        assert one.waits_for == WAITS_FOR_CHOICE
        advance(CHOICE_SECONDS - 1)
        await turns()
        assert not running.done()
        advance(2)
        with pytest.raises(InvalidRequestError, match=f"no choice came within {CHOICE_SECONDS:.0f} s"):
            await running
        assert str(path) not in open_fds().values()


@on_clock_loop
async def test_a_client_that_does_not_take_the_listing_has_no_longer(make: Callable[..., Path]) -> None:
    async with parts() as (_, made_of):

        async def never_takes(event: object) -> None:
            await asyncio.Event().wait()

        one = load(Client(), made_of, make("a", 2), list_tensors=True)
        running = asyncio.ensure_future(one.run(never_takes))
        while one.waits_for != WAITS_FOR_CHOICE:
            await turns(1)
        advance(CHOICE_SECONDS + 1)
        with pytest.raises(InvalidRequestError, match="no choice"):
            await running


@on_clock_loop
async def test_a_client_that_takes_its_time_and_then_chooses_gets_its_tensors(
    make: Callable[..., Path],
) -> None:
    async with parts() as (_, made_of):
        client = Client()
        one = load(client, made_of, make("a", 2), list_tensors=True)
        running = asyncio.ensure_future(one.run(client.hear))
        while not client.told:
            await turns(1)
        advance(CHOICE_SECONDS - 1)
        one.choose(["t1"])
        await running
        assert client.fds
        client.go()
