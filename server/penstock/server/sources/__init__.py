"""Sources of checkpoints: where bytes come from. This module has the protocols that every kind of storage
implements.

stores        the list of stores: start here. A `store` is a source with its threads
file/         local files and mounts
objects/      the engine of all object stores; `s3/`, `gcs/`, `azure/`, `hub/` and `web/` are such stores
resolvers     which threads resolve the sources of a request
checksums     checksums of whole files; `verification` decides which one counts
looking       what listing costs a request
replies       what stores reply to a load, for when they cannot be asked
resuming      whether a load may go on at another daemon
kept          protocols of files that keep their bytes on a local disk

May import: config, system.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ..errors import AccessDeniedError, InvalidRequestError, SourceUnavailableError
from .checksums import Checksum
from .kept import KeptFile
from .looking import ListingCost
from .replies import Replies

Wanted = Callable[[str], bool]
"""Says whether a name in a tree is wanted. For a name that ends in `/` it says whether anything below it may
be wanted. Names are relative to the tree's top, with `/` between their parts."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def scheme_of(uri: str) -> str:
    """The scheme as it is written; empty for a path."""
    match = _SCHEME.match(uri)
    return match[1] if match else ""


def choose(sources: Sequence[Source], uri: str) -> Source:
    """The source that has the URI's scheme. A path belongs to the first source, whose own scheme may be
    written in any case. Raises InvalidRequestError for a scheme that no source has."""
    scheme = scheme_of(uri)
    for source in sources:
        if scheme in source.schemes:
            return source
    if not scheme or scheme.lower() in sources[0].schemes:
        return sources[0]
    others = [f"{known}://" for source in sources[1:] for known in source.schemes]
    if f"{scheme.lower()}://" in others:
        raise InvalidRequestError(f"sources: {uri[:200]!r}: write {scheme.lower()}:// in lower case")
    raise InvalidRequestError(
        f"sources: {uri[:200]!r}: this penstockd knows no {scheme.lower()[:20]}:// sources; use a path or "
        f"{' or '.join(others)}"
    )


class SourceFile(Protocol):
    """One version of one file or object, open for reading. Methods block and may run on many threads."""

    @property
    def kind(self) -> str:
        """The kind of its source."""

    @property
    def uri(self) -> str: ...

    @property
    def version(self) -> str:
        """Equal for equal bytes at the same place. It differs after any change, and for another file at that
        place. A file on another mount is another file."""

    @property
    def portable_version(self) -> str:
        """The version without what another daemon cannot know: the mount, which has a meaning in this mount
        namespace only, and `writes_before`."""

    @property
    def writes_before(self) -> int:
        """How many writes to it this daemon has been told of, before it was opened."""

    @property
    def listed_version(self) -> str:
        """The version as `Source.tree` lists it, if that lists versions. Two are comparable only for the same
        name in the same tree."""

    @property
    def mount(self) -> str:
        """The identity of the mount through which it was opened; empty for objects."""

    @property
    def mount_point(self) -> str:
        """The path of that mount; empty for objects. If one file hangs, all files of its mount point do."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def checksums(self) -> Sequence[Checksum]:
        """The store's checksums of the whole content of this version, the cheapest to check first."""

    @property
    def alignment(self) -> int:
        """Reads at multiples of this are fastest, or are the only ones that need no copy."""

    give_up_at: float
    """A time of the monotonic clock. A read that has not ended by then raises SourceUnavailableError. It is
    infinite except while a header is read: reader threads, which read the rest, have spare ones."""

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fills the views with the bytes from `offset` on, up to the end of the file.

        Raises CheckpointChangedError when the file turns out shorter than it was or is another version,
        SourceUnavailableError when storage fails, and RetryLater when it may still succeed.
        """

    def check_unchanged(self) -> None:
        """Raises CheckpointChangedError unless all bytes read so far were of `version`."""

    def unmounted(self) -> bool:
        """Whether the mount through which it was opened is gone. The file may be closed. Does not block."""

    def close(self) -> None:
        """Closes its descriptors. No read may be under way."""


class Source(Protocol):
    """One kind of storage. Methods block. A location is a result of `location`, or a name joined to one."""

    @property
    def kind(self) -> str:
        """Its name in metrics."""

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes of its URIs, without `://`."""

    descriptors_per_file: int
    """How many descriptors an open file takes."""
    patience_seconds: float
    """How long opening a file and reading its header may wait for storage."""

    def workers(self, location: str, uid: int) -> Executor:
        """The threads that open files there and read their headers for that user."""

    def location(self, source: str) -> str:
        """The canonical form of `source`. Raises InvalidRequestError. Does not block."""

    def name(self, location: str) -> str:
        """The last part of the location."""

    def join(self, directory: str, name: str) -> str:
        """The location of a name, or of a relative path, in a directory."""

    def list(self, location: str, access: Access) -> list[str] | None:
        """The names in a directory, sorted. None: the location is to be opened as a file. Raises
        ListingDeniedError if only the list is refused, and the files may still be readable."""

    def tree(self, location: str, access: Access, wanted: Wanted) -> Iterator[Listed]:
        """Every wanted regular file at or below the directory `location`, each once, in any order. A link
        counts as its target if `access` allows to follow it. The iterator is lazy: memory is bounded, and so
        is the number of names (`MAX_TREE_NAMES`). A file that comes or goes meanwhile may be in it or not.

        Raises CheckpointNotFoundError if there is no such directory (in an object store: no object below it).
        Raises CheckpointInvalidError for a file, for a tree without an end, and for too many names. Raises
        AccessDeniedError, ListingDeniedError and SourceUnavailableError as `open` and `list` do. Names are as
        the storage has them: the caller decides which are safe.
        """

    def dangles(self, location: str, access: Access) -> bool:
        """Whether the location is a link without a target: its name is listed, but nothing can be opened."""

    def open(self, location: str, access: Access) -> SourceFile:
        """The caller must close it. Raises a PenstockError that names it."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A file in a tree, as the storage lists it."""

    name: str
    """Relative to the top of the tree."""
    size_bytes: int
    version: str
    """Equal for equal bytes, different after any change. It equals `SourceFile.listed_version` of the file
    that is there now. Empty if the storage does not list versions: then only the open file has one."""


