"""The formulas of docs/fleet.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import fleet_formulas, make_checkpoint
from benchmarks.fleet_formulas import Checkpoint, Count, Weights
from benchmarks.fleet_store import INDEX, LIST, WEIGHTS
from benchmarks.make_checkpoint import Tensor
from penstock.server.checkpoint import plan
from penstock.server.checkpoint.headers import reading as header
from penstock.server.checkpoint.headers.decode import parse_header
from penstock.server.checkpoint.selection import Selection
from penstock.server.loads.warm import keeper
from penstock.server.sources.objects import object as engine

MIB = 1 << 20
SHAPES = {
    "llama": make_checkpoint.llama_tensors(300_000_000),
    "larger than a segment": make_checkpoint.sparse_tensors(1_000_000_000),
    "many of 32 KiB": [Tensor(f"layers.{number}.{'x' * 60}.weight", (128, 128)) for number in range(9000)],
    "as large as a segment": [Tensor(f"t{number}", (32, MIB)) for number in range(4)],
}


def layout(tensors: list[Tensor]) -> tuple[bytes, int]:
    """The header of a file with these tensors, and the size of the file."""
    raw = make_checkpoint.header_of(tensors)
    return raw[8:], len(raw) + sum(tensor.size_bytes for tensor in tensors)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_of_blocks_agrees_with_the_plan_of_the_daemon(shape: str) -> None:
    raw, size_bytes = layout(SHAPES[shape])
    file = fleet_formulas.weights(raw, size_bytes)
    table = parse_header(raw, file_bytes=size_bytes).tensors
    planned = plan.segments(
        [table],
        Selection((range(len(table)),)),
        target_bytes=plan.SEGMENT_BYTES,
        target_tensors=plan.SEGMENT_TENSORS,
    )
    assert fleet_formulas.segments(file) == [segment.size_bytes for segment in planned]
    for block_bytes in (MIB, 8 * MIB, 32 * MIB):
        ranges = [cut for segment in planned for cut in plan.even_blocks(segment, block_bytes)]
        assert fleet_formulas.blocks(Checkpoint(1, 0, (file,)), block_bytes) == Count(
            gets=len(ranges), body_bytes=sum(end - start for start, end in ranges)
        )


def test_the_formulas_have_the_constants_of_the_daemon() -> None:
    assert fleet_formulas.FIRST_BYTES == engine.FIRST_BYTES == header.SPECULATIVE_BYTES
    assert fleet_formulas.REST_BYTES == header._CHUNK_BYTES
    assert fleet_formulas.SEGMENT_BYTES == plan.SEGMENT_BYTES
    assert fleet_formulas.JITTER == keeper.JITTER


def test_each_way_to_a_warm_checkpoint_has_its_requests_and_bytes() -> None:
    """Two files of one tensor of 40 MiB behind a short header, and an index."""
    file = Weights(40 * MIB + 1000, 1000, ((1000, 1000 + 40 * MIB),))
    checkpoint = Checkpoint(names=5, index_bytes=2000, files=(file, file))
    first_bytes = 2000 + 2 * (256 << 10)
    assert fleet_formulas.first_load(checkpoint, 32 * MIB) == Count(1, 3, 3 + 4, first_bytes + 80 * MIB)
    assert fleet_formulas.versions(checkpoint) == Count(1, 3)
    assert fleet_formulas.first_in_warm_set(checkpoint, 32 * MIB) == Count(2, 6, 7, first_bytes + 80 * MIB)
    assert fleet_formulas.new_version_in_warm_set(checkpoint, 32 * MIB) == Count(
        2, 6, 7, first_bytes + 80 * MIB
    )
    assert fleet_formulas.first_loads_behind_cache(checkpoint, 32 * MIB, 8) == Count(
        8, 24, 24 + 4, 8 * first_bytes + 80 * MIB
    )


@pytest.mark.parametrize(
    ("header_bytes", "gets"),
    [(256 << 10, 0), ((256 << 10) + 1, 1), (MIB, 1), (MIB + 1, 1), ((256 << 10) + 3 * MIB, 3)],
)
def test_a_header_longer_than_the_first_bytes_takes_more_requests(header_bytes: int, gets: int) -> None:
    checkpoint = Checkpoint(1, 0, (Weights(100 * MIB, header_bytes, ()),))
    assert fleet_formulas.rests(checkpoint) == Count(gets=gets, body_bytes=header_bytes - (256 << 10))


def test_tensors_in_the_first_bytes_of_a_file_are_read_twice() -> None:
    """None of the third file, whose header is longer."""
    files = (Weights(100 * MIB, 1000, ()), Weights(5000, 1000, ()), Weights(100 * MIB, 300 << 10, ()))
    assert fleet_formulas.read_twice_bytes(Checkpoint(3, 2000, files)) == (256 << 10) - 1000 + 4000


def test_a_directory_is_listed_in_pages() -> None:
    assert [fleet_formulas.pages(Checkpoint(names, 0, ())) for names in (0, 1, 1000, 1001)] == [1, 1, 1, 2]


def test_a_checkpoint_is_read_from_its_directory(tmp_path: Path) -> None:
    raw, size_bytes = layout(SHAPES["many of 32 KiB"][:7])
    with (tmp_path / "model-1.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(size_bytes)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    (tmp_path / "config.json").write_text("{}")
    found = fleet_formulas.read_checkpoint(tmp_path)
    assert (found.names, found.index_bytes) == (3, len('{"weight_map": {}}'))
    assert found.files == (fleet_formulas.weights(raw, size_bytes),)
    assert found.files[0].tensors[-1][1] == size_bytes


def test_requests_are_split_into_looks_that_begin_with_a_list() -> None:
    kinds = [INDEX, LIST, INDEX, WEIGHTS, LIST, LIST, WEIGHTS]
    assert fleet_formulas.split(kinds, LIST) == [[1, 2, 3], [4], [5, 6]]
