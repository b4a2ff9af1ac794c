"""Whose turn it is among users who wait for the same thing. Pure.

Start-time fair queueing in which everything costs one turn: the user who has taken the fewest turns goes
first. A new or returning user starts at the turn count of the one served last: it has no debt and no credit.
So each of n users gets every n-th turn, however much the others have queued.
"""

from __future__ import annotations


class Turns:
    """The turns of any number of users, by uid. Remembers no user for longer than it matters."""

    def __init__(self) -> None:
        self._taken: dict[int, int] = {}
        """Has only the users who are ahead of the level."""
        self._level = 0

    def next_of(self, uid: int) -> int:
        """The number of the user's next turn. The lowest goes first; of equal ones, the user that came
        first."""
        return self._taken.get(uid, self._level)

    def take(self, uid: int) -> None:
        """The user has had its turn, or gave it away."""
        self._level = self.next_of(uid)
        self._taken[uid] = self._level + 1
        self._taken = {user: taken for user, taken in self._taken.items() if taken > self._level}
