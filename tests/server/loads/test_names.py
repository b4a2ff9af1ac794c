"""Lists of tensor names, packed until they are looked up."""

from __future__ import annotations

import pytest

from penstock.server.errors import InvalidRequestError
from penstock.server.loads.names import MAX_UNPACKED_BYTES, NAME_COST_BYTES, Names
from penstock.v1 import streamer_pb2 as pb


def test_names_are_counted_packed_and_given_back_once() -> None:
    held = [0]
    names = Names(
        lambda count: held.__setitem__(0, held[0] + count), lambda c: held.__setitem__(0, held[0] - c)
    )
    names.add(pb.SelectTensors(names=["a", "b"], more=True))
    assert names.more
    names.add(pb.SelectTensors(names=["c"]))
    assert not names.more
    assert list(names) == list(names) == ["a", "b", "c"]
    assert 0 < held[0] < 20
    names.close()
    names.close()
    assert held == [0]


def test_names_that_would_be_too_many_unpacked_are_refused() -> None:
    names = Names(lambda count: None, lambda count: None)
    with pytest.raises(InvalidRequestError, match="more than penstockd looks up at once"):
        names.add(pb.SelectTensors(names=[""] * (MAX_UNPACKED_BYTES // NAME_COST_BYTES)))
