"""Files are compared when the last of their segments was read, and only if all of them are."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from penstock.server.checkpoint import plan
from penstock.server.checkpoint.files import Checkpoint
from penstock.server.checkpoint.plan import Segment
from penstock.server.checkpoint.selection import select
from penstock.server.sources.checksums import CRC32C, Prefix, Runs, crc
from penstock.server.sources.verification import Wish
from penstock.server.staging.reading.verifying import BlockSum, Verifier

from ...support import ROOT, checkpoint_bytes, file_catalog

CONTENT = checkpoint_bytes([4096, 4096, 4096])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    path = tmp_path / "m.safetensors"
    path.write_bytes(CONTENT)
    with file_catalog() as catalog:
        wish = Wish("off", {path.name: hashlib.sha256(CONTENT).hexdigest()})
        checkpoint = catalog.resolve([str(path)], ROOT, wish=wish)
        yield checkpoint
        checkpoint.close()


def segments_of(checkpoint: Checkpoint) -> list[Segment]:
    """One for each tensor."""
    everything = select(checkpoint.tables, None)
    return plan.segments(checkpoint.tables, everything, target_bytes=1, target_tensors=1)


def bytes_of(segment: Segment) -> list[memoryview]:
    return [memoryview(CONTENT)[segment.start : segment.end]]


def test_a_file_is_verified_with_its_last_segment(checkpoint: Checkpoint) -> None:
    segments = segments_of(checkpoint)
    verifier = Verifier(checkpoint, segments)
    for index, segment in enumerate(segments):
        assert not verifier.verified
        assert verifier.next_to_follow(0) == index
        verifier.follow(index, bytes_of(segment))
        assert verifier.finish(index) is None
    assert verifier.verified == {0}
    assert verifier.verified_bytes == len(CONTENT)
    assert verifier.next_to_follow(0) is None


def test_one_other_byte_is_an_error_of_the_last_segment(checkpoint: Checkpoint) -> None:
    segments = segments_of(checkpoint)
    verifier = Verifier(checkpoint, segments)
    found = []
    for index, segment in enumerate(segments):
        verifier.follow(
            index, bytes_of(segment) if index else [memoryview(bytes(segment.size_bytes - 1) + b"!")]
        )
        found.append(verifier.finish(index))
    *before, last = found
    assert before == [None, None]
    assert last is not None
    assert last.version == checkpoint.files[0].version
    assert not verifier.verified


def test_pieces_of_a_block_and_blocks_in_any_order_have_the_crc_of_the_whole() -> None:
    runs, lock = Runs(CRC32C), threading.Lock()
    content = memoryview(CONTENT)
    cuts = [0, 1, 5000, 9000, len(CONTENT)]
    for start, end in reversed(list(pairwise(cuts))):
        block = BlockSum(runs, lock, start)
        middle = (start + end) // 2
        block.add(middle, [content[start:middle]])
        assert block.reached == middle
        block.add(end, [content[middle:end]])
        block.finish()
    assert runs.of(0, len(CONTENT)) == crc(CRC32C, [CONTENT])


def test_a_file_of_which_a_segment_is_lost_is_not_compared(checkpoint: Checkpoint) -> None:
    segments = segments_of(checkpoint)
    verifier = Verifier(checkpoint, segments)
    version, checksum = checkpoint.files[0].version, checkpoint.expected[0].checksum
    assert checksum is not None
    assert verifier.verifies(version, checksum)
    verifier.lost(0)
    assert not verifier.verifies(version, checksum)
    for index, segment in enumerate(segments[1:], 1):
        assert not verifier.in_order(index)
        verifier.follow(index, bytes_of(segment))
        assert verifier.finish(index) is None
    assert not verifier.verified


def test_a_file_of_which_not_all_segments_are_wanted_is_not_compared(checkpoint: Checkpoint) -> None:
    for some in (segments_of(checkpoint)[1:], segments_of(checkpoint)[:-1]):
        verifier = Verifier(checkpoint, some)
        assert not verifier.in_order(0)


def test_a_header_that_was_parsed_from_other_bytes_is_an_error(checkpoint: Checkpoint) -> None:
    verifier = Verifier(checkpoint, segments_of(checkpoint))
    for content, damaged in ((CONTENT[: checkpoint.headers[0].data_start], False), (b"other", True)):
        prefix = Prefix()
        prefix.add(content)
        again = replace(checkpoint, headers=(replace(checkpoint.headers[0], prefix=prefix),))
        error = verifier.damaged_header(again)
        assert (error is not None) == damaged
        assert error is None or error.version == checkpoint.files[0].version
