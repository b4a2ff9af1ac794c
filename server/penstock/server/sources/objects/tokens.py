"""Bearer tokens. They are renewed before they end, so loads may take longer than a token lives.

If a token ends soon, one thread renews it, while the others go on with it. They wait only if it has ended. If
a renewal fails while the token is good, it is tried again after some seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import PenstockError
from .faults import Transient

logger = logging.getLogger(__name__)

RENEW_BEFORE_SECONDS = 240.0
"""Metadata servers return a new token only in the last five minutes of the old one."""
LEAST_SECONDS = 10.0
"""Least time between two renewals: a store may refuse every token as expired."""
_MARGIN_SECONDS = 10.0
"""A token that ends this soon may have ended when it arrives at the store."""


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    expires_at: float
    """Seconds since the epoch; infinite if the token does not end."""

    def __repr__(self) -> str:
        return "<Token>"


class Tokens:
    """The newest token. Thread-safe."""

    def __init__(self, fetch: Callable[[], Token]) -> None:
        """`fetch` requests a new token and blocks. It raises PenstockError and Transient."""
        self._fetch = fetch
        self._lock = threading.Lock()
        self._token: Token | None = None
        self._asked_at = 0.0
        """When the last renewal began, by the monotonic clock."""

    def get(self) -> str:
        """A token that is good. Raises PenstockError and Transient."""
        token = self._token
        if token is not None and _left(token) > _MARGIN_SECONDS:
            if _left(token) < RENEW_BEFORE_SECONDS:
                self._renew_early()
            return (self._token or token).text
        with self._lock:
            if self._token is None or _left(self._token) <= _MARGIN_SECONDS:
                self._renew()
            return self._token.text if self._token else ""

    def renewed(self, refused: str) -> bool:
        """Whether there is another token than the one that a store refused as expired. Requests one if it
        may."""
        with self._lock:
            if self._token is not None and self._token.text == refused and self._may_ask():
                self._renew()
            return self._token is not None and self._token.text != refused

    def _renew_early(self) -> None:
        if not self._lock.acquire(blocking=False):
            return  # another thread renews it
        try:
            if self._token is not None and _left(self._token) < RENEW_BEFORE_SECONDS and self._may_ask():
                self._renew()
        except (PenstockError, Transient) as error:
            logger.warning("a token ends soon and could not be renewed yet: %s", error)
        finally:
            self._lock.release()

    def _renew(self) -> None:
        self._asked_at = time.monotonic()
        self._token = self._fetch()

    def _may_ask(self) -> bool:
        return time.monotonic() - self._asked_at >= LEAST_SECONDS


def _left(token: Token) -> float:
    return token.expires_at - time.time()
