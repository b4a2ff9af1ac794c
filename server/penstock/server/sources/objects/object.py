"""One version of one object.

Every request for its bytes names the version (`If-Match`), and every answer is compared with the version. So
two versions are never mixed, whether or not the store honours the condition.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Generic

from ...errors import CheckpointChangedError, SourceUnavailableError
from .. import TELL_BYTES, RetryLater, Tell, without
from .exchange import Exchange
from .faults import Transient
from .requests import Requests
from .service import Ask, L, ObjectState

MAX_OBJECT_BYTES = (1 << 63) - 1
"""The most that a file can have on any system, and that the wire can say."""

FIRST_BYTES = 256 << 10
"""Bytes that the first request for an object asks for. The headers of all but a few files are shorter."""

SLOWEST_BYTES = 64 << 10
"""Bytes that must come within `--object-timeout`. A store that sends less, byte by byte, would hang the
load."""

MAX_VERSION_CHARACTERS = 1024
"""Of what a store calls a version: a load keeps it for each of its files, several times."""

_SKIP_BYTES = 64 << 10

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


def ask_first(requests: Requests[L], location: L) -> tuple[ObjectState, bytes]:
    """Requests the state of an object together with its first bytes, of which only some may come. Raises
    Transient and PenstockError."""
    asked = {"Range": f"bytes=0-{FIRST_BYTES - 1}"}
    with requests.send(Ask("GET", location, asked), ok=(200, 206, 416)) as exchange:
        if exchange.status != 416:
            start, count, size_bytes = _content_range(exchange, requests, location)
            if exchange.status == 200:
                count = min(count, FIRST_BYTES)
            if start != 0 or count != min(size_bytes, FIRST_BYTES):
                raise Transient("bad_response", "the answer holds other bytes than were asked for")
            state = _state(requests, location, exchange, size_bytes)
            first, position = bytearray(count), _Position()
            try:
                _receive(exchange, [memoryview(first)], position, count, requests.timeout_seconds)
                exchange.finish()
            except Transient as fault:
                if not position.reached:
                    raise
                requests.count(fault)
            return state, bytes(first[: position.reached])
    return ask_state(requests, location, {}), b""  # an empty object has no range


def ask_state(requests: Requests[L], location: L, headers: Mapping[str, str]) -> ObjectState:
    """Requests the state of an object: a HEAD request with these headers. Raises Transient and
    PenstockError."""
    with requests.send(Ask("HEAD", location, headers), ok=(200,)) as exchange:
        exchange.finish()
        length = exchange.headers.get("content-length", "")
        if not length.isdecimal() or len(length) > 19:
            raise Transient("bad_response", "the answer does not say how long the object is")
        return _state(requests, location, exchange, int(length))


def _state(requests: Requests[L], location: L, exchange: Exchange, size_bytes: int) -> ObjectState:
    """What the answer says of the object. Raises SourceUnavailableError."""
    state = requests.service.state(location, exchange.headers, size_bytes)
    if size_bytes > MAX_OBJECT_BYTES:
        raise SourceUnavailableError(
            f"{location.uri}: the store says that it has {size_bytes} bytes, more than any object can have; "
            "check the endpoint",
            file=location.uri,
        )
    if len(state.version) > MAX_VERSION_CHARACTERS:
        raise SourceUnavailableError(
            f"{location.uri}: the store names its version by {len(state.version)} characters (ETag, "
            f"Last-Modified), more than {MAX_VERSION_CHARACTERS}; have it send a shorter ETag",
            file=location.uri,
        )
    return state


def listed_version(listed: str, size_bytes: int) -> str:
    """The version in a tree of an object that has the version `listed` in the store's lists."""
    return f"{listed}:{size_bytes}" if listed else ""


