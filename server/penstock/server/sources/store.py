"""A store: one kind of storage, with the threads that use it. `stores.py` has the list of all stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import ClassVar, Protocol

from ..config.options import StoreFlags
from ..config.settings import Config
from ..system.quota import Quota
from . import Source


@dataclass(frozen=True, slots=True)
class Reading:
    """How the blocks of a store's files are read."""

    threads: int
    spare_threads: int
    """Most threads that replace threads whose reads stall."""
    block_bytes: int
    """How many bytes a thread reads in one call."""
    may_hang: bool
    """Whether a read may last for ever, because nothing ends it if storage does not answer."""
    copies_at_once: int | None = None
    """The most reads that copy what memory has, and do not wait for storage (`progress.about_to_wait`). More
    than there are processors only get in each other's way. None: as many as there are threads, for reads that
    always wait."""
    thread_name: str = "reader"


class Events(Protocol):
    """A descriptor that becomes readable when something has happened."""

    def fileno(self) -> int: ...

    def clear(self) -> None:
        """Makes it unreadable until something happens again."""

    def close(self) -> None: ...


class Store(ABC):
    """All that a daemon needs of one kind of storage. It is made with the daemon's configuration. It connects
    to nothing, and reads no configuration of its own, before the first source is used."""

    kind: ClassVar[str]
    """Its name in labels of metrics and in status."""
    schemes: ClassVar[tuple[str, ...]]
    """The schemes of its URIs, without `://`."""
    flags: ClassVar[StoreFlags]
    """Its own flags, and how its locations are written."""
    source: Source
    """Has locations, access, lists and open files."""
    reading: Reading

    @abstractmethod
    def __init__(self, config: Config) -> None: ...

    def charge_to(self, descriptors: Quota) -> None:
        """Charges descriptors that it closes later to their users there. Called before the first source is
        used."""
        return

    @abstractmethod
    def resolvers(self, location: str, uid: int) -> Executor:
        """The threads on which sources at that location are resolved for that user. They wait for the threads
        of `Source.workers`, so they must be others."""

    def place(self, source: str) -> str:
        """Equal for sources that are resolved on the same threads. Raises InvalidRequestError. Does not
        block."""
        return self.kind

    @abstractmethod
    def stop(self) -> None:
        """Ends calls under way with an error, if that is possible. Does not wait."""

    @abstractmethod
    def shutdown(self) -> None:
        """Begins no more calls on the store's threads. Does not wait: a call may hang."""

    def retries(self) -> Mapping[str, int]:
        """How many requests were repeated, by reason. Thread-safe."""
        return {}

    def asked_since(self) -> Collection[tuple[str, float]]:
        """For each thread that waits for storage that may hang: the mount point, and since when, by the
        monotonic clock. Thread-safe."""
        return ()

    def gone_events(self) -> Events | None:
        """Events that report that open files may have gone for good (`SourceFile.unmounted`). None: this
        never happens, or is not reported. The caller closes them."""
        return None