class Pins:
    """Values that are looked up once. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._values: dict[str, str] = {}

    def get(self, name: str, look_up: Callable[[], str]) -> str:
        """The value of a name. The first call looks it up, and other calls for that name wait meanwhile."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._values:
                self._values[name] = look_up()
            return self._values[name]


@dataclass(frozen=True, slots=True)
class Access:
    """The access rights of a caller: to everything, or to locations that begin with one of `prefixes`."""

    uid: int
    privileged: bool
    prefixes: tuple[str, ...]
    for_fetch: bool = False
    """The caller copies files, of any kind. If files have modes and owners, these must let the caller read
    them too: a prefix gives access to all checkpoints below it, but not to every other file that the daemon
    can read."""
    gids: frozenset[int] = frozenset()
    """The caller's groups, for modes."""
    pins: Pins = field(default_factory=Pins, compare=False)
    """The meaning of names that move, such as branches. Each request has one `Access`, so all files of a load
    are of one commit."""
    replies: Replies | None = field(default=None, compare=False)
    """Where sources note what stores reply to this request, or have it from instead of asking them."""
    listing: ListingCost = field(default_factory=ListingCost, compare=False)
    """The cost of all lists of the request, and its limits."""


class ListingDeniedError(AccessDeniedError):
    """The caller, or the daemon, may not list a directory."""


class RetryLater(Exception):
    """Storage failed for now. The bytes before `reached` are read. The rest may be asked for again after a
    delay. Raised instead of waiting, so no thread sleeps."""

    def __init__(self, reached: int, delay_seconds: float) -> None:
        super().__init__(f"read up to byte {reached}, the rest in {delay_seconds:.3f} s")
        self.reached = reached
        self.delay_seconds = delay_seconds


Tell = Callable[[int], None]
"""Called with an offset: the bytes before it have come."""

TELL_BYTES = 2 << 20
"""So many bytes fit into the cache of a core, or into its share of a common one."""


@runtime_checkable
class TellingFile(Protocol):
    """A file whose bytes come in pieces, and can be used while others still come."""

    def read_and_tell(self, offset: int, views: Sequence[memoryview], tell: Tell | None) -> None:
        """As `read_into`. Calls `tell`, if there is one, on this thread whenever about `TELL_BYTES` more have
        come, and not always at the end."""


@dataclass(frozen=True, slots=True)
class RetryingReader:
    """Reads a file on a thread that may sleep between attempts, but not beyond `give_up_at` of the monotonic
    clock. Raises SourceUnavailableError then."""

    file: SourceFile
    give_up_at: float = math.inf

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        self.file.give_up_at = self.give_up_at
        start, whole = offset, views
        try:
            while True:
                try:
                    self.file.read_into(offset, views)
                    break
                except RetryLater as later:
                    if time.monotonic() + later.delay_seconds > self.give_up_at:
                        raise too_slow(self.file.uri, later.reached) from None
                    views = without(views, later.reached - offset)
                    offset = later.reached
                    time.sleep(later.delay_seconds)
        finally:
            self.file.give_up_at = math.inf
        if isinstance(self.file, KeptFile):
            self.file.keep_bytes(start, whole)


def too_slow(uri: str, reached: int) -> SourceUnavailableError:
    """The error for a read that took too long."""
    return SourceUnavailableError(
        f"{uri}: storage is too slow: reading had reached byte {reached} when its time limit passed; "
        "check whether it answers, and load it again",
        file=uri,
    )


def without(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """The views without their first `count` bytes."""
    rest = []
    for view in views:
        if count >= len(view):
            count -= len(view)
        else:
            rest.append(view[count:] if count else view)
            count = 0
    return rest


def join(directory: str, name: str) -> str:
    """The location of `name` in `directory`."""
    return directory + name if directory.endswith("/") else f"{directory}/{name}"


def parent(location: str) -> str:
    """The directory that holds the location, with its slash."""
    return location[: location.rindex("/") + 1]
