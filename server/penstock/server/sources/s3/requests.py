"""Requests for objects and lists: signed, sent to the right region, their answers told apart, failures
counted."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from ...errors import ShuttingDownError, SourceUnavailableError
from .account import Account
from .connection import Connections, Exchange
from .faults import EXPIRED, Answer, Transient, delay_seconds, failure
from .location import Location
from .settings import S3Settings

_T = TypeVar("_T")

MAX_RENEWALS = 2
"""Of credentials, for a request: a store may call all of them expired."""


class Requests:
    """Every thread may use it."""

    def __init__(self, account: Account, settings: S3Settings, on_retry: Callable[[str], None]) -> None:
        """`on_retry` is told the reason whenever something is tried again, by one thread at a time."""
        self.account = account
        self.timeout_seconds = settings.timeout_seconds
        self._on_retry = on_retry
        self._settings = settings
        self._connections = Connections(
            timeout_seconds=settings.timeout_seconds, idle=settings.connections, tls=account.tls
        )
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    @contextlib.contextmanager
    def send(
        self,
        location: Location,
        method: str,
        headers: Mapping[str, str],
        *,
        ok: Sequence[int],
        page: str | None = None,
    ) -> Iterator[Exchange]:
        """An answer whose status is one of `ok`. Raises Transient and PenstockError. With `page`, a token or
        an empty text for the first one, the request is for a list of what lies below the location.

        A bucket that turns out to be elsewhere is asked there, once, and what expired with credentials that
        were renewed meanwhile is asked again with these.
        """
        moved, renewals = False, 0
        while True:
            region = self.account.region(location.bucket)
            url = self.account.url(location) if page is None else self.account.list_url(location, page)
            identity = self.account.identity(location)
            signed = self.account.sign(method, url, headers, location)
            with self._connections.exchange(location.uri, method, url, signed) as exchange:
                if exchange.status in ok:
                    yield exchange
                    return
                answer = Answer(exchange.status, exchange.headers, exchange.text())
            if (
                answer.code in EXPIRED
                and renewals < MAX_RENEWALS
                and self.account.renewed(location, identity)
            ):
                renewals += 1
                continue
            if answer.status in (301, 307, 400) and answer.region not in ("", region) and not moved:
                moved = True
                self.account.move(location.bucket, answer.region)
            else:
                raise failure(answer, location, listing=page is not None)

    def patiently(
        self, location: Location, request: Callable[[], _T], *, doing: str = "reading at byte 0"
    ) -> _T:
        """Makes the request until it succeeds or is given up, sleeping between attempts. `doing` is for the
        error then."""
        for failures in itertools.count(1):
            try:
                return request()
            except Transient as fault:
                delay = self.delay(location, doing, failures, fault)
            if self._stopping.wait(delay):
                break
        raise ShuttingDownError("penstockd stops, and this read was cut off; try again in a moment")

    def delay(self, location: Location, doing: str, failures: int, fault: Transient) -> float:
        """Seconds until the next attempt. Raises SourceUnavailableError after as many as are allowed."""
        if self._stopping.is_set():
            raise ShuttingDownError("penstockd stops, and this read was cut off; try again in a moment")
        if failures >= self._settings.retries:
            raise SourceUnavailableError(
                f"{location.uri}: {doing} failed {failures} times in a row, at last: "
                f"{fault.text}; check the endpoint and the network, or raise --s3-retries or --s3-timeout",
                file=location.uri,
            ) from fault
        self.count(fault)
        return delay_seconds(failures, fault.retry_after_seconds)

    def count(self, fault: Transient) -> None:
        with self._lock:
            self._on_retry(fault.reason)

    def stop(self) -> None:
        """Ends what is under way, with an error."""
        self._stopping.set()
        self._connections.close()
