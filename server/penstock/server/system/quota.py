"""How much of a bounded thing each user may have: the one rule for sessions, connections, loads, descriptors
and the memory of requests.

    total = what users who are not privileged share + a reserve that only privileged ones may use

A user who is not privileged gets at most seven eighths (`user_share`) of what the other users leave of the
first part: so whatever a user holds, the next one finds something. Root and the daemon's own user may have
all that is left, and the reserve is theirs alone, so nobody can keep them out.

It counts and decides, and neither waits nor raises: what a refusal means is for the caller to say.
"""

from __future__ import annotations

import threading
from collections import Counter

from .limits import is_privileged, user_share

RESERVED_PART = 8
"""One part in so many is the reserve for privileged users, at least 1."""


class Quota:
    """`total` units, shared. Every thread may use it."""

    def __init__(self, total: int, *, most_per_user: int | None = None) -> None:
        """`most_per_user` bounds one user who is not privileged, besides the share. With a total of 1 there
        is no reserve."""
        self.total = total
        self._reserve = min(max(1, total // RESERVED_PART), total - 1)
        self._most_per_user = most_per_user
        self._lock = threading.Lock()
        self._used: Counter[int] = Counter()

    @property
    def used(self) -> int:
        """By all users."""
        with self._lock:
            return self._used.total()

    def used_by(self, uid: int) -> int:
        with self._lock:
            return self._used[uid]

    def left(self, uid: int) -> int:
        """What the user may take now, beyond what it has."""
        with self._lock:
            return self._left(uid)

    def take(self, uid: int, amount: int = 1) -> bool:
        """Takes all of it or nothing; whether it did. What was taken must be given back."""
        with self._lock:
            if amount > self._left(uid):
                return False
            self._used[uid] += amount
            return True

    def give_back(self, uid: int, amount: int = 1) -> None:
        with self._lock:
            self._used[uid] -= amount
            assert self._used[uid] >= 0
            if not self._used[uid]:
                del self._used[uid]

    def _left(self, uid: int) -> int:
        own = self._used.get(uid, 0)
        unused = self.total - self._used.total()
        if is_privileged(uid):
            return unused
        privileged = sum(count for user, count in self._used.items() if is_privileged(user))
        others = self._used.total() - own - privileged + max(0, privileged - self._reserve)
        allowed = user_share(max(0, self.total - self._reserve - others))
        if self._most_per_user is not None:
            allowed = min(allowed, self._most_per_user)
        # What privileged users have of the reserve leaves the rest of it to them.
        free = unused - max(0, self._reserve - privileged)
        return max(0, min(allowed - own, free))
