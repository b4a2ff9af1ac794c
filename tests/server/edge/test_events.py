"""The messages that answer a load are bounded in bytes, whatever its files say: real files, resolved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.server.checkpoint.catalog import Catalog
from penstock.server.checkpoint.files import Checkpoint
from penstock.server.checkpoint.selection import select
from penstock.server.edge.events import (
    LISTING_BYTES,
    LISTING_TENSORS,
    MANIFEST_BYTES,
    MAX_METADATA_BYTES,
    _listing,
    _manifest,
)
from penstock.server.loads.load import Manifest
from penstock.server.loads.request import Listing
from penstock.v1 import streamer_pb2 as pb

from ..support import ROOT


def write(path: Path, header: dict[str, Any]) -> Path:
    """A file whose tensors have no bytes."""
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    return path


def manifest(checkpoint: Checkpoint) -> pb.Manifest:
    made = _manifest(
        Manifest(
            load_id="1",
            checkpoint=checkpoint,
            version="version",
            slab_count=1,
            slab_bytes=1,
            full=True,
            tensor_count=0,
            segment_count=0,
            total_bytes=0,
            warm_bytes=0,
        )
    )
    assert made.ByteSize() <= MANIFEST_BYTES
    return made.manifest


def test_a_manifest_has_metadata_up_to_a_bound_over_all_files_and_says_which_it_leaves_out(
    catalog: Catalog, tmp_path: Path
) -> None:
    large = {"text": "x" * (MAX_METADATA_BYTES * 3 // 8)}
    files = [write(tmp_path / f"{n}.safetensors", {"__metadata__": large}) for n in range(4)]
    files.append(write(tmp_path / "small.safetensors", {"__metadata__": {"format": "pt"}}))
    checkpoint = catalog.resolve([str(file) for file in files], ROOT)
    try:
        told = manifest(checkpoint).files
        assert [file.metadata_omitted for file in told] == [False, False, True, True, False]
        assert [dict(file.metadata) for file in told] == [large, large, {}, {}, {"format": "pt"}]
    finally:
        checkpoint.close()


def test_metadata_of_many_pairs_and_of_a_file_that_is_named_often_count_each_time(
    catalog: Catalog, tmp_path: Path
) -> None:
    """Each pair costs the message more than its characters."""
    pairs = {str(n): "" for n in range(40_000)}
    file = write(tmp_path / "m.safetensors", {"__metadata__": pairs})
    checkpoint = catalog.resolve([str(file)] * 20, ROOT)
    try:
        told = manifest(checkpoint).files
        assert dict(told[0].metadata) == pairs
        assert told[-1].metadata_omitted
        assert sum(not file.metadata_omitted for file in told) == 4
        assert all(not file.metadata for file in told if file.metadata_omitted)
    finally:
        checkpoint.close()


LONG_NAMES = [("n" * 16_000 + str(n), [0]) for n in range(300)]
LONG_SHAPES = [(str(n), [0] + [2**63 - 1] * 63) for n in range(3000)]
MANY = [(str(n), [0]) for n in range(2 * LISTING_TENSORS + 1)]


@pytest.mark.parametrize(
    ("tensors", "least_messages"),
    [(LONG_NAMES, 5), (LONG_SHAPES, 2), (MANY, 3), (MANY[:LISTING_TENSORS], 1), ([], 1)],
    ids=["long names", "long shapes", "many", "just one message", "none"],
)
def test_each_message_of_a_listing_is_bounded_in_bytes_and_in_tensors(
    catalog: Catalog, tmp_path: Path, tensors: list[tuple[str, list[int]]], least_messages: int
) -> None:
    """Two files, so that a message may hold tensors of both."""
    half = len(tensors) // 2
    for name, part in (("1", tensors[:half]), ("2", tensors[half:])):
        entries = {tensor: {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]} for tensor, shape in part}
        write(tmp_path / f"{name}.safetensors", entries)
    checkpoint = catalog.resolve([str(tmp_path)], ROOT)
    try:
        everything = select(checkpoint.tables, None, checkpoint.delivered).files
        messages = list(_listing(Listing(checkpoint.tables, everything)))
    finally:
        checkpoint.close()
    assert max(map(len, messages)) <= LISTING_BYTES
    listings = [pb.LoadResponse.FromString(message).listing for message in messages]
    assert max(len(listing.tensors) for listing in listings) <= LISTING_TENSORS
    assert len(listings) >= least_messages
    assert [listing.last for listing in listings] == [False] * (len(listings) - 1) + [True]
    told = [(tensor.name, list(tensor.shape)) for listing in listings for tensor in listing.tensors]
    assert sorted(told) == sorted(tensors)
