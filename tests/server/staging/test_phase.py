"""The life of an entry: what it may become, and that nothing ends or begins twice."""

from __future__ import annotations

import itertools

import pytest

from penstock.server.staging.phase import Phase, moved

ORDER = list(Phase)


@pytest.mark.parametrize("now", ORDER)
def test_an_entry_never_goes_back_nor_twice_to_the_same_phase(now: Phase) -> None:
    for to in ORDER[: ORDER.index(now) + 1]:
        with pytest.raises(AssertionError, match=f"{now.name} cannot become {to.name}"):
            moved(now, to)


def test_every_entry_can_be_closed_and_a_closed_one_becomes_nothing() -> None:
    for now in ORDER[:-1]:
        assert moved(now, Phase.CLOSED) is Phase.CLOSED
    for to in ORDER:
        with pytest.raises(AssertionError):
            moved(Phase.CLOSED, to)


def test_only_an_entry_that_has_slabs_is_drained_and_only_a_granted_one_starts() -> None:
    allowed = set()
    for now, to in itertools.product(ORDER, (Phase.STARTED, Phase.DRAINING)):
        try:
            allowed.add((now, moved(now, to)))
        except AssertionError:
            continue
    assert allowed == {
        (Phase.STARTING, Phase.STARTED),
        (Phase.STARTED, Phase.DRAINING),
        (Phase.FAILED, Phase.DRAINING),
    }
