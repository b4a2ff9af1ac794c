"""What keeps an entry in the buffer when nobody holds it."""

from __future__ import annotations

from penstock.server.staging.retention import Retention


def test_a_pin_of_an_operator_outlasts_what_a_warm_set_wishes() -> None:
    kept = Retention(("a",))
    kept.pin(("a",))
    kept.want("set", ("b",), pin=True)
    assert kept.unwant("set")
    assert kept.pinned
    assert not kept.wanted


def test_a_wish_pins_only_if_it_says_so_and_as_long_as_it_is_there() -> None:
    kept = Retention(("a",))
    kept.want("one", ("a",), pin=False)
    assert (kept.wanted, kept.pinned) == (True, False)
    kept.want("other", ("a",), pin=True)
    assert kept.pinned
    assert kept.wanted_as("other")
    assert kept.unwant("other")
    assert (kept.wanted, kept.pinned) == (True, False)
    assert not kept.unwant("other")


def test_an_eviction_ends_pins_and_wishes_until_somebody_wants_the_entry_again() -> None:
    kept = Retention(("a",))
    kept.pin(("a",))
    kept.want("set", ("a",), pin=True)
    kept.unpin()
    assert (kept.pinned, kept.wanted, kept.ends_when_left) == (False, False, True)
    kept.want("set", ("a",), pin=False)
    assert not kept.ends_when_left
