"""What parsed headers are charged to, how long, and what is given up for them."""

from __future__ import annotations

import pytest

from penstock.server.checkpoint.headers.budget import Budget
from penstock.server.checkpoint.headers.keep import Keep, Kept
from penstock.server.checkpoint.headers.table import Header
from penstock.server.errors import CheckpointInvalidError, TooManyLoadsError

from ...support import header_of

ANNE, BERT = 1001, 1002


def header(kilobytes: int) -> Header:
    """Of about so many kB."""
    return header_of([1] * (1000 * kilobytes // 29))


def add(keep: Keep, uid: int, version: str, parsed: Header) -> Kept:
    return keep.add(uid, version, parsed, keep.budget.charge(uid))


def test_a_charge_lasts_as_long_as_something_refers_to_it() -> None:
    budget = Budget(1000)
    charge = budget.charge(0, 600)
    other = charge
    del charge
    assert budget.used_bytes == 600
    other.resize(100)
    assert budget.used_bytes == 100
    del other
    assert budget.used_bytes == 0


def test_what_is_not_there_is_refused_and_nothing_is_taken() -> None:
    budget = Budget(1000)
    charge = budget.charge(ANNE, 650)
    with pytest.raises(
        TooManyLoadsError, match=r"need 80 B more .* and 33 B are left for uid 1001"
    ) as caught:
        budget.charge(ANNE, 80)
    assert caught.value.retryable
    with pytest.raises(
        CheckpointInvalidError, match=r"take 800 B .* more than the 683 B that one user may have"
    ):
        charge.resize(800)
    assert charge.size_bytes == budget.used_bytes == 650
    assert budget.charge(BERT, 120).size_bytes == 120
    assert budget.charge(0, 300).size_bytes == 300


def test_a_user_is_charged_once_for_a_version_however_many_loads_use_it() -> None:
    keep, one = Keep(1 << 20, 0), header(100)
    first = add(keep, ANNE, "v", one)
    assert keep.find(ANNE, "v") is first
    assert add(keep, ANNE, "v", header(100)) is first
    assert keep.budget.used_bytes == one.size_bytes
    second = keep.find(BERT, "v")
    assert second is not None
    assert second.header is one
    assert keep.budget.used_bytes == 2 * one.size_bytes
    del first
    assert keep.budget.used_bytes == one.size_bytes
    assert keep.find(BERT, "v") is second
    del second
    assert keep.budget.used_bytes == 0
    assert keep.find(ANNE, "v") is None


def test_what_nobody_uses_is_cached_and_given_up_for_what_is_used() -> None:
    keep = Keep(1_000_000, 400_000)
    for version in "abc":
        add(keep, 0, version, header(100))
    assert keep.budget.used_bytes == 0
    assert keep.cached_bytes > 300_000
    kept = keep.find(ANNE, "b")
    assert kept is not None
    large = add(keep, 0, "large", header(700))
    assert keep.budget.used_bytes + keep.cached_bytes <= 1_000_000
    assert keep.find(0, "a") is None
    assert keep.find(0, "b") is not None  # as it is used
    del large


def test_the_least_recently_used_leaves_the_cache_first() -> None:
    keep = Keep(1 << 20, 350_000)
    for version in "abc":
        add(keep, 0, version, header(100))
    assert keep.find(0, "a") is not None
    add(keep, 0, "d", header(100))
    assert [version for version in "abcd" if keep.find(0, version) is not None] == ["a", "c", "d"]
    add(keep, 0, "larger than the cache", header(500))
    assert keep.find(0, "larger than the cache") is None
    assert keep.find(0, "a") is not None
