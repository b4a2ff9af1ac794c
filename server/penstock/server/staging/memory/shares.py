"""Who holds how much of the staging buffer, and how much more each user may have. Pure.

A user who is not privileged gets at most seven eighths of the memory that other users leave (`user_share`).
So whatever one user holds, and for however long, another user's load finds room for a window.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...system.limits import is_privileged, user_share
from ..entry import CacheEntry
from ..pool import SlabPool


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes by state. Their sum never exceeds the limit."""

    free_bytes: int
    reading_bytes: int
    leased_bytes: int
    warm_bytes: int
    peak_bytes: int
    waiting: int
    stuck_bytes: int = 0
    """The part of `reading_bytes` that belongs to evicted entries whose reads have not ended."""

    @classmethod
    def of(
        cls, pool: SlabPool, entries: Iterable[CacheEntry], draining: Iterable[CacheEntry], *, waiting: int
    ) -> Usage:
        slabs = {"waiting": 0, "reading": 0, "leased": 0, "warm": 0, "failed": 0}
        for entry in entries:
            slabs[entry.state] += len(entry.slabs)
        stuck = sum(len(entry.slabs) for entry in draining)
        return cls(
            free_bytes=pool.free_slabs * pool.slab_bytes,
            reading_bytes=(slabs["reading"] + slabs["failed"] + stuck) * pool.slab_bytes,
            leased_bytes=slabs["leased"] * pool.slab_bytes,
            warm_bytes=slabs["warm"] * pool.slab_bytes,
            peak_bytes=pool.peak_slabs * pool.slab_bytes,
            waiting=waiting,
            stuck_bytes=stuck * pool.slab_bytes,
        )


class Shares:
    """Shares of `max_slabs`, computed from what the entries have at each moment."""

    def __init__(self, entries: dict[int, CacheEntry], draining: set[CacheEntry], *, max_slabs: int) -> None:
        """`entries` are those of the buffer. `draining` are those that were evicted while reads wrote into
        them. Both belong to the caller, who changes them."""
        self._entries = entries
        self._draining = draining
        self._max_slabs = max_slabs

    def left(self, uid: int | None) -> int:
        """Slabs that loads of `uid` may take beyond those that they hold."""
        if uid is None or is_privileged(uid):
            return self._max_slabs
        own, others = self._held(uid)
        return max(0, user_share(self._max_slabs - others) - own)

    def would_exceed(self, uid: int | None, count: int) -> bool:
        """Whether `count` more slabs would exceed the share of `uid` even if other users had none."""
        if uid is None or is_privileged(uid):
            return False
        own, _ = self._held(uid)
        return own + count > user_share(self._max_slabs)

    def too_large(self, entry: CacheEntry, uid: int) -> bool:
        """Whether the entry is not the user's yet, and with what the user holds would exceed that user's
        share."""
        if entry.pinned or is_privileged(uid) or (entry.owner_uid == uid and not entry.idle):
            return False
        own, others = self._held(uid)
        if not entry.idle:
            others -= entry.slab_count  # they would be the user's own
        return own + entry.slab_count > user_share(self._max_slabs - others)

    def _held(self, uid: int) -> tuple[int, int]:
        """Slabs that loads of `uid` hold or are about to get, and those of others. Warm slabs are neither."""
        own = others = 0
        for entry in (*self._entries.values(), *self._draining):
            count = entry.slab_count
            if not entry.pinned and (entry.idle or entry.stuck):
                count -= entry.unused_slabs  # others get these when they need them
            if entry.owner_uid == uid and not entry.pinned:  # the operator, not the user, decides about pins
                own += count
            else:
                others += count
        return own, others
