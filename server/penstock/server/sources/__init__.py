"""Where checkpoints come from: the protocols that every kind of storage implements."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from ..errors import AccessDeniedError, InvalidRequestError, SourceUnavailableError
from .kept import KeptFile

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
    def mount(self) -> str:
        """The identity of the mount that it was opened through; empty for objects."""

    @property
    def mount_point(self) -> str:
        """Where that mount is; empty for objects. If one file hangs, all files of its mount point do."""

    @property
    def size_bytes(self) -> int: ...

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

    def list(self, location: str, access: Access) -> list[str] | None:
        """Names in a directory, sorted; None if it is to be opened as a file. Raises ListingDeniedError
        where only the list is refused, and what is in the directory may be readable."""

    def dangles(self, location: str, access: Access) -> bool:
        """Something of that name was listed, and nothing can be opened there: a link that leads nowhere."""

    def open(self, location: str, access: Access) -> SourceFile:
        """The caller must close it. Raises a PenstockError that names it."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a caller may read: everything, or locations that begin with one of `prefixes`."""

    uid: int
    privileged: bool
    prefixes: tuple[str, ...]


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
