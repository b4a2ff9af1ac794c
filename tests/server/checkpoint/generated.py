"""Generated headers and selections of their tensors."""

from __future__ import annotations

from array import array

from hypothesis import settings
from hypothesis import strategies as st

from penstock.server.checkpoint.headers.table import TensorTable
from penstock.server.checkpoint.plan import GAP_BYTES
from penstock.server.checkpoint.selection import Indices, Selection
from penstock.server.system.linux import PAGE_BYTES

from ..support import header_of

EXAMPLES = settings(derandomize=True, database=None, deadline=None, max_examples=150)

# Sizes around what matters: nothing, a page, the gap, a target.
sizes = st.one_of(
    st.integers(0, 40),
    st.integers(PAGE_BYTES - 2, PAGE_BYTES + 2),
    st.sampled_from([3 * PAGE_BYTES, 50_001, GAP_BYTES, GAP_BYTES + 1, 300_000]),
)
tables = st.lists(
    st.builds(
        lambda sizes, pad: header_of(sizes, pad_bytes=pad).tensors,
        st.lists(sizes, max_size=25),
        st.integers(0, PAGE_BYTES),
    ),
    min_size=1,
    max_size=3,
)
targets = st.sampled_from([1, 5_000, 64 << 10, 1 << 20, 64 << 20])
counts = st.sampled_from([1, 2, 3, 4096])

Picked = tuple[list[TensorTable], Selection]


@st.composite
def selections(draw: st.DrawFn) -> Picked:
    made = draw(tables)
    files: list[Indices] = []
    for table in made:
        if draw(st.booleans()):
            files.append(range(len(table)))
        else:
            wanted = draw(st.sets(st.sampled_from(range(len(table))))) if len(table) else set()
            files.append(array("I", sorted(wanted)))
    return made, Selection(tuple(files))


def chosen(selection: Selection) -> list[tuple[int, int]]:
    return [(file, index) for file, indices in enumerate(selection.files) for index in indices]
