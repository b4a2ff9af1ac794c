"""Requests for objects and lists. They are signed, and repeated until they are answered or fail for good."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from ...errors import PenstockError, ShuttingDownError
from ..replies import StoreUnreachableError
from .connection import Connections
from .exchange import Exchange
from .faults import Transient, delay_seconds
from .service import Answer, Ask, L, ObjectService, ObjectSettings, Signed

_T = TypeVar("_T")


def no_range(location: object, size_bytes: int | None) -> Transient:
    """The failure, for most stores, if an answer holds all of an object instead of a range."""
    return Transient("bad_response", "HTTP 200 and not the range that was asked for")


class Requests(Generic[L]):
    """Thread-safe."""

    def __init__(
        self,
        service: ObjectService[L],
        settings: ObjectSettings,
        on_retry: Callable[[str], None],
        whole: Callable[[L, int | None], PenstockError | Transient | None] | None = None,
    ) -> None:
        """`on_retry` is called with the reason of each repeated request, by one thread at a time. `whole` is
        `ObjectSource.whole`; without it every answer must be the requested range."""
        self.service = service
        self.whole = whole or no_range
        self.timeout_seconds = settings.timeout_seconds
        self.parsing = threading.Lock()
        """Held while a page of a list is parsed. It takes many times the memory of the page, and Python would
        not parse two pages faster at once."""
        self._on_retry = on_retry
        self._settings = settings
        self._connections = Connections(
            timeout_seconds=settings.timeout_seconds, idle=settings.connections, tls=service.tls
        )
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    @contextlib.contextmanager
    def send(self, ask: Ask[L], *, ok: Sequence[int]) -> Iterator[Exchange]:
        """Gives an answer whose status is one of `ok`. Raises Transient and PenstockError."""
        tried: list[Signed] = []
        while True:
            signed = self.service.sign(ask)
            tried.append(signed)
            uri = ask.location.uri
            with self._connections.exchange(
                uri, ask.method, signed.url, signed.headers, public_only=signed.public_only
            ) as exchange:
                if exchange.status in ok:
                    yield exchange
                    return
                answer = Answer(exchange.status, exchange.headers, exchange.text())
            if not self.service.changed(ask, answer, tried):
                raise self.service.failure(ask, answer)

    def patiently(self, location: L, request: Callable[[], _T], *, doing: str = "reading at byte 0") -> _T:
        """Repeats the request until it succeeds or is given up, and sleeps between attempts. `doing`
        describes it in the error."""
        for failures in itertools.count(1):
            try:
                return request()
            except Transient as fault:
                delay = self.delay(location, doing, failures, fault)
            if self._stopping.wait(delay):
                break
        raise ShuttingDownError("penstockd stops, and this read was cut off; try again in a moment")

    def delay(self, location: L, doing: str, failures: int, fault: Transient) -> float:
        """Seconds until the next attempt. Raises StoreUnreachableError if no more attempts are allowed."""
        if self._stopping.is_set():
            raise ShuttingDownError("penstockd stops, and this read was cut off; try again in a moment")
        if failures >= self._settings.retries:
            raise StoreUnreachableError(
                f"{location.uri}: {doing} failed {failures} times in a row, at last: "
                f"{fault.text}; check the endpoint and the network, or raise --object-retries or "
                "--object-timeout",
                file=location.uri,
            ) from fault
        self.count(fault)
        return delay_seconds(failures, fault.retry_after_seconds)

    def count(self, fault: Transient) -> None:
        with self._lock:
            self._on_retry(fault.reason)

    def stop(self) -> None:
        """Ends requests under way, with an error."""
        self._stopping.set()
        self._connections.close()
