"""How loads come into the staging buffer: what they wait for ends, what fails is told, nothing is left."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from penstock.server.checkpoint.catalog import NO_WISH, Catalog
from penstock.server.checkpoint.files import Checkpoint
from penstock.server.errors import (
    CheckpointCorruptError,
    InvalidRequestError,
    PenstockError,
    SessionRequiredError,
)
from penstock.server.loads.admission import WAITS_FOR_CHOICE
from penstock.server.loads.load import Load
from penstock.server.loads.prefetch import Prefetch
from penstock.server.loads.request import Listing, LoadContext, Request
from penstock.server.loads.selecting import CHOICE_SECONDS
from penstock.server.sources import Access
from penstock.server.sources.verification import Wish
from penstock.server.staging.reading.verifying import Verifier
from penstock.server.system.failure import NoThreadError
from penstock.server.system.fair import FairExecutor

from ..support import ROOT, advance, on_clock_loop, open_fds, turns
from .context import load_context


class Client:
    """Who asks, with what it was told and got."""

    pid, closed = 1, False

    def __init__(self, uid: int = 0) -> None:
        self.uid = uid
        self.told: list[Any] = []
        self.fds: list[int] = []
        self.releases: dict[object, Callable[[], None]] = {}

    def on_close(self, release: Callable[[], None]) -> Callable[[], object]:
        key = object()
        self.releases[key] = release
        return lambda: self.releases.pop(key, None)

    async def send_slabs(self, fds: Sequence[int]) -> None:
        self.fds = list(fds)

    def send_failure(self, error: PenstockError, load_id: str) -> None:
        self.told.append(error)

    async def hear(self, event: object) -> None:
        self.told.append(event)

    def go(self) -> None:
        for release in self.releases.values():
            release()


def load(client: Client, context: LoadContext, path: Path, **fields: Any) -> Load:
    access = Access(client.uid, privileged=not client.uid, prefixes=())
    return Load(Request((str(path),), **fields), client, access, context)


@on_clock_loop
async def test_a_load_whose_client_never_chooses_ends_after_a_while(make: Callable[..., Path]) -> None:
    path = make("a", 2)
    async with load_context() as (_, context):
        client = Client()
        one = load(client, context, path, list_tensors=True)
        running = asyncio.ensure_future(one.run(client.hear))
        while not client.told:
            await turns(1)
        assert isinstance(client.told[0], Listing)
        assert one.waits_for == WAITS_FOR_CHOICE
        advance(CHOICE_SECONDS - 1)
        await turns()
        assert not running.done()
        advance(2)
        with pytest.raises(InvalidRequestError, match=f"chose no tensors within {CHOICE_SECONDS:.0f} s"):
            await running
        assert str(path) not in open_fds().values()


@on_clock_loop
async def test_a_client_that_does_not_take_the_listing_has_no_longer(make: Callable[..., Path]) -> None:
    async with load_context() as (_, context):

        async def never_takes(event: object) -> None:
            await asyncio.Event().wait()

        one = load(Client(), context, make("a", 2), list_tensors=True)
        running = asyncio.ensure_future(one.run(never_takes))
        while one.waits_for != WAITS_FOR_CHOICE:
            await turns(1)
        advance(CHOICE_SECONDS + 1)
        with pytest.raises(InvalidRequestError, match="chose no tensors"):
            await running


@on_clock_loop
async def test_a_client_that_takes_its_time_and_then_chooses_gets_its_tensors(
    make: Callable[..., Path],
) -> None:
    async with load_context() as (_, context):
        client = Client()
        one = load(client, context, make("a", 2), list_tensors=True)
        running = asyncio.ensure_future(one.run(client.hear))
        while not client.told:
            await turns(1)
        advance(CHOICE_SECONDS - 1)
        one.choose(["t1"])
        await running
        assert client.fds
        client.go()


@on_clock_loop
async def test_a_client_that_goes_when_its_last_slab_was_sent_gets_nothing_more(
    make: Callable[..., Path],
) -> None:
    class Leaving(Client):
        async def send_slabs(self, fds: Sequence[int]) -> None:
            await super().send_slabs(fds)
            self.closed = True
            self.go()

    async with load_context() as (bench, context):
        client = Leaving()
        with pytest.raises(SessionRequiredError, match="load it again"):
            await load(client, context, make("a", 2)).run(client.hear)
        assert client.fds
        assert not client.told
        assert not any(entry.holders for entry in bench.staging.entries.values())


# ---- who resolves -------------------------------------------------------------------------------


class HangingCatalog:
    """Resolves what one user names only when the test lets it."""

    def __init__(self, catalog: Catalog, uid: int) -> None:
        self._catalog = catalog
        self._uid = uid
        self.go_on = threading.Event()

    def resolve(
        self, sources: Sequence[str], access: Access, variant: str = "", wish: Wish = NO_WISH
    ) -> Checkpoint:
        if access.uid == self._uid:
            assert self.go_on.wait(60)
        return self._catalog.resolve(sources, ROOT)


@on_clock_loop
async def test_what_one_user_has_resolved_keeps_no_other_user_s_load_waiting(
    make: Callable[..., Path],
) -> None:
    """Though its loads are many, take very long, and came first."""
    path = make("a", 1)
    async with load_context() as (bench, context):
        catalog = HangingCatalog(bench.catalog, 70001)
        context = dataclasses.replace(context, catalog=cast(Catalog, catalog))
        greedy = [Client(70001) for _ in range(50)]
        hanging = [asyncio.ensure_future(load(client, context, path).run(client.hear)) for client in greedy]
        await turns()
        modest = Client(70002)
        await load(modest, context, path).run(modest.hear)
        assert modest.fds
        modest.go()
        catalog.go_on.set()
        await asyncio.gather(*hanging)
        for client in greedy:
            client.go()


# ---- what is left -------------------------------------------------------------------------------


@on_clock_loop
async def test_prefetches_leave_nothing_at_the_session_that_asked_for_them(
    make: Callable[..., Path],
) -> None:
    """One session may ask for any number of them."""
    path = make("a", 1)
    async with load_context() as (_, context):
        client = Client()
        for _number in range(20):
            await Prefetch(Request((str(path),)), client, ROOT, context, pin=False).run(client.hear)
        assert not client.releases


@on_clock_loop
async def test_a_load_that_finds_no_thread_leaves_nothing(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make("a", 1)

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with load_context() as (_, context):
        client = Client()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(NoThreadError):
                await load(client, context, path).run(client.hear)
        assert not client.releases
        await load(client, context, path).run(client.hear)
        assert client.fds
        client.go()


@on_clock_loop
async def test_a_load_of_all_tensors_does_not_wait_while_others_names_are_looked_up(
    make: Callable[..., Path],
) -> None:
    async with load_context() as (_, context):
        selector, go_on = FairExecutor(1, "selector"), threading.Event()
        looking_up = selector.submit(70001, go_on.wait, 60)
        try:
            one = Client()
            context = dataclasses.replace(context, selector=selector)
            await load(one, context, make("a", 1)).run(one.hear)
            assert one.fds
            assert not looking_up.done()
            one.go()
        finally:
            go_on.set()
            selector.shutdown()


@on_clock_loop
async def test_a_header_that_arrived_in_two_ways_is_forgotten_before_its_load_hears_of_it(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with load_context() as (_, context):
        forgotten: list[CheckpointCorruptError] = []
        error = CheckpointCorruptError("its header arrived in two ways; load it again")
        monkeypatch.setattr(Verifier, "damaged_header", lambda self, checkpoint: error)
        client = Client()
        one = load(client, dataclasses.replace(context, on_corrupt=forgotten.append), make("a", 2))
        with pytest.raises(CheckpointCorruptError):
            await one.run(client.hear)
        assert forgotten == [error]
