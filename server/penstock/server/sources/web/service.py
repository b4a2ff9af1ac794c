"""Where requests for files on web servers go, and what names a version of one.

A redirect is followed by the request that met it, and remembered: the next ones go straight to where it led.
When that place refuses, the URL itself is asked again, since what it leads to may be signed for a while.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...errors import PenstockError
from ...system.version import distribution_version
from ..objects import reach
from ..objects.faults import Transient
from ..objects.redirects import Redirects
from ..objects.service import Answer, Ask, ObjectState, Page, Signed
from ..objects.trust import tls_context
from .answers import failure, no_version
from .location import Location
from .logins import Logins

_GONE = (401, 403, 404, 410)
"""What a place says that a redirect led to, when its time is over."""


_Asked = tuple[str, bool]
"""A URL, and whether it is asked with a login: what answered that may not be told to others."""


class WebService:
    """Every thread may use it."""

    def __init__(self) -> None:
        """Raises SourceUnavailableError."""
        self.tls = tls_context("https://")
        self._logins = Logins()
        self._agent = f"penstock/{distribution_version()}"
        self._redirects: Redirects[_Asked] = Redirects()

    def sign(self, ask: Ask[Location]) -> Signed:
        """To the URL, or to where it led lately. Nobody gets a login but the host that the caller named."""
        location = ask.location
        url = self._redirects.get(_asked(location)) or location.uri
        way = location.reach.way(url, location.uri)
        headers = {**ask.headers, "Accept-Encoding": "identity", "User-Agent": self._agent}
        if way.with_credentials and reach.origin(url) == location.place.origin:
            headers.update(self._logins.header(location.place.hostname))
        return Signed(url, headers, (url,), way.public_only)

    def changed(self, ask: Ask[Location], answer: Answer, tried: Sequence[Signed]) -> bool:
        """A redirect is followed, and what was remembered of one forgotten, once."""
        asked, last = _asked(ask.location), tried[-1].url
        if answer.status in reach.REDIRECTS:
            target = reach.redirected(last, answer.headers.get("location", ""))
            if target is None or len(tried) > reach.MAX_REDIRECTS:
                self._redirects.forget(asked)
                return False
            self._redirects.lead(asked, target)
            return True
        if answer.status in _GONE and last != ask.location.uri:
            self._redirects.forget(asked)
            return len(tried) == 1
        return False

    def failure(self, ask: Ask[Location], answer: Answer) -> PenstockError | Transient:
        return failure(answer, ask.location.uri)

    def state(self, location: Location, headers: Mapping[str, str], size_bytes: int) -> ObjectState:
        etag, modified = headers.get("etag", ""), headers.get("last-modified", "")
        if etag and not etag.startswith("W/"):  # a weak one never matches (RFC 9110)
            return ObjectState(size_bytes, {"etag": etag}, {"If-Match": etag})
        if not modified:
            raise no_version(location.uri)
        return ObjectState(
            size_bytes, {"last-modified": modified, "etag": etag}, {"If-Unmodified-Since": modified}
        )

    def page(self, ask: Ask[Location], headers: Mapping[str, str], body: bytes) -> Page:
        """Nothing lies in what has no lists."""
        return Page([], "")


def _asked(location: Location) -> _Asked:
    return location.uri, location.reach.way(location.uri, location.uri).with_credentials
