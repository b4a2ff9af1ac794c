"""What lies in a server of the tests' own, which calls hooks for each request."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from penstock.server.sources.store import Store

from .conformance import ObjectStorage

Hook = Callable[[Any], bool]
"""Gets a request of the server's kind. True: it has answered."""


class HookedStorage(ObjectStorage):
    """A subclass says how content gets to the server, and how it fails."""

    def __init__(self, store: Store, top: str, *hooks: list[Hook]) -> None:
        """`hooks` are the lists of all hosts of the server."""
        super().__init__(store, top)
        self._hooks = hooks

    @contextlib.contextmanager
    def hang(self) -> Iterator[threading.Event]:
        met, over = threading.Event(), threading.Event()

        def hook(request: Any) -> bool:
            met.set()
            assert over.wait(60)
            request.handler.close_connection = True
            return True

        with self.hooked(hook):
            try:
                yield met
            finally:
                over.set()

    @contextlib.contextmanager
    def hooked(self, hook: Hook) -> Iterator[None]:
        """While it lasts, the hook is asked first."""
        for hooks in self._hooks:
            hooks.insert(0, hook)
        try:
            yield
        finally:
            for hooks in self._hooks:
                hooks.remove(hook)
