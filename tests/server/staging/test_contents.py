"""Which loads an entry serves: decided quickly, and as if its segments had been cut for them."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest

from penstock.server.checkpoint.catalog import Catalog
from penstock.server.checkpoint.files import Checkpoint
from penstock.server.checkpoint.selection import Indices, Selection, compact
from penstock.server.checkpoint.slices import cut
from penstock.server.staging import contents
from penstock.server.staging.contents import Contents

from ..support import MIB, ROOT, write_checkpoint

COUNT = 40


@pytest.fixture
def checkpoint(catalog: Catalog, tmp_path: Path) -> Checkpoint:
    """Of two files, of which the first is named twice."""
    one, two = (
        write_checkpoint(tmp_path / f"{name}.safetensors", [1] * COUNT, prefix=name) for name in ("a", "b")
    )
    found = catalog.resolve([str(one), str(two), str(one)], ROOT)
    found.close()
    return found


def some(chance: random.Random) -> Indices:
    kind = chance.randrange(4)
    if kind == 0:
        return range(0)
    first, last = sorted((chance.randrange(COUNT), chance.randrange(COUNT)))
    if kind == 1:
        return range(first, last + 1)
    every = chance.choice([2, 3, 10])
    return compact(array("I", [index for index in range(first, last + 1) if chance.randrange(every)]))


def selection(chance: random.Random) -> Selection:
    first = some(chance)
    return Selection((first, some(chance), first if chance.randrange(2) else some(chance)))


def test_an_entry_serves_the_loads_for_which_its_segments_can_be_cut(checkpoint: Checkpoint) -> None:
    chance = random.Random(1)
    served = 0
    for _ in range(3000):
        staged, wanted = selection(chance), selection(chance)
        entry = Contents(checkpoint, staged)
        segments = checkpoint.segments_within(staged, 64 * MIB)
        entry.lay_out(segments)
        versions = [file.version for file in checkpoint.files]
        same = staged.digest() == wanted.digest()
        expected = same or cut(segments, versions, wanted, versions) is not None
        assert entry.serves(checkpoint, wanted) == expected
        served += expected and wanted.tensor_count > 0
        if expected:
            entry.slices(checkpoint, wanted)
    assert served > 50


def test_looking_for_an_entry_cuts_no_segments(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done on the event loop, and a user may have dozens of entries that nearly serve."""
    monkeypatch.setattr(contents, "cut", lambda *_: pytest.fail("segments were cut"))

    def of(*indices: int) -> Selection:
        chosen = array("I", indices)
        return Selection((chosen, range(0), chosen))

    staged = of(*range(0, COUNT, 2))
    entry = Contents(checkpoint, staged)
    entry.lay_out(checkpoint.segments_within(staged, 64 * MIB))
    assert entry.serves(checkpoint, of(*range(0, COUNT, 4)))
    assert not entry.serves(checkpoint, of(*range(0, COUNT - 2, 2), COUNT - 1))


def test_a_selection_is_within_another_of_the_same_file() -> None:
    chance = random.Random(2)
    for _ in range(2000):
        one, other = Selection((some(chance),)), Selection((some(chance),))
        assert one.within(0, other, 0) == (set(one.files[0]) <= set(other.files[0]))
