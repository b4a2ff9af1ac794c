"""Bytes of the daemon's memory that the contents of files may take, shared by users.

A `Charge` is taken before memory is spent, and is kept beside the objects in that memory. It gives its bytes
back when nothing refers to it any more. So memory that is still in use is never counted as free, however a
load ends.

A load for which no memory is left is refused, not queued. Tables are held as long as loads run, which may be
hours. If a load waited for a table while it held others, two loads could wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ...config.units import show_size
from ...errors import CheckpointInvalidError, TooManyLoadsError
from ...system.quota import Quota


class Budget:
    """`total_bytes` for all users. Thread-safe."""

    def __init__(
        self, total_bytes: int, *, make_room: Callable[[int], None] = lambda used_bytes: None
    ) -> None:
        """`make_room` is called with the bytes in use whenever they have grown, so that caches can shrink to
        what is left."""
        self.total_bytes = total_bytes
        self._quota = Quota(total_bytes)
        self._make_room = make_room
        self._returned: deque[tuple[int, int]] = deque()

    @property
    def used_bytes(self) -> int:
        """Bytes in use by all users together."""
        self._collect()
        return self._quota.used

    def most_bytes(self, uid: int) -> int:
        """The most that one user may have when there is no other."""
        return self._quota.most(uid)

    def charge(self, uid: int, size_bytes: int = 0) -> Charge:
        """A charge of `size_bytes` to that user. Raises as `Charge.resize` does."""
        charge = Charge(self, uid)
        charge.resize(size_bytes)
        return charge

    def _take(self, uid: int, size_bytes: int, held_bytes: int) -> None:
        self._collect()
        if self._quota.take(uid, size_bytes):
            self._make_room(self._quota.used)
            return
        if held_bytes + size_bytes > self.most_bytes(uid):
            raise CheckpointInvalidError(
                f"headers, indexes, lists and plans take {show_size(held_bytes + size_bytes)} of penstockd's "
                f"memory, more than the {show_size(self.most_bytes(uid))} that one user may have; load fewer "
                "files at a time"
            )
        raise TooManyLoadsError(
            f"headers, indexes, lists and plans need {show_size(size_bytes)} more of penstockd's memory, and "
            f"{show_size(self._quota.left(uid))} are left for uid {uid}: the loads of this user take "
            f"{show_size(self._quota.used_by(uid))}, all loads {show_size(self._quota.used)} of "
            f"{show_size(self.total_bytes)}; try again when other loads have ended"
        )

    def _release(self, uid: int, size_bytes: int) -> None:
        # Takes no lock: a charge may end wherever Python frees an object, and so also within `Quota`.
        self._returned.append((uid, size_bytes))

    def _collect(self) -> None:
        while self._returned:
            try:
                uid, size_bytes = self._returned.popleft()
            except IndexError:  # another thread was faster
                return
            self._quota.release(uid, size_bytes)


class Charge:
    """Bytes of a budget, charged until nothing refers to this object. Used by one thread at a time."""

    __slots__ = ("__weakref__", "_budget", "_uid", "size_bytes")

    def __init__(self, budget: Budget, uid: int) -> None:
        """A charge of no bytes."""
        self._budget = budget
        self._uid = uid
        self.size_bytes = 0

    def resize(self, size_bytes: int) -> None:
        """Changes the charge. To be called before the memory is spent. Raises, and changes nothing:
        TooManyLoadsError while others hold the bytes that are missing, CheckpointInvalidError if the user can
        never have so many."""
        more_bytes = size_bytes - self.size_bytes
        if more_bytes > 0:
            self._budget._take(self._uid, more_bytes, self.size_bytes)
        elif more_bytes < 0:
            self._budget._release(self._uid, -more_bytes)
        self.size_bytes = size_bytes

    def __del__(self) -> None:
        if self.size_bytes:
            self._budget._release(self._uid, self.size_bytes)


class Parts:
    """A charge for several things, of which each is told by itself. Used by one thread at a time."""

    __slots__ = ("_charge", "_sizes")

    def __init__(self, charge: Charge) -> None:
        self._charge = charge
        self._sizes: dict[str, int] = {}

    def set(self, part: str, size_bytes: int) -> None:
        """The bytes of that part from now on. Raises as `Charge.resize` does, and changes nothing then."""
        others_bytes = self._charge.size_bytes - self._sizes.get(part, 0)
        self._charge.resize(others_bytes + size_bytes)
        self._sizes[part] = size_bytes

    def add(self, part: str, size_bytes: int) -> None:
        self.set(part, self._sizes.get(part, 0) + size_bytes)

    def clear(self) -> None:
        self._sizes.clear()
        self._charge.resize(0)
