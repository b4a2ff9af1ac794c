"""The engine's interface to a kind of object store: plain data, and a protocol."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from ...errors import PenstockError
from ..checksums import Checksum
from ..verification import OFF
from .faults import Transient

if TYPE_CHECKING:
    from ...config.settings import Config


class Location(Protocol):
    """A place in a store: an object, or all objects whose keys begin with a prefix."""

    @property
    def uri(self) -> str: ...

    @property
    def key(self) -> str:
        """The key. For a directory it ends in `/`, or is empty."""


L = TypeVar("L", bound=Location)


@dataclass(frozen=True, slots=True)
class ObjectSettings:
    """The daemon's flags for all object stores."""

    retries: int
    """A read fails after so many attempts in a row without a byte."""
    timeout_seconds: float
    """The limit for connecting, and for a time without a byte."""
    connections: int
    """Most connections that are kept open while nothing is read."""
    checksums: bool = True
    """Whether to request checksums of whole objects."""

    @classmethod
    def of(cls, config: Config) -> ObjectSettings:
        return cls(
            retries=config.object_retries,
            timeout_seconds=config.object_timeout_seconds,
            connections=config.object_concurrency,
            checksums=config.verify != OFF,
        )


@dataclass(frozen=True, slots=True)
class Ask(Generic[L]):
    """A request for an object, for a range of one, or for a page of a list."""

    method: str
    location: L
    headers: Mapping[str, str]
    page: str | None = None
    """The token of a page, empty for the first. None: the request is not for a list."""
    deep: bool = False
    """For a list: all objects below the key, and not only those directly below it."""

    @property
    def is_list(self) -> bool:
        return self.page is not None


@dataclass(frozen=True, slots=True)
class Signed:
    """A request that can be sent."""

    url: str
    headers: Mapping[str, str]
    identity: tuple[str, ...] = ()
    """The identity that signed it, and its region or the like. For comparison only; it is never shown."""
    public_only: bool = False
    """Refused unless all addresses of the host are public (`addresses.py`). For a host that was chosen by
    somebody whom the daemon does not trust."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An error answer, with its headers' names in lower case, and the beginning of its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class ObjectState:
    """The size and the version of an object."""

    size_bytes: int
    identity: Mapping[str, str]
    """Headers of answers that are the same for the same version, by name."""
    conditions: Mapping[str, str]
    """Headers that make a request fail for any other version."""
    listed: str = ""
    """The version in lists (`Entry.version`); empty if lists have none."""
    checksums: tuple[Checksum, ...] = ()
    """The store's checksums of the whole content, the cheapest to check first."""
    settled: bool = True
    """Another write would certainly give it another version."""

    @property
    def version(self) -> str:
        return f"{':'.join(self.identity.values())}:{self.size_bytes}"

    def same(self, headers: Mapping[str, str]) -> bool:
        """Whether the headers of an answer do not contradict this version."""
        return all(headers.get(name, value) == value for name, value in self.identity.items())


@dataclass(frozen=True, slots=True)
class Entry:
    """An object in a list."""

    key: str
    """The whole key, as the store writes it."""
    size_bytes: int | None = None
    """None if the list does not have it."""
    version: str = ""
    """Differs after any change of the bytes. It equals `ObjectState.listed`, and is empty only if that is."""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list."""

    entries: list[Entry]
    next: str
    """The token of the next page; empty after the last."""


class ObjectService(Protocol[L]):
    """One account of one kind of store. Thread-safe. Methods block, as credentials may come from a
    network."""

    @property
    def tls(self) -> ssl.SSLContext:
        """The rules by which certificates are verified."""

    def sign(self, ask: Ask[L]) -> Signed:
        """Signs a request. Raises PenstockError if there are no credentials, or no address."""

    def changed(self, ask: Ask[L], answer: Answer, tried: Sequence[Signed]) -> bool:
        """Whether the same request, signed anew, may succeed at once: because of something in the error
        answer, or because credentials were renewed. `tried` has all requests that were sent, the last one
        included. It serves as a limit: a store must not be able to have a request sent for ever."""

    def failure(self, ask: Ask[L], answer: Answer) -> PenstockError | Transient:
        """The meaning of an error answer."""

    def state(self, location: L, headers: Mapping[str, str], size_bytes: int) -> ObjectState:
        """The state of an object by the answer to a GET or HEAD. Raises SourceUnavailableError if a change of
        the object could not be noticed."""

    def page(self, ask: Ask[L], headers: Mapping[str, str], body: bytes) -> Page:
        """The page in the answer to a request for a list. Raises Transient and PenstockError."""
