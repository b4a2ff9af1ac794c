"""What the engine needs to know of a kind of object store: plain data, and a protocol."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from ...errors import PenstockError
from .faults import Transient

if TYPE_CHECKING:
    from ...config.settings import Config


class Location(Protocol):
    """Where something lies in a store: an object, or what begins with the same key."""

    @property
    def uri(self) -> str: ...

    @property
    def key(self) -> str:
        """Of a directory it ends in `/`, or is empty."""


L = TypeVar("L", bound=Location)


@dataclass(frozen=True, slots=True)
class ObjectSettings:
    """What the daemon's flags say about all object stores."""

    retries: int
    """Attempts in a row without a byte after which a read fails."""
    timeout_seconds: float
    """To connect, and without a byte."""
    connections: int
    """Most that are kept open while nothing is read."""

    @classmethod
    def of(cls, config: Config) -> ObjectSettings:
        return cls(
            retries=config.object_retries,
            timeout_seconds=config.object_timeout_seconds,
            connections=config.object_concurrency,
        )


@dataclass(frozen=True, slots=True)
class Ask(Generic[L]):
    """One request: for an object, for a range of one, or for a page of a list."""

    method: str
    location: L
    headers: Mapping[str, str]
    page: str | None = None
    """None: not for a list. Else the token of a page, empty for the first one."""
    deep: bool = False
    """Of a list: all that lies below the key, not only what lies directly below it."""

    @property
    def is_list(self) -> bool:
        return self.page is not None


@dataclass(frozen=True, slots=True)
class Signed:
    """A request that can be sent."""

    url: str
    headers: Mapping[str, str]
    identity: tuple[str, ...] = ()
    """Who signed it and for where, to be compared and told to nobody."""
    public_only: bool = False
    """Refused unless the host is on public addresses alone (`addresses.py`): nobody whom the daemon trusts
    chose it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An error answer: headers in lower case, and the beginning of the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class ObjectState:
    """The size of an object, and what tells its versions apart."""

    size_bytes: int
    identity: Mapping[str, str]
    """Headers of answers, by name, that are the same for the same version."""
    conditions: Mapping[str, str]
    """Headers of requests that make them fail for any other version."""
    listed: str = ""
    """What lists say of this version (`Entry.version`); empty where they say nothing."""
    sha256: str = ""
    """Of the whole content, in hexadecimal digits, where the store says it."""
    crc32c: int | None = None
    """Of the whole object, where the store says it."""

    @property
    def version(self) -> str:
        return f"{':'.join(self.identity.values())}:{self.size_bytes}"

    def same(self, headers: Mapping[str, str]) -> bool:
        """What an answer says of its version does not contradict this one."""
        return all(headers.get(name, value) == value for name, value in self.identity.items())


@dataclass(frozen=True, slots=True)
class Entry:
    """An object in a list."""

    key: str
    """The whole one, as the store says it."""
    size_bytes: int | None = None
    """None where the list does not say."""
    version: str = ""
    """Differs after any change of the bytes. Equal to `ObjectState.listed`, and empty only where that is."""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list."""

    entries: list[Entry]
    next: str
    """What asks for the page after it; empty after the last."""


class ObjectService(Protocol[L]):
    """One account of one kind of store. Every thread may use it; methods block, as credentials may come from
    a network."""

    @property
    def tls(self) -> ssl.SSLContext:
        """How certificates are verified."""

    def sign(self, ask: Ask[L]) -> Signed:
        """Raises PenstockError where there are no credentials, or no address."""

    def changed(self, ask: Ask[L], answer: Answer, tried: Sequence[Signed]) -> bool:
        """An error answer taught something, or credentials were renewed: signed anew, the same request may
        succeed at once. `tried` are all that were sent, the last one included: the store must not be able to
        have it sent for ever."""

    def failure(self, ask: Ask[L], answer: Answer) -> PenstockError | Transient:
        """What an error answer means."""

    def state(self, location: L, headers: Mapping[str, str], size_bytes: int) -> ObjectState:
        """What the answer to a GET or HEAD says. Raises SourceUnavailableError where a change could not be
        noticed."""

    def page(self, ask: Ask[L], headers: Mapping[str, str], body: bytes) -> Page:
        """What the answer to a request for a list says. Raises Transient and PenstockError."""
