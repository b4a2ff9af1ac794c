"""Which threads resolve the sources of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor

from ..system.fair import FIRST_CALLS, FairExecutor
from . import choose
from .store import Store

MIXED_RESOLVERS = 64
MOST_PLACED = 64
"""Of so many sources it is looked up where they are. More count as of several mounts."""


class Resolvers:
    """The threads of the stores, and some for requests whose sources are of several mounts or stores."""

    def __init__(self, stores: Mapping[str, Store]) -> None:
        """The stores by kind, the one that has the paths first. Their threads remain theirs."""
        self._stores = stores
        self._sources = [store.source for store in stores.values()]
        self._mixed = FairExecutor(MIXED_RESOLVERS, "mixed-resolver", first_calls=FIRST_CALLS)

    def of(self, sources: Sequence[str], uid: int) -> Executor:
        """Those of the mount or the store that all sources are of. Sources of several have threads of their
        own: what hangs of one must not hold up the loads of another. Raises InvalidRequestError for what is
        no source."""
        places: dict[str, tuple[Store, str]] = {}
        if len(sources) <= MOST_PLACED:  # this runs on the event loop
            for source in sources:
                store = self._stores[choose(self._sources, source).kind]
                places.setdefault(store.place(source), (store, source))
        if len(places) != 1:
            return self._mixed.of(uid)
        store, source = next(iter(places.values()))
        return store.resolvers(store.source.location(source), uid)

    def shutdown(self) -> None:
        """Ends the threads for several. Does not wait."""
        self._mixed.shutdown()
