"""Selecting tensors, compared with naive models over generated headers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.server.checkpoint.headers.table import TensorTable
from penstock.server.checkpoint.selection import select, selected_bytes, skip
from penstock.server.errors import TensorNotFoundError

from ..support import header_of
from .generated import EXAMPLES, Picked, chosen, selections, tables


@given(tables, st.data())
@EXAMPLES
def test_select_finds_names_in_every_file(tables: list[TensorTable], data: st.DataObject) -> None:
    names = sorted({name for table in tables for name in table.names()})
    wanted = data.draw(st.lists(st.sampled_from(names)) if names else st.just([]))
    expected = [
        (file, index)
        for file, table in enumerate(tables)
        for index in range(len(table))
        if table.name(index) in wanted
    ]
    assert chosen(select(tables, wanted)) == expected
    assert select(tables, wanted).tensor_count == len(expected)


@given(tables)
@EXAMPLES
def test_select_of_none_is_select_of_every_name(tables: list[TensorTable]) -> None:
    names = [name for table in tables for name in table.names()]
    everything = select(tables, None)
    assert chosen(everything) == [(f, i) for f, table in enumerate(tables) for i in range(len(table))]
    assert everything.digest() == select(tables, names).digest()


def test_select_names_what_is_missing_and_how_much_more() -> None:
    table = header_of([1]).tensors
    with pytest.raises(TensorNotFoundError, match=r"'a', 'b', 'c' and 2 more") as caught:
        select([table], ["t0", "e", "d", "c", "b", "a"])
    assert caught.value.details == {"tensor": "a"}


@given(selections(), selections())
@EXAMPLES
def test_digests_are_equal_for_equal_selections_only(one: Picked, other: Picked) -> None:
    same = [list(indices) for indices in one[1].files] == [list(indices) for indices in other[1].files]
    if same and [type(indices) for indices in one[1].files] == [type(i) for i in other[1].files]:
        assert one[1].digest() == other[1].digest()
    if not same:
        assert one[1].digest() != other[1].digest()


@given(selections(), st.integers(0, 80))
@EXAMPLES
def test_skip_leaves_out_the_first_tensors(picked: Picked, count: int) -> None:
    _, selection = picked
    assert chosen(skip(selection, count)) == chosen(selection)[count:]


@given(selections())
@EXAMPLES
def test_selected_bytes_is_the_sum_of_the_tensors(picked: Picked) -> None:
    tables, selection = picked
    expected = sum(tables[file].end(index) - tables[file].start(index) for file, index in chosen(selection))
    assert selected_bytes(tables, selection) == expected
