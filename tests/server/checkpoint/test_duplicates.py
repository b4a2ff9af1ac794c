"""Tensors that are in two files of one load."""

from __future__ import annotations

import tracemalloc
from array import array
from collections.abc import Sequence

import pytest

from penstock.server.checkpoint.duplicates import MAX_TWICE, Claims, Shard, delivered
from penstock.server.checkpoint.headers.table import TensorTable
from penstock.server.checkpoint.selection import Indices
from penstock.server.errors import CheckpointInvalidError


def shard(name: str, tensors: Sequence[str], *, version: str | None = None) -> Shard:
    """A file `name` whose tensors have a byte each."""
    names, name_ends = bytearray(), array("I")
    for tensor in tensors:
        names += tensor.encode()
        name_ends.append(len(names))
    count = len(tensors)
    table = TensorTable.pack(
        data_start=0,
        ends=array("Q", range(1, count + 1)),
        dims=array("Q"),
        dim_ends=array("I", bytes(4 * count)),
        name_ends=name_ends,
        dtypes=bytearray(count),
        names=names,
    )
    return Shard(name, version or name, table)


def claims_of(first: int, index: dict[str, tuple[str, ...]]) -> Claims:
    return Claims(first, len(index), list(index.values()).__getitem__)


def counts(shards: Sequence[Shard], claims: Sequence[Claims] = ()) -> list[list[str]]:
    """The names of each file that count."""
    chosen = delivered(shards, claims)
    if chosen is None:
        return [list(shard.tensors.names()) for shard in shards]
    return [
        [shard.tensors.name(index) for index in indices]
        for shard, indices in zip(shards, chosen, strict=True)
    ]


def test_of_files_without_a_tensor_in_common_everything_counts() -> None:
    assert delivered([shard("x", "ab"), shard("y", "cd"), shard("z", "")], []) is None


def test_a_tensor_in_two_files_is_refused_with_its_name_and_both_files() -> None:
    with pytest.raises(CheckpointInvalidError, match="/x and /y both hold tensor 'b'") as caught:
        delivered([shard("/w", "z"), shard("/x", "ab"), shard("/y", "bc")], [])
    assert caught.value.details == {"file": "/y", "tensor": "b"}


@pytest.mark.parametrize("owner", ["x", "y"])
def test_the_index_decides_which_counts(owner: str) -> None:
    index = {"x": ("a", "b"), "y": ("c",)} if owner == "x" else {"x": ("a",), "y": ("b", "c")}
    expected = [["a", "b"], ["c"]] if owner == "x" else [["a"], ["b", "c"]]
    assert counts([shard("x", "ab"), shard("y", "bc")], [claims_of(0, index)]) == expected


def test_an_index_that_does_not_name_the_tensor_does_not_decide() -> None:
    claims = [claims_of(0, {"x": ("a",), "y": ("c",)})]
    with pytest.raises(CheckpointInvalidError, match="x and y both hold tensor 'b', and no index says"):
        delivered([shard("x", "ab"), shard("y", "bc")], claims)


def test_an_index_decides_for_its_own_files_only() -> None:
    shards = [shard("x", "ab"), shard("y", "bc"), shard("z", "b")]
    with pytest.raises(CheckpointInvalidError, match="x and z both hold tensor 'b'"):
        delivered(shards, [claims_of(0, {"x": ("a", "b"), "y": ("c",)})])
    shards = [shard("x", "a"), shard("y", "a")]
    with pytest.raises(CheckpointInvalidError, match="x and y both hold tensor 'a'"):
        delivered(shards, [claims_of(0, {"x": ("a",)}), claims_of(1, {"y": ("a",)})])


def test_all_copies_but_one_are_left_out_wherever_they_lie() -> None:
    shards = [shard("x", "abcd"), shard("y", "dxyb"), shard("z", "bd")]
    claims = [claims_of(0, {"x": ("a", "b", "c"), "y": ("x", "y"), "z": ("d",)})]
    assert counts(shards, claims) == [["a", "b", "c"], ["x", "y"], ["d"]]


def test_a_file_that_is_named_twice_is_no_second_file() -> None:
    twice = [shard("x", "ab"), shard("/link/to/x", "ab", version="x")]
    assert delivered(twice, []) is None


def test_a_copy_that_does_not_count_does_so_nowhere_in_that_checkpoint_and_everywhere_else() -> None:
    """The file is named by an index, and once more by itself: there it means all that it holds."""
    shards = [shard("x", "ab"), shard("y", "bc"), shard("y", "bc")]
    index = {"x": ("a",), "y": ("b", "c")}
    assert counts(shards, [claims_of(0, index)]) == [["a"], ["b", "c"], ["b", "c"]]
    other = {"x": ("a", "b"), "y": ("c",)}
    with pytest.raises(CheckpointInvalidError, match="both hold tensor 'b'"):
        delivered(shards, [claims_of(0, other)])


MANY = 100_000


@pytest.fixture(scope="module")
def many() -> list[Shard]:
    return [
        shard(f"file{n}", [f"model.layers.{i}.mlp.experts.{n}.weight" for i in range(MANY)]) for n in (1, 2)
    ]


def watched(shards: Sequence[Shard], claims: Sequence[Claims]) -> tuple[int, tuple[Indices, ...] | None]:
    """The most memory that it took, in bytes, and what is delivered."""
    tracemalloc.start()
    try:
        chosen = delivered(shards, claims)
        return tracemalloc.get_traced_memory()[1], chosen
    finally:
        tracemalloc.stop()


def test_to_compare_names_takes_less_than_twenty_bytes_for_each(many: list[Shard]) -> None:
    """So a million take less than 20 MB."""
    peak_bytes, chosen = watched(many, [])
    assert peak_bytes < 20 * 2 * MANY
    assert chosen is None


def test_as_many_as_may_be_twice_are_settled_in_some_tens_of_megabytes(many: list[Shard]) -> None:
    names = [many[0].tensors.name(index) for index in range(MAX_TWICE)]
    shards = [*many, shard("copy", names)]
    index = {"file1": tuple(names), "file2": (), "copy": ()}
    peak_bytes, chosen = watched(shards, [claims_of(0, index)])
    assert peak_bytes < 48 << 20
    assert chosen is not None
    assert [len(indices) for indices in chosen] == [MANY, MANY, 0]


def test_more_than_may_be_twice_are_refused(many: list[Shard]) -> None:
    copy = Shard("copy", "copy", many[0].tensors)
    with pytest.raises(CheckpointInvalidError, match=rf"hold {MANY} tensors twice, more than {MAX_TWICE}"):
        delivered([many[0], copy], [])
