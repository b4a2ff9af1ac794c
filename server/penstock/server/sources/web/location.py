"""`https://host/path` and who may read it. Pure.

A location is a URL in canonical form: characters are escaped where they must be, and nowhere else. The file's
name is the unescaped path.
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
    """A file on a web server, and the caller for whom it is read."""

    place: WebPath
    reach: Reach = _DAEMON
    """Where redirects may lead. Until `admitted`, to public hosts only."""

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
    """The location, for a caller who may load it. Raises AccessDeniedError."""
    reach = Reach.of(access)
    reach.check(location.place)
    return replace(location, reach=reach)
