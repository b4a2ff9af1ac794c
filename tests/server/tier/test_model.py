"""The tier against a model: random writes, uses, restarts, crashes in mid-record, rot and limits."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.server.tier.directory import Directory
from penstock.server.tier.hold import Hold
from penstock.server.tier.threads import DiskThreads
from penstock.server.tier.tier import Tier
from penstock.server.tier.version import RottenError
from penstock.server.tier.versions import key_of

from .bench import PATIENCE_SECONDS, Thing, disk_bytes

KIB = 1 << 10
SIZE = 512 * KIB
LIMIT_BYTES = 1024 * KIB
COUNT = 6
NUMBERS = st.integers(0, COUNT - 1)
POSITIONS = st.integers(0, SIZE)


class TierMachine(RuleBasedStateMachine):
    """The model knows of each version which bytes were written since it last went, and when it was used."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp()) / "tier"
        self.things = [Thing(SIZE, uri=f"s3://bucket/{number}") for number in range(COUNT)]
        self.holds: dict[int, Hold] = {}
        self.written = [bytearray(SIZE) for _ in range(COUNT)]
        self.clock = 0
        self.used = [0] * COUNT
        self.rotten = False

    @initialize(limit=st.sampled_from([LIMIT_BYTES, 4 * LIMIT_BYTES]))
    def start(self, limit: int) -> None:
        self.limit = limit
        self.tier = self._start()

    def _start(self) -> Tier:
        threads = DiskThreads(hang_seconds=PATIENCE_SECONDS)
        return Tier(Directory(self.path), self.limit, threads=threads)

    def _start_again(self) -> None:
        """The order of use is then that of the records' times: when a version was opened or written last, as
        far as the clock of the file system tells these moments apart."""
        self.tier = self._start()
        times = {
            number: records.stat().st_mtime
            for number in range(COUNT)
            for records in self.path.glob(f"{self._key(number)}*.records")
        }
        order = sorted(set(times.values()))
        for number, time in times.items():
            self.used[number] = self.clock + order.index(time)
        self.clock += COUNT

    def teardown(self) -> None:
        for hold in self.holds.values():
            hold.release()
        if hasattr(self, "tier"):
            self.tier.close()
        shutil.rmtree(self.path.parent)

    # ---- steps -----------------------------------------------------------------------------------

    @rule(number=NUMBERS)
    def use(self, number: int) -> None:
        if number in self.holds:
            self.holds.pop(number).release()
        else:
            self.holds[number] = self.tier.hold(self.things[number].identity, 0)
            self._touch(number)

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), start=POSITIONS, end=POSITIONS)
    def write(self, data: st.DataObject, start: int, end: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.holds)))
        start, end = min(start, end), max(start, end)
        idle_before = {other for other in range(COUNT) if other not in self.holds and self._there(other)}
        thing, hold = self.things[number], self.holds[number]
        thing.keep_by(hold, (start, end))
        position = start
        while position < end:  # as much as there was room for
            span = hold.version.span(position, end)
            if span.block is not None:
                self.written[number][position : span.end] = b"\1" * (span.end - position)
            position = span.end
        gone = {other for other in idle_before if not self._there(other)}
        for other in gone:
            assert all(self.used[other] <= self.used[left] for left in idle_before - gone), "not the oldest"
            self.written[other] = bytearray(SIZE)

    @rule(cut=st.integers(0, 200))
    def crash(self, cut: int) -> None:
        """In the middle of the last record of one version."""
        self._stop()
        records = sorted(self.path.glob("*.records"))
        if cut and records:
            torn = random.Random(cut).choice(records)
            os.truncate(torn, max(0, torn.stat().st_size - cut))
            self._may_lose(torn)
        self._start_again()

    @rule(limit=st.sampled_from([LIMIT_BYTES // 2, LIMIT_BYTES, 4 * LIMIT_BYTES]))
    def restart_with_another_limit(self, limit: int) -> None:
        self._stop()
        self.limit = limit
        self._start_again()
        for number in range(COUNT):
            if not self._there(number):
                self.written[number] = bytearray(SIZE)

    @precondition(lambda self: any(self.path.glob("*.blocks")))
    @rule(at=st.floats(0, 1, exclude_max=True), which=st.integers(0, 100), records=st.booleans())
    def rot(self, at: float, which: int, *, records: bool) -> None:
        """Of records while the daemon is away: it has read those of what is in use."""
        files = sorted(self.path.glob("*.records" if records else "*.blocks"))
        file = files[which % len(files)]
        size = file.stat().st_size
        if not size:
            return
        if records:
            self._stop()
        position = int(size * at)
        with file.open("r+b") as opened:
            opened.seek(position)
            byte = opened.read(1)
            opened.seek(position)
            opened.write(bytes([byte[0] ^ 0x40]))
        self._may_lose(file)
        if records:
            self._start_again()

    # ---- what must hold --------------------------------------------------------------------------

    @invariant()
    def never_more_than_the_limit(self) -> None:
        if hasattr(self, "tier"):
            assert disk_bytes(self.path) <= self.limit
            assert self.tier.used_bytes <= self.limit

    @invariant()
    def what_is_kept_is_right_and_what_was_kept_is_there(self) -> None:
        for number, hold in self.holds.items():
            thing, written = self.things[number], self.written[number]
            position = 0
            while position < SIZE:
                span = hold.version.span(position, SIZE)
                if span.block is None:
                    assert not any(written[position : span.end]), "what was written is lost"
                    position = span.end
                    continue
                buffer = memoryview(bytearray(SIZE))
                try:
                    found = hold.version.read(span.block, position, span.end, _aligned())
                    buffer[: len(found)] = found
                    assert buffer[: len(found)] == thing.data[position : position + len(found)]
                    position += len(found)
                except RottenError:
                    assert not all(written[position : span.end]), "good bytes are refused"
                    hold.version.forget(position, span.end)
                    written[position : span.end] = bytes(span.end - position)
                    position = span.end

    # ---- inside ----------------------------------------------------------------------------------

    def _touch(self, number: int) -> None:
        self.clock += 1
        self.used[number] = self.clock

    def _stop(self) -> None:
        for hold in self.holds.values():
            hold.release()
        self.holds.clear()
        self.tier.close()

    def _there(self, number: int) -> bool:
        key = self._key(number)
        return any(self.path.glob(f"{key}*.records"))

    def _key(self, number: int) -> str:
        return key_of(self.things[number].identity)

    def _may_lose(self, file: Path) -> None:
        """Of the version that the file is of, nothing need be there any more."""
        for number in range(COUNT):
            if file.name.startswith(self._key(number)):
                self.written[number] = bytearray(SIZE)


def _aligned() -> memoryview:
    import mmap

    return memoryview(mmap.mmap(-1, SIZE))


TestTier = TierMachine.TestCase
TestTier.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=40, stateful_step_count=30
)
