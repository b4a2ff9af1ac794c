"""What a warm set keeps warm: real files, and a buffer of 8 slabs of 2 MiB.

Time passes only when a test says so.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.server.checkpoint.files import Checkpoint
from penstock.server.loads.control import Control
from penstock.server.loads.fetch import FetchContext
from penstock.server.loads.request import LoadContext
from penstock.server.loads.warm import keeper as keeper_module
from penstock.server.loads.warm.features import EXPIRY_SECONDS, REFRESH_SECONDS, replace_file, text
from penstock.server.loads.warm.keeper import Keeper
from penstock.server.loads.warm.warm_set import WarmSet
from penstock.server.loads.warm.warm_up import WarmUp
from penstock.server.sources import Access, SourceFile
from penstock.server.sources.stores import FLAGS
from penstock.server.staging.entry import CacheEntry
from penstock.server.system.quota import Quota

from ...bench import Bench
from ...support import MIB, SLAB_BYTES, advance, at_rest, on_clock_loop, until, until_advanced
from ...tier.bench import Thing, tier_in
from ..context import load_context

Make = Callable[..., Path]
INTERVAL_SECONDS = 300.0


class Node:
    """A daemon's warm set, and the file that it watches."""

    def __init__(self, bench: Bench, context: LoadContext, directory: Path, features: Path | None) -> None:
        self.bench = bench
        self.file = directory / "warm-set.yaml"
        fetching = FetchContext(
            (),
            context.resolvers,
            bench.totals,
            bench.catalog.keep.budget,
            bench.catalog.descriptors,
            Quota(0),
        )
        self.context = context
        self.control = Control(context, fetching, max_loads=100, prefixes=(), on_failed=lambda *_, **__: None)
        self.set = WarmSet(
            self.file,
            context,
            self.control.run,
            stores=[flags.locators for flags in FLAGS],
            interval_seconds=INTERVAL_SECONDS,
            features=features,
            name_tier_files=bench.tier_files.name if bench.tier is not None else None,
        )

    def write(self, *entries: dict[str, Any]) -> None:
        """Puts a file in the place of the one before."""
        self.write_text(json.dumps({"checkpoints": entries}))

    def write_text(self, content: str) -> None:
        beside = self.file.with_suffix(".new")
        beside.write_text(content)
        beside.replace(self.file)

    @property
    def states(self) -> dict[str, str]:
        return {keeper.wish.name: keeper.state for keeper in self.set.keepers}

    def keeper(self, name: str) -> Keeper:
        return next(keeper for keeper in self.set.keepers if keeper.wish.name == name)

    def entry(self, name: str) -> CacheEntry:
        entry = self.keeper(name).entry
        assert entry is not None
        return entry

    async def until_states(self, **states: str) -> None:
        """Time passes meanwhile, but less than the interval, and not while threads work for the set."""
        await until_advanced(lambda: self.states == states, step_seconds=0.1)

    async def load(self, path: Path, *, leave: bool = True, **options: Any) -> CacheEntry:
        visit = self.bench.enter(path, **options)
        await visit.read(release=False)
        if leave:
            visit.leave()
        return visit.entry


@asynccontextmanager
async def node(tmp_path: Path, *, features: Path | None = None, **config: Any) -> AsyncIterator[Node]:
    directory = tmp_path / "config"
    directory.mkdir()
    async with load_context(**config) as (bench, context):
        made = Node(bench, context, directory, features)
        running = asyncio.ensure_future(made.set.run())
        try:
            yield made
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


# ---- reconciling ---------------------------------------------------------------------------------


@on_clock_loop
async def test_what_is_new_is_staged_and_what_is_gone_is_unpinned(make: Make, tmp_path: Path) -> None:
    one, two = make("one", 2), make("two", 2)
    async with node(tmp_path) as warm:
        warm.write({"name": "one", "source": str(one), "pin": True})
        await warm.until_states(one="warm")
        first = warm.entry("one")
        assert (first.state, first.pinned, first.wanted) == ("warm", True, True)
        read = warm.bench.totals.read_bytes
        warm.write({"name": "two", "source": str(two)}, {"name": "one", "source": str(one)})
        await warm.until_states(two="warm", one="warm")
        assert warm.entry("one") is first
        assert (first.pinned, first.wanted) == (False, True)
        assert warm.entry("two").pinned is False
        assert warm.bench.totals.read_bytes > read
        warm.write({"name": "two", "source": str(two)})
        await warm.until_states(two="warm")
        assert (first.state, first.pinned, first.wanted) == ("warm", False, False)
        warm.write()
        await warm.until_states()
        assert len(warm.bench.staging.entries) == 2


