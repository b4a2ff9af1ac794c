"""The Source of an object store: its directories, and how objects are opened."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from typing import Generic

from ...errors import (
    AccessDeniedError,
    CheckpointInvalidError,
    CheckpointNotFoundError,
    PenstockError,
    ShuttingDownError,
    SourceUnavailableError,
)
from .. import Access, Listed, Wanted, join
from .faults import Transient
from .listing import list_names, list_tree
from .object import ObjectFile, ask_first, ask_state
from .requests import Requests, no_range
from .service import L, ObjectService, ObjectSettings, ObjectState

OBJECT_SUFFIX = ".safetensors"
"""A key that ends in this names an object. Any other key may be the prefix of several."""
KNOWN_OBJECTS = 10_000


class ObjectSource(ABC, Generic[L]):
    """Makes no connection and reads no configuration before the first URI. A subclass parses URIs, and
    decides who may read which."""

    kind: str
    schemes: tuple[str, ...]
    descriptors_per_file = 0  # connections are kept by `ObjectSettings.connections`
    checksum_headers: Mapping[str, str] = {}
    """Headers of a HEAD request that ask for checksums, if answers to requests for a range have none."""

    def __init__(
        self, settings: ObjectSettings, workers: Callable[[int], Executor], on_retry: Callable[[str], None]
    ) -> None:
        """`workers` returns, for a uid, the threads that open objects and read their headers. `on_retry` is
        called with the reason of each repeated request, by one thread at a time."""
        # Requests end by themselves: `retries` failures in a row end them.
        self.patience_seconds = max(600.0, 2 * settings.retries * settings.timeout_seconds)
        self._workers = workers
        self._on_retry = on_retry
        self._settings = settings
        self._lock = threading.Lock()
        self._made: Requests[L] | None = None
        self._known: OrderedDict[int, None] = OrderedDict()
        """Hashes of objects that were opened lately. Their headers are probably kept, so a HEAD request is
        enough. If two have one hash, one may be asked in the wrong way, which costs a request."""

    # ---- for subclasses -------------------------------------------------------------------------

    @abstractmethod
    def parse(self, uri: str) -> L:
        """Raises InvalidRequestError."""

    @abstractmethod
    def admitted(self, location: str, access: Access) -> L:
        """The parsed location, for a caller who may read there. Raises InvalidRequestError and
        AccessDeniedError."""

    @abstractmethod
    def is_version(self, location: L) -> bool:
        """Whether it names one version of an object, and so cannot be a directory."""

    @abstractmethod
    def as_directory(self, location: L) -> L:
        """The same location with a slash at the end of the key."""

    def whole(self, location: L, size_bytes: int | None) -> PenstockError | Transient | None:
        """The failure if the store answers with a whole object instead of a range of it. `size_bytes` is its
        size, if the store says it. None: the range is taken out of the answer."""
        return no_range(location, size_bytes)

    @abstractmethod
    def connect(self) -> ObjectService[L]:
        """Imports and configures the store's library. Raises PenstockError."""

    # ---- the Source -----------------------------------------------------------------------------

    def workers(self, location: str, uid: int) -> Executor:
        return self._workers(uid)

    def location(self, source: str) -> str:
        return self.parse(source).uri

    def name(self, location: str) -> str:
        return self.parse(location).key.rpartition("/")[2]

    def join(self, directory: str, name: str) -> str:
        return join(directory, name)

    def list(self, location: str, access: Access) -> list[str] | None:
        named = self.admitted(location, access)
        if self.is_version(named) or named.key.endswith(OBJECT_SUFFIX):
            return None
        directory = self._directory(named)
        names = [name for name in list_names(self._requests(), directory, access.listing) if name]
        return names if names or directory is named else None

    def tree(self, location: str, access: Access, wanted: Wanted) -> Iterator[Listed]:
        named = self.admitted(location, access)
        if self.is_version(named):
            raise CheckpointInvalidError(
                f"{location} is a version of one object, and no directory; name a directory", file=location
            )
        return list_tree(self._requests(), self._directory(named), wanted, access.listing)

    def dangles(self, location: str, access: Access) -> bool:
        return False

    def open(self, location: str, access: Access) -> ObjectFile[L]:
        named = self.admitted(location, access)
        if not named.key:
            raise CheckpointNotFoundError(f"{location} names no object; add a key to it", file=location)
        requests = self._requests()
        # A fetch needs the bytes. A kept header is of no use to it.
        if not access.for_fetch and self._was_known(location):
            try:
                headers = self.checksum_headers if self._settings.checksums else {}
                state = requests.patiently(named, lambda: ask_state(requests, named, headers))
                return ObjectFile(self.kind, requests, named, state, b"")
            except (AccessDeniedError, SourceUnavailableError):
                """The answer to a HEAD has no body with the reason. The request below gets one that has."""
        state, first = requests.patiently(named, lambda: ask_first(requests, named))
        if self.checksum_headers and self._settings.checksums and not access.for_fetch:
            state = self._with_checksums(requests, named, state)
        return ObjectFile(self.kind, requests, named, state, first)

    def _with_checksums(self, requests: Requests[L], named: L, state: ObjectState) -> ObjectState:
        """The state with checksums, which take a request of their own. If that is refused, the state has
        none: the caller may read the object all the same."""
        headers = {**self.checksum_headers, **state.conditions}
        try:
            asked = requests.patiently(named, lambda: ask_state(requests, named, headers))
        except ShuttingDownError:
            raise
        except PenstockError:
            return state
        return replace(state, checksums=asked.checksums) if asked.version == state.version else state

    def stop(self) -> None:
        """Ends requests under way, with an error."""
        with self._lock:
            if self._made is not None:
                self._made.stop()

    def _directory(self, named: L) -> L:
        return named if not named.key or named.key.endswith("/") else self.as_directory(named)

    def _requests(self) -> Requests[L]:
        with self._lock:
            if self._made is None:
                self._made = Requests(self.connect(), self._settings, self._on_retry, self.whole)
            return self._made

    def permit(self, location: str, access: Access) -> None:
        """See `sources.kept.Remote`."""
        self.admitted(location, access)

    def remember(self, location: str) -> None:
        """See `Remote`."""
        self._was_known(location)

    def _was_known(self, location: str) -> bool:
        key = hash(location)
        with self._lock:
            known = key in self._known
            self._known[key] = None
            self._known.move_to_end(key)
            if len(self._known) > KNOWN_OBJECTS:
                self._known.popitem(last=False)
            return known
