"""How much of a thing each user may have, whatever the others have."""

from __future__ import annotations

import os
import random

import pytest

from penstock.server.system.quota import NEWCOMERS, Quota

STRANGERS = (70001, 70002, 70003, 70004)


def take_all(quota: Quota, uid: int) -> int:
    count = 0
    while quota.take(uid):
        count += 1
    return count


@pytest.mark.parametrize("total", [2, 3, 8, 64, 1000])
def test_whatever_three_users_take_a_fourth_finds_some_and_root_its_reserve(total: int) -> None:
    quota = Quota(total)
    for uid in STRANGERS[:3]:
        take_all(quota, uid)
    assert take_all(quota, STRANGERS[3]) >= 1 or total < 1000  # few are used up by three
    assert quota.left(0) >= max(1, total // 8)
    assert take_all(quota, 0) >= max(1, total // 8)
    assert quota.used <= total


def test_one_user_gets_seven_eighths_of_what_the_others_leave_besides_its_first_units() -> None:
    quota = Quota(64)  # of which 8 are the reserve, and 7 are first units, one for each user
    assert take_all(quota, STRANGERS[0]) == 1 + 42 == quota.most(STRANGERS[0])
    assert take_all(quota, STRANGERS[1]) == 1 + 6
    quota.release(STRANGERS[0], 43)
    assert quota.left(STRANGERS[1]) == 43 - 7


@pytest.mark.parametrize("total", [128, 256, 682, 1024, 2048, 48 << 20])
def test_whatever_seven_users_take_an_eighth_finds_first_units(total: int) -> None:
    quota = Quota(total)
    for uid in range(70001, 70008):
        assert quota.take(uid, quota.left(uid))
    assert quota.left(70008) >= total * 7 // 8 // 8 // NEWCOMERS >= 1
    assert quota.left(0) == total - quota.used >= total // 8


def test_first_units_that_root_took_are_not_given_out_again() -> None:
    quota = Quota(256)
    assert quota.take(0, 250)
    assert sum(take_all(quota, uid) for uid in STRANGERS) == 6


def test_what_a_user_is_charged_beyond_its_share_leaves_it_nothing_and_root_no_less_than_none() -> None:
    quota = Quota(64)
    assert take_all(quota, STRANGERS[0]) == 43
    quota.charge(STRANGERS[0], 20)
    assert quota.left(STRANGERS[0]) == quota.left(STRANGERS[1]) == 0
    assert quota.left(0) == 1
    quota.charge(STRANGERS[0], 20)
    assert quota.left(0) == 0
    assert not quota.take(0)
    quota.release(STRANGERS[0], 40)
    assert quota.left(STRANGERS[0]) == 0
    assert quota.left(STRANGERS[1]) == 1 + 6


def test_nothing_is_set_aside_where_no_newcomers_are_expected() -> None:
    quota = Quota(64, newcomers=0)
    assert take_all(quota, STRANGERS[0]) == 49
    assert take_all(quota, STRANGERS[1]) == 6


def test_privileged_users_may_have_everything_and_use_their_reserve_first() -> None:
    quota = Quota(16)
    assert take_all(quota, os.geteuid()) == 16
    quota.release(os.geteuid(), 14)
    assert take_all(quota, STRANGERS[0]) == 12  # as if nobody had anything: those two are of the reserve
    assert quota.left(0) == 2


def test_an_amount_is_taken_whole_or_not_at_all() -> None:
    quota = Quota(100)
    most = quota.most(STRANGERS[0])
    assert not quota.take(STRANGERS[0], most + 1)
    assert quota.used == 0
    assert quota.take(STRANGERS[0], most)
    quota.release(STRANGERS[0], most)
    assert quota.used_by(STRANGERS[0]) == 0


def test_a_bound_for_each_user_holds_besides_the_share() -> None:
    quota = Quota(100, most_per_user=10)
    assert take_all(quota, STRANGERS[0]) == 10
    assert quota.left(0) == 90


def test_with_a_total_of_one_anybody_may_have_it() -> None:
    assert Quota(1).take(STRANGERS[0])


def test_it_never_gives_out_more_than_there_is() -> None:
    chance = random.Random(1)
    quota = Quota(40)
    held = dict.fromkeys((0, *STRANGERS), 0)
    for _ in range(5000):
        uid = chance.choice(list(held))
        if chance.random() < 0.6:
            amount = chance.randint(1, 12)
            allowed = quota.left(uid)
            assert quota.take(uid, amount) == (amount <= allowed)
            held[uid] += amount if amount <= allowed else 0
        elif held[uid]:
            amount = chance.randint(1, held[uid])
            quota.release(uid, amount)
            held[uid] -= amount
        assert quota.used == sum(held.values()) <= quota.total
        assert sum(held[user] for user in STRANGERS) <= 35
