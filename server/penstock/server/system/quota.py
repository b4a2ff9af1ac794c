"""How much of a bounded resource each user may have: the one rule for sessions, connections, loads,
descriptors and the memory of requests.

    total = a reserve that only privileged users may use + first units + what the others share

A user who is not privileged gets at most seven eighths (`user_share`) of what the other users leave of the
shared part. That alone would leave nothing to the fourth or fifth user: each leaves an eighth of what the one
before left. So an eighth is set aside for first units: each of the first `NEWCOMERS` users, at least, has a
few of its own, whatever the others hold. Root and the daemon's own user may have all that is left, and the
reserve is theirs alone, so nobody can keep them out.

It counts and decides. It neither waits nor raises: the caller decides what follows from a refusal.
"""

from __future__ import annotations

import threading
from collections import Counter

from .limits import is_privileged, user_share

RESERVED_PART = 8
"""One part in so many is the reserve for privileged users, at least 1."""
FIRST_PART = 8
"""One part in so many of the rest is set aside for first units."""
NEWCOMERS = 8
"""At least so many users find first units, if there are as many units."""


class Shares:
    """The rule by which `total` units are shared. Counts nothing; `Quota` does."""

    def __init__(
        self,
        total: int,
        *,
        most_per_user: int | None = None,
        newcomers: int = NEWCOMERS,
        first_units: int = 0,
    ) -> None:
        """`most_per_user` bounds one user who is not privileged, besides the share. With 0 `newcomers`
        nothing is set aside for them, else at least `first_units` if half of what is no reserve has so many.
        With a total of 1 there is no reserve."""
        self.total = total
        self._reserve = min(max(1, total // RESERVED_PART), total - 1)
        rest = total - self._reserve
        self._first = max(rest // FIRST_PART, min(first_units, rest // 2)) if newcomers else 0
        self._first_per_user = max(1, self._first // max(1, newcomers))
        self._shared = total - self._reserve - self._first
        self._most_per_user = total if most_per_user is None else most_per_user

    def most(self, uid: int) -> int:
        """How many units the user may have if there is no other user."""
        if is_privileged(uid):
            return self.total
        return min(min(self._first_per_user, self._first) + user_share(self._shared), self._most_per_user)

    def left(self, uid: int, used: Counter[int]) -> int:
        """How many more units the user may take now. `used` has the units of every user."""
        own = used.get(uid, 0)
        unused = max(0, self.total - used.total())  # `Quota.charge` may have taken more than there are
        if is_privileged(uid):
            return unused
        privileged = sum(count for user, count in used.items() if is_privileged(user))
        others = [count for user, count in used.items() if user != uid and not is_privileged(user)]
        first_used = min(self._first, sum(min(count, self._first_per_user) for count in others))
        first = min(self._first_per_user, self._first - first_used)
        # Units that privileged users have beyond their reserve come from the shared part, as long as it
        # lasts.
        shared_used = sum(others) - first_used + max(0, privileged - self._reserve)
        shared = user_share(self._shared - shared_used) if shared_used < self._shared else 0
        allowed = min(first + shared, self._most_per_user)
        # The rest of the reserve stays free for privileged users.
        free = unused - max(0, self._reserve - privileged)
        return max(0, min(allowed - own, free))


class Quota:
    """`total` units, shared. Every thread may use it."""

    def __init__(
        self,
        total: int,
        *,
        most_per_user: int | None = None,
        newcomers: int = NEWCOMERS,
        first_units: int = 0,
    ) -> None:
        """As `Shares`."""
        self.total = total
        self._shares = Shares(
            total, most_per_user=most_per_user, newcomers=newcomers, first_units=first_units
        )
        self._lock = threading.Lock()
        self._used: Counter[int] = Counter()

    @property
    def used(self) -> int:
        """The units of all users."""
        with self._lock:
            return self._used.total()

    def used_by(self, uid: int) -> int:
        with self._lock:
            return self._used[uid]

    def most(self, uid: int) -> int:
        """How many units the user may have if there is no other user."""
        return self._shares.most(uid)

    def left(self, uid: int) -> int:
        """How many more units the user may take now."""
        with self._lock:
            return self._shares.left(uid, self._used)

    def take(self, uid: int, amount: int = 1) -> bool:
        """Takes all of it or nothing; whether it did. The caller must give it back."""
        with self._lock:
            if amount > self._shares.left(uid, self._used):
                return False
            self._used[uid] += amount
            return True

    def charge(self, uid: int, amount: int) -> None:
        """Counts units that the user has already, whatever is left. The caller must give them back."""
        with self._lock:
            self._used[uid] += amount

    def release(self, uid: int, amount: int = 1) -> None:
        with self._lock:
            self._used[uid] -= amount
            assert self._used[uid] >= 0
            if not self._used[uid]:
                del self._used[uid]
