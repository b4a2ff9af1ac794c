"""A prefetch whose entry stays for the one who asked for it."""

from __future__ import annotations

from collections.abc import Callable

from ...sources import Access
from ...staging.entry import CacheEntry
from ..prefetch import Prefetch
from ..request import Caller, LoadContext, Request


class WarmUp(Prefetch):
    """`run` it once."""

    def __init__(
        self,
        request: Request,
        caller: Caller,
        access: Access,
        context: LoadContext,
        *,
        keep: Callable[[CacheEntry], None],
        keep_old: bool,
    ) -> None:
        """`keep` is told of the entry when it is staged whole, and not yet left. With `keep_old` an entry of
        another version stays."""
        super().__init__(request, caller, access, context, pin=False)
        self._tell = keep
        self._keeps_old = keep_old

    def _keep(self, entry: CacheEntry) -> None:
        self._tell(entry)
