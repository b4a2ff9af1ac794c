"""`https://host/path` and who may read it. Pure.

A location is a URL in one way of writing it: escaped where it has to be, and nowhere else. The file's name is
what that means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...errors import InvalidRequestError
from ...system.shown import without_secrets
from .. import Access
from ..objects.reach import Reach, WebPath

_DAEMON = Reach(uid=-1, privileged=False, everywhere=False, prefixes=())


@dataclass(frozen=True, slots=True)
class Location:
    """A file on a web server, and for whom it is asked."""

    place: WebPath
    reach: Reach = _DAEMON
    """Where redirects may lead. Nowhere but to public hosts before `admitted`."""

    @property
    def uri(self) -> str:
        return self.place.url

    @property
    def root(self) -> str:
        return f"{self.place.origin}/"

    @property
    def key(self) -> str:
        return self.place.path[1:]


def parse(url: str) -> Location:
    """Raises InvalidRequestError."""
    if "\0" in url:
        raise InvalidRequestError(f"sources: {url[:200]!r} holds a NUL character; remove it")
    try:
        return Location(WebPath.parse(url))
    except ValueError as error:
        raise InvalidRequestError(f"sources: {without_secrets(url)[:200]!r} {error}") from None


def admitted(location: Location, access: Access) -> Location:
    """The same for a caller who may load it. Raises AccessDeniedError."""
    reach = Reach.of(access)
    reach.check(location.place)
    return replace(location, reach=reach)
