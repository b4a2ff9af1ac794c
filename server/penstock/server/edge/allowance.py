"""How much work a user, or a connection, may cause in a while: a token bucket."""

from __future__ import annotations


class Allowance:
    """Fills at `per_second` up to `burst`. May be overdrawn: the cost of a message is known only after it
    arrived."""

    __slots__ = ("_at", "_burst", "_left", "_per_second")

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        self._per_second = per_second
        self._burst = burst
        self._left = burst
        self._at = now

    def spend(self, cost: float, now: float) -> None:
        self._refill(now)
        self._left -= cost

    def wait_seconds(self, now: float) -> float:
        """For how long nothing more may be spent. 0: something is left."""
        self._refill(now)
        return max(0.0, -self._left / self._per_second)

    def is_full(self, now: float) -> bool:
        self._refill(now)
        return self._left >= self._burst

    def _refill(self, now: float) -> None:
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
