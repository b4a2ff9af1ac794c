"""Where checkpoints come from: the protocols that every kind of storage implements."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import AccessDeniedError, InvalidRequestError, SourceUnavailableError
from .checksums import Checksum
from .kept import KeptFile
from .looking import ListingCost

Wanted = Callable[[str], bool]
"""Says of a name in a tree whether it is wanted, and of one that ends in `/` whether anything below it may
be. Names are relative to the tree's top, with `/` between their parts."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def scheme_of(uri: str) -> str:
    """The scheme as it is written; empty for a path, which has none."""
    match = _SCHEME.match(uri)
    return match[1] if match else ""


def choose(sources: Sequence[Source], uri: str) -> Source:
    """The source of a URI's scheme. A path without a scheme belongs to the first source, whose own scheme may
    be written in any case. Raises InvalidRequestError for a scheme that no source has."""
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
        """Equal for equal bytes at the same place; differs after any change, and for another file in its
        place, another mount included."""

    @property
    def portable_version(self) -> str:
        """The same without the mount, which only this mount namespace knows."""

    @property
    def listed_version(self) -> str:
        """What `Source.tree` says of this version, if it says anything. Means something only for the same
        name in the same tree."""

    @property
    def mount(self) -> str:
        """The identity of the mount that it was opened through; empty for objects."""

    @property
    def mount_point(self) -> str:
        """Where that mount is; empty for objects. If one file hangs, all files of its mount point do."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def checksums(self) -> Sequence[Checksum]:
        """What its store says of all bytes of this version, the cheapest to check first."""

    @property
    def alignment(self) -> int:
        """Reads are fastest, or only possible without a copy, at multiples of this."""

    give_up_at: float
    """Of the monotonic clock: a read that has not ended by then raises SourceUnavailableError. Infinite but
    while a header is read: of the reader threads, which read the rest, there are spares."""

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fills the views with the bytes from `offset` on, as far as the file goes.

        Raises CheckpointChangedError when the file turns out shorter than it was or is another version,
        SourceUnavailableError when storage fails, and RetryLater when it may still succeed.
        """

    def check_unchanged(self) -> None:
        """Raises CheckpointChangedError unless all bytes read so far were of `version`."""

    def unmounted(self) -> bool:
        """Whether the mount that it was opened through is gone, closed or not. Does not block."""

    def close(self) -> None:
        """Closes its descriptors. No read may be under way."""


class Source(Protocol):
    """One kind of storage. Methods block; a location is what `location` returned, or a name joined to one."""

    @property
    def kind(self) -> str:
        """Its name in metrics."""

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes of its URIs, without `://`."""

    descriptors_per_file: int
    """Descriptors that an open file takes."""
    patience_seconds: float
    """How long opening a file and reading its header may wait for storage."""

    def workers(self, location: str, uid: int) -> Executor:
        """Threads that open the file there and read its header, for that user."""

    def location(self, source: str) -> str:
        """The one way to write what `source` names. Raises InvalidRequestError. Does not block."""

    def name(self, location: str) -> str:
        """The last part of it."""

    def join(self, directory: str, name: str) -> str:
        """The location of what has that name, or relative path, in a directory."""

    def list(self, location: str, access: Access) -> list[str] | None:
        """Names in a directory, sorted; None if it is to be opened as a file. Raises ListingDeniedError
        where only the list is refused, and what is in the directory may be readable."""

    def tree(self, location: str, access: Access, wanted: Wanted) -> Iterator[Listed]:
        """Every wanted regular file at or below the directory `location`, each once, in any order; links that
        `access` lets be followed count as what they lead to. Lazily: memory is bounded, and so are the names
        that are looked at (`MAX_TREE_NAMES`). Nothing is said of files that come or go meanwhile.

        Raises CheckpointNotFoundError where there is no such directory (an object store: nothing below it),
        CheckpointInvalidError for a file, for what has no end, and for too many names; AccessDeniedError,
        ListingDeniedError and SourceUnavailableError as `open` and `list` do. Names are as the storage has
        them: the caller decides which are safe.
        """

    def dangles(self, location: str, access: Access) -> bool:
        """Something of that name was listed, and nothing can be opened there: a link that leads nowhere."""

    def open(self, location: str, access: Access) -> SourceFile:
        """The caller must close it. Raises a PenstockError that names it."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A file in a tree, as a list says it."""

    name: str
    """Relative to the top of the tree."""
    size_bytes: int
    version: str
    """Equal for equal bytes, differs after any change: `SourceFile.listed_version` of the file that is there
    now. Empty where a list does not say: then only the open file does."""


class Pins:
    """What is looked up once. Every thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._values: dict[str, str] = {}

    def get(self, name: str, look_up: Callable[[], str]) -> str:
        """Looked up the first time; others that ask for the same name meanwhile wait."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._values:
                self._values[name] = look_up()
            return self._values[name]


@dataclass(frozen=True, slots=True)
class Access:
    """What a caller may read: everything, or locations that begin with one of `prefixes`."""

    uid: int
    privileged: bool
    prefixes: tuple[str, ...]
    for_fetch: bool = False
    """To copy files, of whatever kind. Where they have modes and owners, these must let the caller read them,
    too: a prefix gives away all checkpoints below it, but not every other file that the daemon can read."""
    gids: frozenset[int] = frozenset()
    """The caller's groups, for modes."""
    pins: Pins = field(default_factory=Pins, compare=False)
    """What names that move stand for, such as branches. There is one access for each request, so that all
    files of a load are of one commit."""
    listing: ListingCost = field(default_factory=ListingCost, compare=False)
    """What the request may list, and what that costs."""


class ListingDeniedError(AccessDeniedError):
    """A directory may not be listed."""


class RetryLater(Exception):
    """Storage failed for now. What lies before `reached` is read; the rest may be asked for again after a
    while. Raised instead of waiting, so that no thread sleeps."""

    def __init__(self, reached: int, delay_seconds: float) -> None:
        super().__init__(f"read up to byte {reached}, the rest in {delay_seconds:.3f} s")
        self.reached = reached
        self.delay_seconds = delay_seconds


@dataclass(frozen=True, slots=True)
class RetryingReader:
    """Reads a file on a thread that may sleep until the rest can be asked for again, but not beyond
    `give_up_at` of the monotonic clock. Raises SourceUnavailableError then."""

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
    """Storage took longer than a read may take."""
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
    """The directory that holds it."""
    return location[: location.rindex("/") + 1]
