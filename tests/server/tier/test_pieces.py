"""Which bytes are where, against a list with an entry for each byte."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.server.tier.pieces import Pieces, Ranges
from penstock.server.tier.records import Block

SIZE = 40
RANGES = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
    lambda pair: (pair[0], min(SIZE, pair[0] + pair[1]))
)


@settings(derandomize=True, database=None, deadline=None, max_examples=500)
@given(st.lists(st.tuples(st.booleans(), RANGES), max_size=12))
def test_the_last_block_that_was_added_has_each_byte_that_was_not_removed_since(
    steps: list[tuple[bool, tuple[int, int]]],
) -> None:
    model: list[Block | None] = [None] * SIZE
    pieces = Pieces()
    for number, (adds, (start, end)) in enumerate(steps):
        block = Block(start, end - start, number * 4096, bytes([number])) if adds else None
        if block is not None:
            pieces.add(block)
        else:
            pieces.remove(start, end)
        model[start:end] = [block] * (end - start)
    position = 0
    found: list[Block | None] = []
    while position < SIZE:
        span = pieces.at(position, SIZE)
        assert position < span.end <= SIZE
        found += [span.block] * (span.end - position)
        position = span.end
    assert found == model
    assert pieces.kept_bytes == sum(block is not None for block in model)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.booleans(), RANGES), max_size=12))
def test_ranges_have_what_was_added_and_not_removed_since_once(
    steps: list[tuple[bool, tuple[int, int]]],
) -> None:
    model = [False] * SIZE
    ranges = Ranges()
    for adds, (start, end) in steps:
        if adds:
            ranges.add(start, end)
        else:
            assert ranges.remove(start, end) == sum(model[start:end])
        model[start:end] = [adds] * (end - start)
        assert len(ranges) == sum(there and not before for before, there in pairwise([False, *model]))
    assert ranges.remove(0, SIZE) == sum(model)
