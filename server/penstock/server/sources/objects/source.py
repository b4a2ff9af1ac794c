"""The Source that a kind of object store is: what is a directory there, and how an object is opened."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic

from ...errors import AccessDeniedError, CheckpointNotFoundError, SourceUnavailableError
from .. import Access
from .listing import list_names
from .object import ObjectFile, ask_first, ask_state
from .requests import Requests
from .service import L, ObjectService, ObjectSettings

OBJECT_SUFFIX = ".safetensors"
"""A key that ends so is taken for an object; any other may be the prefix of several."""
KNOWN_OBJECTS = 10_000


class ObjectSource(ABC, Generic[L]):
    """Makes no connection and reads no configuration before the first URI. A subclass says how URIs are read
    and who may read what."""

    kind: str
    schemes: tuple[str, ...]
    descriptors_per_file = 0  # connections are kept by `ObjectSettings.connections`

    def __init__(
        self, settings: ObjectSettings, workers: Callable[[int], Executor], on_retry: Callable[[str], None]
    ) -> None:
        """`workers` gives, for a uid, the threads that open objects and read their headers. `on_retry` gets
        the reason of each repeated request, from one thread at a time."""
        # Requests end by themselves, when `retries` of them have failed in a row.
        self.patience_seconds = max(600.0, 2 * settings.retries * settings.timeout_seconds)
        self._workers = workers
        self._on_retry = on_retry
        self._settings = settings
        self._lock = threading.Lock()
        self._made: Requests[L] | None = None
        self._known: OrderedDict[str, None] = OrderedDict()
        """Objects opened lately: of these the headers are probably kept, and a HEAD request is enough."""

    # ---- a store's own --------------------------------------------------------------------------

    @abstractmethod
    def parse(self, uri: str) -> L:
        """Raises InvalidRequestError."""

    @abstractmethod
    def check_access(self, location: L, access: Access) -> None:
        """Raises AccessDeniedError unless the caller may read there."""

    @abstractmethod
    def is_version(self, location: L) -> bool:
        """It names one version of an object, and so no directory."""

    @abstractmethod
    def as_directory(self, location: L) -> L:
        """The same with a key that ends in `/`."""

    @abstractmethod
    def connect(self) -> ObjectService[L]:
        """What imports and configures the store's library. Raises PenstockError."""

    # ---- the Source -----------------------------------------------------------------------------

    def workers(self, location: str, uid: int) -> Executor:
        return self._workers(uid)

    def location(self, source: str) -> str:
        return self.parse(source).uri

    def name(self, location: str) -> str:
        return self.parse(location).key.rpartition("/")[2]

    def list(self, location: str, access: Access) -> list[str] | None:
        named = self.parse(location)
        self.check_access(named, access)
        if self.is_version(named) or named.key.endswith(OBJECT_SUFFIX):
            return None
        is_directory = not named.key or named.key.endswith("/")
        directory = named if is_directory else self.as_directory(named)
        names = [name for name in list_names(self._requests(), directory) if name]
        return names if names or is_directory else None

    def dangles(self, location: str, access: Access) -> bool:
        return False

    def open(self, location: str, access: Access) -> ObjectFile[L]:
        named = self.parse(location)
        self.check_access(named, access)
        if not named.key:
            raise CheckpointNotFoundError(f"{location} names no object; add a key to it", file=location)
        requests = self._requests()
        if self._was_known(location):
            try:
                state = requests.patiently(named, lambda: ask_state(requests, named))
                return ObjectFile(self.kind, requests, named, state, b"")
            except (AccessDeniedError, SourceUnavailableError):
                """The answer to a HEAD has no body that would say why: ask once more for one that has."""
        state, first = requests.patiently(named, lambda: ask_first(requests, named))
        return ObjectFile(self.kind, requests, named, state, first)

    def stop(self) -> None:
        """Ends the requests under way, with an error."""
        with self._lock:
            if self._made is not None:
                self._made.stop()

    def _requests(self) -> Requests[L]:
        with self._lock:
            if self._made is None:
                self._made = Requests(self.connect(), self._settings, self._on_retry)
            return self._made

    def remember(self, location: str) -> None:
        """Its header is kept: the next `open` asks for its version alone."""
        self._was_known(location)

    def _was_known(self, location: str) -> bool:
        with self._lock:
            known = location in self._known
            self._known[location] = None
            self._known.move_to_end(location)
            if len(self._known) > KNOWN_OBJECTS:
                self._known.popitem(last=False)
            return known
