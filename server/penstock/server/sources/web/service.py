"""Where requests for files on web servers go, and how a version of a file is identified.

The request that meets a redirect follows it, and its target is remembered: the next requests go there at
once. If the target refuses, the URL itself is asked again, since the target may be signed for a while only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...errors import PenstockError
from ...system.version import distribution_version
from ..objects import reach
from ..objects.faults import Transient
from ..objects.meaning import settled
from ..objects.redirects import Redirects
from ..objects.service import Answer, Ask, ObjectState, Page, Signed
from ..objects.trust import tls_context
from .answers import failure, no_version
from .location import Location
from .logins import Logins

_GONE = (401, 403, 404, 410)
"""Statuses with which the target of a redirect refuses when its time is over."""


class WebService:
    """Thread-safe."""

    def __init__(self) -> None:
        """Raises SourceUnavailableError."""
        self.tls = tls_context("https://")
        self._logins = Logins()
        self._agent = f"penstock/{distribution_version()}"
        self._redirects = Redirects()

    def sign(self, ask: Ask[Location]) -> Signed:
        """A request to the URL, or to its remembered target. Only the host that the caller named gets a
        login."""
        location = ask.location
        url = self._redirects.get(_asked(location)) or location.uri
        way = location.reach.way(url, location.uri)
        headers = {**ask.headers, "Accept-Encoding": "identity", "User-Agent": self._agent}
        if way.with_credentials and reach.origin(url) == location.place.origin:
            headers.update(self._logins.header(location.place.hostname))
        return Signed(url, headers, (url,), way.public_only)

    def changed(self, ask: Ask[Location], answer: Answer, tried: Sequence[Signed]) -> bool:
        """Whether to ask again: at the target of a redirect, or once at the URL itself, without its
        remembered target."""
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
            # That of nginx is made of size and Last-Modified.
            return ObjectState(size_bytes, {"etag": etag}, {"If-Match": etag}, settled=settled(headers))
        if not modified:
            raise no_version(location.uri)
        return ObjectState(
            size_bytes,
            {"last-modified": modified, "etag": etag},
            {"If-Unmodified-Since": modified},
            settled=settled(headers),
        )

    def page(self, ask: Ask[Location], headers: Mapping[str, str], body: bytes) -> Page:
        """An empty page: web servers have no lists."""
        return Page([], "")


def _asked(location: Location) -> str:
    """A URL, and whether it is asked with a login: answers to a login are not shown to others."""
    with_login = location.reach.way(location.uri, location.uri).with_credentials
    return f"{'login ' if with_login else ''}{location.uri}"
