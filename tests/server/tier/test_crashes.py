"""A crash at any moment loses blocks, and nothing else: SIGKILL before each system call of a write, and a
loss of power that drops or tears all that was not synced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .bench import MIB, Thing, tier_in
from .recording import RecordingDirectory, disks_after

KILLED = """
import os, signal, sys
from itertools import count
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.server.tier.bench import MIB, Thing, tier_in
from tests.server.tier.recording import RecordingDirectory

left = 0

class Killed(RecordingDirectory):
    def note(self, step):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

def write(path):
    with tier_in(Killed(path), 3 * MIB) as tier:
        for number in range(3):
            thing = Thing(MIB, uri=f"s3://bucket/{number}")
            thing.keep(tier, (0, MIB // 2), (MIB // 2, MIB))

for left in count():
    child = os.fork()
    if not child:
        write(Path(sys.argv[2]) / str(left))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""
"""Each child is killed one step later than the one before, until one comes to the end. The third version that
they write takes the place of the first."""


def things() -> list[Thing]:
    return [Thing(MIB, uri=f"s3://bucket/{number}") for number in range(3)]


def test_sigkill_at_every_step_of_writing_leaves_blocks_that_are_whole(tmp_path: Path) -> None:
    arguments = [str(Path(__file__).parents[3]), str(tmp_path)]
    subprocess.run([sys.executable, "-c", KILLED, *arguments], check=True)
    kept: list[int] = []
    for path in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        with tier_in(path, 3 * MIB) as tier:
            kept.append(sum(thing.kept(tier) for thing in things()))
            for thing in things():
                thing.keep(tier)
                assert thing.kept(tier) == MIB  # it goes on
    assert len(kept) > 20
    assert set(kept) >= {0, MIB // 2, MIB, MIB + MIB // 2, 2 * MIB}


def test_a_loss_of_power_at_every_step_leaves_no_record_of_bytes_that_are_not_there(tmp_path: Path) -> None:
    directory = RecordingDirectory(tmp_path / "tier")
    some = things()
    with tier_in(directory, 3 * MIB) as tier:
        for thing in some:
            thing.keep(tier, (0, MIB // 2), (MIB // 2, MIB))
        assert tier.counts["evictions"] == 1
    best = 0
    for number, disk in enumerate(disks_after(directory.steps)):
        path = tmp_path / str(number)
        path.mkdir(mode=0o700)
        for name, content in disk.items():
            (path / name).write_bytes(content)
        with tier_in(path, 3 * MIB) as tier:
            # Raises for a block whose record is there and whose bytes are not.
            best = max(best, sum(thing.kept(tier) for thing in some))
            some[2].keep(tier)
            assert some[2].kept(tier) == MIB
        for file in path.iterdir():
            file.unlink()
    assert best >= 2 * MIB


def test_what_an_earlier_crash_left_behind_the_records_is_overwritten(tmp_path: Path) -> None:
    path, thing = tmp_path / "tier", things()[0]
    with tier_in(path) as tier:
        thing.keep(tier, (0, MIB // 2))
    (blocks,) = path.glob("*.blocks")
    with blocks.open("ab") as file:
        file.write(b"x" * 100_000)
    with tier_in(path) as tier:
        thing.keep(tier)
        assert thing.kept(tier) == MIB
    assert blocks.stat().st_size == MIB
