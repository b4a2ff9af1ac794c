"""What listing costs one request: the names that it looks at, and the memory of those that it holds.

Whoever can write to a directory or a bucket decides how many names are in it, and how long they are. So names
are counted and charged while they come, and not when all of them are there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from itertools import islice

from ..errors import CheckpointInvalidError

MAX_TREE_NAMES = 100_000
"""Most names in a directory or tree, wanted or not. It bounds the cost of listing one."""
MAX_TREE_NAME_BYTES = 16 << 20
"""Most bytes of all these names together, where they are held in memory."""
MAX_REQUEST_NAMES = 1_000_000
"""That one request looks at in all its directories."""
NAME_BYTES = 200
"""What a name takes besides its characters: as a string, in a list, and in what is made of that."""
_AT_ONCE = 500
"""Names that are held before they are charged."""


class ListingCost:
    """Used by one thread at a time, but for `stop`."""

    def __init__(
        self, resize: Callable[[int], None] | None = None, stopped: threading.Event | None = None
    ) -> None:
        """`resize` is told how many bytes are held, before more of them are; it may raise. Without it nobody
        is charged."""
        self._resize = resize
        self._stopped = stopped or threading.Event()
        self._held_bytes = 0
        self._names = 0

    def charged(self, resize: Callable[[int], None]) -> ListingCost:
        """The same request from its beginning, charged; `stop` of either stops both."""
        return ListingCost(resize, self._stopped)

    def stop(self) -> None:
        """Nobody waits for it any more: whatever is asked next ends it."""
        self._stopped.set()

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def look(self, location: str, count: int) -> None:
        """So many more names there are looked at. Raises CheckpointInvalidError for too many, and
        CancelledError after `stop`."""
        if self._stopped.is_set():
            raise CancelledError
        self._names += count
        if self._names > MAX_REQUEST_NAMES:
            raise too_many_names(location)

    def hold(self, size_bytes: int) -> None:
        """So many bytes more are held, until `release`. Raises what `resize` raises."""
        if self._resize is not None:
            self._resize(self._held_bytes + size_bytes)
        self._held_bytes += size_bytes

    def release(self, size_bytes: int | None = None) -> None:
        """So many are not held any more, or none are."""
        self._held_bytes -= self._held_bytes if size_bytes is None else size_bytes
        if self._resize is not None:
            self._resize(self._held_bytes)

    def taken(self, location: str, names: Iterable[str], most: int | None = None) -> list[str]:
        """The names, held. Raises CheckpointInvalidError for more than `most`, as a rule `MAX_TREE_NAMES`, or
        too long ones."""
        most = MAX_TREE_NAMES if most is None else most
        found: list[str] = []
        characters = 0
        coming = iter(names)
        while some := list(islice(coming, _AT_ONCE)):
            self.look(location, len(some))
            self.hold(held_bytes(some))
            found += some
            characters += sum(map(len, some))
            if len(found) > most or characters > MAX_TREE_NAME_BYTES:
                raise too_many_names(location)
        return found


def held_bytes(names: Iterable[str]) -> int:
    """What names take that are held for a while, and what is made of them meanwhile."""
    return sum(NAME_BYTES + 2 * len(name) for name in names)


def too_many_names(location: str) -> CheckpointInvalidError:
    """The error for a directory or tree that is too large to be listed."""
    return CheckpointInvalidError(
        f"{location} holds more than {MAX_TREE_NAMES} names, or longer ones than {MAX_TREE_NAME_BYTES >> 20} "
        "MiB, or its list does not end; name a directory below it",
        file=location,
    )