@on_clock_loop
async def test_only_tensors_that_match_a_pattern_are_staged(make: Make, tmp_path: Path) -> None:
    path = make("one", 4)
    async with node(tmp_path) as warm:
        warm.write({"name": "one", "source": str(path), "tensors": ["t[12]", "none"]})
        await warm.until_states(one="warm")
        assert warm.keeper("one").progress == (2 * MIB, 2 * MIB)
        warm.write({"name": "one", "source": str(path), "tensors": "x*"})
        await warm.until_states(one="failed")
        assert "no tensor whose name matches 'x*'" in warm.keeper("one").reason


@on_clock_loop
async def test_a_broken_version_of_the_file_keeps_the_one_before_in_force(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make("one", 2)
    async with node(tmp_path) as warm:

        def told(problem: str) -> bool:
            return any(problem in one for one in warm.set.problems)

        await until_advanced(lambda: warm.set.problems)
        assert "it cannot be read (No such file or directory); put it there" in warm.set.problems[0]
        warm.write({"name": "one", "source": str(path), "pin": True})
        await warm.until_states(one="warm")
        assert warm.set.problems == ()
        broken = {"checkpoints: 3": "line 1: checkpoints: is not a list", "": "it is empty"}
        for content, problem in broken.items():
            warm.write_text(content)
            await until_advanced(functools.partial(told, problem))
            assert warm.states == {"one": "warm"}
            assert warm.entry("one").pinned
        warm.file.unlink()
        await until_advanced(lambda: told("cannot be read"))
        warm.file.mkdir()
        await until_advanced(
            lambda: "Is a directory" in warm.set.problems[0] or "no file" in warm.set.problems[0]
        )
        assert warm.states == {"one": "warm"}
        warm.file.rmdir()
        os.mkfifo(warm.file)
        await until_advanced(lambda: told("it is a device or a pipe; put a file in its place"))
        warm.file.unlink()
        warm.write({"name": "two", "source": str(path)})
        await warm.until_states(two="warm")
        assert warm.set.problems == ()
        logged = [record for record in caplog.records if record.message == "warm set is broken"]
        assert len(logged) >= 4


@on_clock_loop
async def test_a_file_that_inotify_tells_nothing_of_is_looked_at_now_and_then(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another machine writes it."""
    monkeypatch.setattr("penstock.server.system.directory.DirectoryEvents.watch", lambda self: False)
    path = make("one", 2)
    async with node(tmp_path) as warm:
        await until(lambda: warm.set.problems)
        warm.write({"name": "one", "source": str(path)})
        await until_advanced(lambda: warm.states == {"one": "warm"})


# ---- versions ------------------------------------------------------------------------------------


@on_clock_loop
async def test_a_new_version_is_noticed_after_the_interval_and_staged_beside_the_old_one(
    make: Make, tmp_path: Path
) -> None:
    path = make("one", 3)
    async with node(tmp_path) as warm:
        warm.write({"name": "one", "source": str(path), "pin": True})
        await warm.until_states(one="warm")
        old = warm.entry("one")
        read = warm.bench.totals.read_bytes
        make("one", 3)
        for _ in range(20):
            advance(INTERVAL_SECONDS * (1 - keeper_module.JITTER) / 30)
            await at_rest()
        assert warm.entry("one") is old
        enter, beside = warm.bench.staging.enter, []

        def entered(*given: Any, **named: Any) -> CacheEntry:
            made = enter(*given, **named)
            beside.append(not old.closed)
            return made

        warm.bench.staging.enter = entered  # type: ignore[method-assign]
        keeper = warm.keeper("one")
        await until_advanced(lambda: keeper.state == "warm" and keeper.entry is not old)
        assert beside == [True]
        assert old.closed
        assert warm.entry("one").pinned
        assert warm.bench.totals.read_bytes == read + warm.keeper("one").progress[1]
        assert len(warm.bench.staging.entries) == 1


@on_clock_loop
async def test_a_new_version_takes_the_memory_of_the_old_one_where_there_is_no_other(
    make: Make, tmp_path: Path
) -> None:
    path = make("one", 5)
    async with node(tmp_path) as warm:
        warm.write({"name": "one", "source": str(path), "pin": True})
        await warm.until_states(one="warm")
        old = warm.entry("one")
        make("one", 5)
        await until_advanced(lambda: old.closed, step_seconds=5)
        await warm.until_states(one="warm")
        assert warm.entry("one").pinned


@on_clock_loop
async def test_looking_for_a_new_version_opens_each_file_once_and_reads_nothing(
    make: Make, tmp_path: Path
) -> None:
    path = make("one", 2)
    async with node(tmp_path) as warm:
        opened: list[str] = []
        (source, *_) = warm.bench.catalog._sources
        really = source.open

        def counted(location: str, access: Access) -> SourceFile:
            opened.append(location)
            return really(location, access)

        source.open = counted  # type: ignore[method-assign]
        warm.write({"name": "one", "source": str(path)})
        await warm.until_states(one="warm")
        read, checked = warm.bench.totals.read_bytes, warm.keeper("one").checked_at
        opened.clear()
        await until_advanced(lambda: warm.keeper("one").checked_at != checked)
        assert opened == [str(path)]
        assert warm.bench.totals.read_bytes == read
        assert warm.bench.totals.loads_that("ok") == 1


@on_clock_loop
async def test_what_cannot_be_read_fails_with_the_reason_and_is_tried_again(
    make: Make, tmp_path: Path
) -> None:
    path = tmp_path / "one.safetensors"
    async with node(tmp_path) as warm:
        warm.write({"name": "one", "source": str(path)})
        await warm.until_states(one="failed")
        assert "does not exist" in warm.keeper("one").reason
        make("one", 2)
        await warm.until_states(one="warm")
        assert warm.keeper("one").reason == ""


# ---- memory --------------------------------------------------------------------------------------


@on_clock_loop
async def test_what_does_not_fit_says_so_with_both_numbers_and_comes_when_there_is_room(
    make: Make, tmp_path: Path
) -> None:
    big, small, huge = make("big", 6), make("small", 3), make("huge", 9)
    async with node(tmp_path) as warm:
        entries = [
            {"name": name, "source": str(path), "pin": True}
            for name, path in (("big", big), ("small", small))
        ]
        warm.write(*entries, {"name": "huge", "source": str(huge)})
        await warm.until_states(big="warm", small="does_not_fit", huge="does_not_fit")
        small_one, huge_one = warm.keeper("small"), warm.keeper("huge")
        assert (small_one.needed_bytes, small_one.left_bytes) == (3 * SLAB_BYTES, 2 * SLAB_BYTES)
        assert "it needs 6.3 MB, and 4.2 MB can be had" in small_one.reason
        assert huge_one.needed_bytes > huge_one.left_bytes == 8 * SLAB_BYTES
        assert warm.bench.queued == 0
        warm.write(*entries[1:])
        await warm.until_states(small="warm")


@on_clock_loop
async def test_two_that_fit_only_one_at_a_time_do_not_take_turns(make: Make, tmp_path: Path) -> None:
    async with node(tmp_path) as warm:
        warm.write(*({"name": name, "source": str(make(name, 5))} for name in ("one", "two")))
        await warm.until_states(one="warm", two="does_not_fit")
        first = warm.entry("one")
        for _ in range(20):
            advance(INTERVAL_SECONDS / 4)
            await at_rest()
        assert warm.entry("one") is first


@on_clock_loop
async def test_a_load_evicts_what_no_one_named_before_what_the_set_names(make: Make, tmp_path: Path) -> None:
    named, chance, other = make("named", 3), make("chance", 3), make("other", 3)
    async with node(tmp_path) as warm:
        warm.write({"name": "named", "source": str(named)})
        await warm.until_states(named="warm")
        advance(1)
        by_chance = await warm.load(chance)
        await warm.load(other)
        assert by_chance.closed
        assert warm.entry("named").state == "warm"


@on_clock_loop
async def test_what_was_evicted_for_a_load_comes_back_without_evicting_what_took_its_place(
    make: Make, tmp_path: Path
) -> None:
    named, big = make("named", 3), make("big", 7)
    async with node(tmp_path) as warm:
        warm.write({"name": "named", "source": str(named)})
        await warm.until_states(named="warm")
        large = await warm.load(big)
        await warm.until_states(named="does_not_fit")
        for _ in range(20):
            advance(5)
            await at_rest()
        assert not large.closed
        warm.bench.staging.evict(lambda entry: entry is large)
        await warm.until_states(named="warm")


@on_clock_loop
async def test_what_an_operator_evicts_comes_back_as_the_file_says(make: Make, tmp_path: Path) -> None:
    path = make("one", 2)
    async with node(tmp_path) as warm:
        warm.write({"name": "one", "source": str(path), "pin": True})
        await warm.until_states(one="warm")
        entry = warm.entry("one")
        warm.bench.staging.evict(lambda _: True)
        assert entry.closed
        await until_advanced(lambda: warm.states == {"one": "warm"} and warm.keeper("one").entry is not None)
        entry = warm.entry("one")
        visit = warm.bench.enter(path)
        warm.bench.staging.evict(lambda _: True)
        await until_advanced(lambda: entry.pinned)
        await visit.read()
        visit.leave()
        assert warm.entry("one") is entry


@on_clock_loop
async def test_without_a_limit_the_set_outlives_trim_after_and_goes_last_when_memory_is_short(
    make: Make, tmp_path: Path
) -> None:
    spare = [1 << 40]
    named, chance = make("named", 2), make("chance", 2)
    async with node(tmp_path, memory_limit=-1, spare=lambda: spare[0]) as warm:
        keeping = asyncio.ensure_future(warm.bench.staging.keep())
        warm.write({"name": "named", "source": str(named)})
        await warm.until_states(named="warm")
        entry = warm.entry("named")
        by_chance = await warm.load(chance)
        spare[0] = -1
        await until(lambda: by_chance.closed)
        spare[0] = 0
        assert not entry.closed
        await warm.load(chance)
        await until_advanced(lambda: len(warm.bench.staging.entries) == 1, step_seconds=10)
        assert not entry.closed
        spare[0] = -1
        await until(lambda: entry.closed)
        spare[0] = 0
        await warm.until_states(named="does_not_fit")
        spare[0] = 4 * SLAB_BYTES
        await warm.until_states(named="warm")
        keeping.cancel()


# ---- the local disk ------------------------------------------------------------------------------


@on_clock_loop
async def test_an_entry_that_asks_for_it_is_copied_to_the_local_disk_and_goes_there_last(
    make: Make, tmp_path: Path
) -> None:
    asked, other = make("asked", 2), make("other", 2)
    with tier_in(tmp_path / "tier", 8 * MIB) as tier:
        async with node(tmp_path, tier=tier) as warm:
            warm.write(
                {"name": "asked", "source": str(asked), "tier": True}, {"name": "other", "source": str(other)}
            )
            await warm.until_states(asked="warm", other="warm")
            size_bytes = asked.stat().st_size
            await until(lambda: tier.counts["written_bytes"] >= size_bytes)
            assert tier.version_count == 1, "the other entry did not ask for it"
            await until(lambda: not tier.writes)
            for number in range(2):
                Thing(3 * MIB, uri=f"s3://bucket/{number}").keep(tier)
            assert tier.has(str(asked)), "it went before what nobody asked for"
            warm.write()
            await warm.until_states()
            Thing(3 * MIB, uri="s3://bucket/2").keep(tier)
            assert not tier.has(str(asked)), "its pin outlived its entry"


@on_clock_loop
async def test_what_has_no_memory_and_is_on_the_local_disk_says_so(make: Make, tmp_path: Path) -> None:
    disk, large = make("disk", 5), make("large", 7)
    features = tmp_path / "features.d/penstock"
    features.parent.mkdir()
    with tier_in(tmp_path / "tier") as tier:
        async with node(tmp_path, tier=tier, features=features) as warm:
            entry = {"name": "disk", "source": str(disk), "tier": True}
            warm.write(entry)
            await warm.until_states(disk="warm")
            await until(lambda: tier.counts["written_bytes"] >= disk.stat().st_size)
            pinned = {"name": "large", "source": str(large), "pin": True}
            warm.write(pinned, entry)
            await warm.until_states(large="warm", disk="on_disk")
            keeper = warm.keeper("disk")
            assert keeper.needed_bytes > keeper.left_bytes
            assert "it needs" in keeper.reason
            labels = {"penstock.dev/disk-disk=true", "penstock.dev/warm-large=true"}
            await until_advanced(
                lambda: features.exists() and labels <= set(features.read_text().splitlines())
            )
            read = tier.counts["read_bytes"]
            warm.write(entry)
            await warm.until_states(disk="warm")
            assert tier.counts["read_bytes"] - read >= disk.stat().st_size - 64 * 1024


@pytest.mark.parametrize(("limit_bytes", "state"), [(64 * MIB, "on_disk"), (4 * MIB, "does_not_fit")])
@on_clock_loop
async def test_an_entry_without_memory_passes_to_the_local_disk_once(
    make: Make, tmp_path: Path, limit_bytes: int, state: str
) -> None:
    large, disk = make("large", 4), make("disk", 5)
    with tier_in(tmp_path / "tier", limit_bytes) as tier:
        async with node(tmp_path, tier=tier) as warm:
            warm.write(
                {"name": "large", "source": str(large), "pin": True},
                {"name": "disk", "source": str(disk), "tier": True},
            )
            keeper = warm.keeper

            await warm.until_states(large="warm", disk=state)
            await until(lambda: keeper("disk")._copied and len(warm.bench.staging.entries) == 1)
            size_bytes = disk.stat().st_size
            assert (tier.counts["written_bytes"] >= size_bytes) is (state == "on_disk")
            assert len(warm.bench.staging.entries) == 1
            read, checked = warm.bench.totals.read_bytes, keeper("disk").checked_at
            await until_advanced(lambda: keeper("disk").checked_at != checked, step_seconds=10)
            await at_rest()
            assert warm.bench.totals.read_bytes == read
            assert warm.states == {"large": "warm", "disk": state}


@on_clock_loop
async def test_an_entry_that_asks_for_a_disk_where_there_is_none_is_warm_and_says_so(
    make: Make, tmp_path: Path
) -> None:
    async with node(tmp_path) as warm:
        warm.write({"name": "one", "source": str(make("one", 2)), "tier": True})
        await warm.until_states(one="warm")
        assert warm.keeper("one").reason.startswith("nothing of it is kept on a local disk: give penstockd")


@on_clock_loop
async def test_an_entry_that_leaves_the_set_in_the_moment_when_it_is_staged_is_pinned_by_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged: list[CacheEntry] = []
    keep = WarmUp._keep

    def leaves(self: WarmUp, entry: CacheEntry) -> None:
        warm.set._reconcile([])
        keep(self, entry)
        staged.append(entry)

    monkeypatch.setattr(WarmUp, "_keep", leaves)
    path = make("one", 2)
    with tier_in(tmp_path / "tier", 8 * MIB) as tier:
        async with node(tmp_path, tier=tier) as warm:
            warm.write({"name": "one", "source": str(path), "pin": True, "tier": True})
            await until(lambda: staged)
            await at_rest()
            assert not staged[0].closed
            assert (staged[0].pinned, staged[0].wanted) == (False, False)
            await until(lambda: tier.counts["written_bytes"] >= path.stat().st_size and not tier.writes)
            for number in range(3):
                Thing(3 * MIB, uri=f"s3://bucket/{number}").keep(tier)
            assert not tier.has(str(path)), "its pin outlived its entry"


@on_clock_loop
async def test_a_pin_that_is_asked_for_while_an_entry_is_staged_counts(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = WarmUp._keep

    def meanwhile(self: WarmUp, entry: CacheEntry) -> None:
        warm.set._reconcile([replace(warm.keeper("one").wish, pin=True)])
        keep(self, entry)

    monkeypatch.setattr(WarmUp, "_keep", meanwhile)
    async with node(tmp_path) as warm:
        warm.write({"name": "one", "source": str(make("one", 2))})
        await warm.until_states(one="warm")
        assert warm.entry("one").pinned


@on_clock_loop
async def test_each_look_asks_anew_what_a_branch_is(make: Make, tmp_path: Path) -> None:
    path = make("one", 2)
    async with node(tmp_path) as warm:
        pins: list[object] = []
        (source, *_) = warm.bench.catalog._sources
        really = source.open

        def noted(location: str, access: Access) -> SourceFile:
            pins.append(access.pins)
            return really(location, access)

        source.open = noted  # type: ignore[method-assign]
        warm.write({"name": "one", "source": str(path)})
        await warm.until_states(one="warm")
        checked = warm.keeper("one").checked_at
        await until_advanced(lambda: warm.keeper("one").checked_at != checked)
        assert len(pins) >= 3
        assert len(set(map(id, pins))) == len(pins)


@on_clock_loop
async def test_a_warm_checkpoint_whose_store_cannot_be_asked_stays_warm_and_says_so(
    make: Make, tmp_path: Path
) -> None:
    path = make("one", 2)
    async with node(tmp_path) as warm:
        warm.write({"name": "one", "source": str(path)})
        await warm.until_states(one="warm")
        entry, checked = warm.entry("one"), warm.keeper("one").checked_at
        make("one", 2)
        really = warm.bench.catalog.resolve

        def stale(*given: Any, **named: Any) -> Checkpoint:
            return replace(really(*given, **named), stale_seconds=5.0)

        warm.bench.catalog.resolve = stale  # type: ignore[method-assign]
        await until_advanced(lambda: warm.keeper("one").reason)
        assert "whether it is the newest version could not be asked" in warm.keeper("one").reason
        assert warm.entry("one") is entry, "what may be older took the place of what is warm"
        assert warm.keeper("one").checked_at == checked


# ---- node features -------------------------------------------------------------------------------


@on_clock_loop
async def test_the_features_file_names_what_is_warm_and_goes_with_the_daemon(
    make: Make, tmp_path: Path
) -> None:
    features = tmp_path / "features.d/penstock"
    features.parent.mkdir()
    features.write_text("left by a daemon that was killed")
    path = make("one", 2)
    async with node(tmp_path, features=features) as warm:

        def labels() -> list[str]:
            first, *rest = features.read_text().splitlines()
            assert first.startswith("# +expiry-time=20")
            return rest

        await until(lambda: features.read_text().startswith("# +"))
        assert labels() == []
        warm.write({"name": "one", "source": str(path)}, {"name": "two", "source": "/nothing"})
        await warm.until_states(one="warm", two="failed")
        await until_advanced(labels)
        assert labels() == ["penstock.dev/warm-one=true"]
        before = features.stat().st_ino
        await until_advanced(lambda: features.stat().st_ino != before)
        assert os.stat(features).st_mode & 0o777 == 0o644
        warm.write()
        await until_advanced(lambda: not labels())
    assert os.listdir(features.parent) == []
    assert REFRESH_SECONDS * 3 < EXPIRY_SECONDS


def test_a_features_file_is_replaced_whole_and_no_link_is_followed(tmp_path: Path) -> None:
    path, victim = tmp_path / "features", tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".features.new").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        replace_file(path, text(["a"]))
    assert victim.read_text() == "mine"
    (tmp_path / ".features.new").unlink()
    path.symlink_to(victim)
    replace_file(path, text(["a"]))
    assert not path.is_symlink()
    assert victim.read_text() == "mine"


@on_clock_loop
async def test_a_features_file_that_cannot_be_written_is_told_once_and_tried_again(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = tmp_path / "features.d/penstock"

    def told() -> int:
        return sum(record.message == "node features could not be written" for record in caplog.records)

    async with node(tmp_path, features=features):
        await until(told)
        for _ in range(10):
            advance(2)
            await at_rest()
        assert told() == 1
        features.parent.mkdir()
        await until_advanced(features.exists)
