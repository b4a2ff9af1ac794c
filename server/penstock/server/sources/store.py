"""A store: one kind of storage, with the threads that ask it. `stores.py` has the list of all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import ClassVar, Protocol

from ..config.options import StoreFlags
from ..config.settings import Config
from . import Source


@dataclass(frozen=True, slots=True)
class Reading:
    """How the blocks of a store's files are read."""

    threads: int
    spare_threads: int
    """The most threads that take the place of those whose reads stall."""
    block_bytes: int
    """Bytes that one thread reads in one call."""
    may_hang: bool
    """A read may last for ever: nothing ends it when storage does not answer."""
    copies_at_once: int | None = None
    """The most reads that copy what memory has, and do not wait for storage (`progress.about_to_wait`). More
    than there are processors only get in each other's way. None: as many as there are threads, for reads that
    always wait."""
    thread_name: str = "reader"


class Events(Protocol):
    """A descriptor that becomes readable when something happened."""

    def fileno(self) -> int: ...

    def clear(self) -> None:
        """Until something happens again, it is not readable."""

    def close(self) -> None: ...


class Store(ABC):
    """What a daemon needs of one kind of storage. Made with the daemon's configuration; connects to nothing
    and reads no configuration of its own before the first source is asked for."""

    kind: ClassVar[str]
    """The label of metrics, and what status calls it."""
    schemes: ClassVar[tuple[str, ...]]
    """The schemes of its URIs, without `://`."""
    flags: ClassVar[StoreFlags]
    """Its own, and how locations in it are written."""
    resolver_threads: ClassVar[int]
    source: Source
    """Locations, access, lists, and open files."""
    reading: Reading

    @abstractmethod
    def __init__(self, config: Config) -> None: ...

    @abstractmethod
    def resolvers(self, location: str, uid: int) -> Executor:
        """The threads on which sources at that location are resolved for that user. They wait for those that
        `Source.workers` gives, and so must be others."""

    def place(self, source: str) -> str:
        """Equal for sources that are resolved on the same threads. Raises InvalidRequestError. Does not
        block."""
        return self.kind

    @abstractmethod
    def stop(self) -> None:
        """Ends what is under way with an error, where that can be done. Does not wait."""

    @abstractmethod
    def shutdown(self) -> None:
        """Begins nothing more on the store's threads. Does not wait: a call may hang."""

    def retries(self) -> Mapping[str, int]:
        """How often something was asked again, by reason. From any thread."""
        return {}

    def asked_since(self) -> Collection[tuple[str, float]]:
        """Of each thread that waits for storage which may hang: the mount point, and since when, by the
        monotonic clock. From any thread."""
        return ()

    def gone_events(self) -> Events | None:
        """Happen when files that are open may have gone for good (`SourceFile.unmounted`). None: they never
        do, or nobody can know. The caller closes them."""
        return None