class ObjectFile(Generic[L]):
    """An object that is read by ranges. It holds no connection between reads."""

    alignment = 1
    mount = mount_point = ""

    def __init__(
        self, kind: str, requests: Requests[L], location: L, state: ObjectState, first: bytes
    ) -> None:
        """`kind` is the store's. `first` has the first bytes, or none. They are kept until they are read."""
        self.kind = kind
        self.uri = location.uri
        self.give_up_at = math.inf
        self.size_bytes = state.size_bytes
        self.checksums = state.checksums
        self.settled = state.settled
        self.version = f"{kind}:{self.uri}:{state.version}"
        self.portable_version = self.version
        self.writes_before = 0
        self.listed_version = listed_version(state.listed, state.size_bytes)
        self._requests = requests
        self._location = location
        self._state = state
        self._first = first
        self._failures: dict[int, int] = {}
        """Key: the end of a range. Value: how often it failed in a row without a byte, or too slowly."""

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        self.read_and_tell(offset, views, None)

    def read_and_tell(self, offset: int, views: Sequence[memoryview], tell: Tell | None) -> None:
        end = min(offset + sum(map(len, views)), self.size_bytes)
        if offset == 0:
            offset = self._copy_first(views)
            views = without(views, offset)
        if offset >= end:
            return
        position = _Position(offset)
        try:
            self._read(offset, end, views, position, tell)
        except Transient as fault:
            moved = position.reached - offset >= (SLOWEST_BYTES if fault.reason == "timeout" else 1)
            failures = 0 if moved else self._failures.get(end, 0) + 1
            self._failures[end] = failures
            doing = f"reading at byte {position.reached}"
            delay = self._requests.delay(self._location, doing, failures, fault)
            raise RetryLater(position.reached, delay) from fault
        self._failures.pop(end, None)

    def check_unchanged(self) -> None:
        """Does nothing: every answer was compared with the version."""

    def unmounted(self) -> bool:
        return False

    def drop_first_bytes(self) -> None:
        self._first = b""

    def close(self) -> None:
        self.drop_first_bytes()

    def _copy_first(self, views: Sequence[memoryview]) -> int:
        first, self._first = self._first, b""
        copied = 0
        for view in views:
            part = first[copied : copied + len(view)]
            view[: len(part)] = part
            copied += len(part)
        return copied

    def _read(
        self,
        offset: int,
        end: int,
        views: Sequence[memoryview],
        position: _Position,
        tell: Tell | None,
    ) -> None:
        asked = {"Range": f"bytes={offset}-{end - 1}", **self._state.conditions}
        with self._requests.send(Ask("GET", self._location, asked), ok=(200, 206)) as exchange:
            start, count, size_bytes = _content_range(exchange, self._requests, self._location)
            if not self._state.same(exchange.headers) or size_bytes != self.size_bytes:
                raise CheckpointChangedError(
                    f"{self.uri} was changed while it was read; load it again", file=self.uri
                )
            if exchange.status == 200:
                _skip(exchange, offset, self._requests.timeout_seconds)
            elif (start, count) != (offset, end - offset):
                raise Transient("bad_response", "the answer holds other bytes than were asked for")
            _receive(exchange, views, position, end, self._requests.timeout_seconds, tell)
            exchange.finish()


class _Position:
    """How far a read got, also if it raised."""

    __slots__ = ("reached",)

    def __init__(self, reached: int = 0) -> None:
        self.reached = reached


def _content_range(exchange: Exchange, requests: Requests[L], location: L) -> tuple[int, int, int]:
    """The range in an answer: its first byte, its length, and the size of the object. It is the whole object
    if the store may answer with that."""
    if exchange.status != 206:
        fault = requests.whole(location, exchange.length)
        if fault is not None:
            raise fault
        if exchange.length is None:
            raise Transient("bad_response", "the answer does not say how long the object is")
        return 0, exchange.length, exchange.length
    match = _CONTENT_RANGE.fullmatch(exchange.headers.get("content-range", "").strip())
    if match is None:
        raise Transient("bad_response", "the answer does not say which bytes it holds")
    start, last, size = (int(number) for number in match.groups())
    count = last - start + 1
    if exchange.length not in (None, count):
        raise Transient("bad_response", "the answer is not as long as the range that it says it holds")
    return start, count, size


def _skip(exchange: Exchange, count: int, timeout_seconds: float) -> None:
    """Skips the beginning of an answer that holds more than was asked for."""
    passed = memoryview(bytearray(min(count, _SKIP_BYTES)))
    _receive(exchange, [passed] * -(-count // _SKIP_BYTES), _Position(), count, timeout_seconds)


def _receive(
    exchange: Exchange,
    views: Sequence[memoryview],
    position: _Position,
    end: int,
    timeout_seconds: float,
    tell: Tell | None = None,
) -> None:
    """Reads the body into the views up to `end`. A body that ends there has to be finished afterwards."""
    since, at = time.monotonic(), position.reached
    told = position.reached
    for view in views:
        view = view[: end - position.reached]
        while view:
            part = view if tell is None else view[: told + TELL_BYTES - position.reached]
            count = exchange.read_into(part)
            if not count:
                raise Transient("short_body", "the answer ended early")
            view = view[count:]
            position.reached += count
            if tell is not None and position.reached == told + TELL_BYTES:
                told = position.reached
                tell(told)
            if position.reached - at >= SLOWEST_BYTES:
                since, at = time.monotonic(), position.reached
            elif time.monotonic() - since > timeout_seconds:
                raise Transient("timeout", "the answer comes too slowly for --object-timeout")
