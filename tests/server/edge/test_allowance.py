"""How much work may be caused."""

from __future__ import annotations

from penstock.server.edge.allowance import Allowance


def test_an_allowance_may_be_overdrawn_and_fills_up_again() -> None:
    allowance = Allowance(10, 20, now=0.0)
    allowance.spend(20, 0.0)
    assert allowance.wait_seconds(0.0) == 0
    allowance.spend(5, 0.0)
    assert allowance.wait_seconds(0.0) == 0.5
    assert allowance.wait_seconds(0.25) == 0.25
    assert not allowance.is_full(2.0)
    assert allowance.is_full(100.0)
    allowance.spend(21, 100.0)
    assert allowance.wait_seconds(100.0) > 0
