"""URLs of plain web servers: how they are written, and which of them a caller may be redirected to. Pure.

A caller names a URL, or a store answers with one (a redirect). The daemon makes the request, and it may be
inside a network where the caller is not. So for a caller who is not privileged it requests

    URLs below an `--allow` prefix    wherever their host is, with the daemon's credentials for it
    all other URLs                    by https:// alone, without credentials, and only if all addresses of the
                                      host are public (`addresses.py`)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, urljoin, urlsplit

from ...errors import AccessDeniedError
from ...system.shown import without_secrets
from .. import Access

SCHEMES = ("https://", "http://")
MAX_URL_CHARACTERS = 8192
MAX_REDIRECTS = 5
"""Most redirects in a row, for one request."""
REDIRECTS = (301, 302, 303, 307, 308)
_URL = re.compile(r"(?P<scheme>https?)://(?P<host>[^/?#]*)(?P<path>/[^?#]*)?(?P<rest>[?#].*)?", re.DOTALL)
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+)(?::(\d{1,5}))?", re.ASCII)
_ESCAPE = re.compile(r"%([0-9a-fA-F]{2})")
_STRAY = re.compile(r"%(?![0-9a-fA-F]{2})")
_LITERAL = "/%!$&'()*+,;=:@-._~[]"
_PORTS = {"https": 443, "http": 80}


@dataclass(frozen=True, slots=True)
class WebPath:
    """A scheme, a host, with its port if that is not the usual one, and an escaped path."""

    scheme: str
    host: str
    path: str

    @classmethod
    def parse(cls, url: str) -> WebPath:
        """Returns the canonical form. Raises ValueError, whose text has the reason and the remedy."""
        match = _URL.fullmatch(url)
        if match is None or len(url) > MAX_URL_CHARACTERS:
            raise ValueError("is no URL of the form https://host/path; write it so")
        if match["rest"]:
            raise ValueError(
                "has a query or a fragment, which may hold a secret and would be shown in logs; name the "
                "file by its plain URL, and put credentials into penstockd's netrc file"
            )
        if "@" in match["host"]:
            raise ValueError(
                "holds a user or a password, which would be shown in logs; put them into penstockd's netrc "
                "file"
            )
        host = _HOST.fullmatch(match["host"])
        if host is None:
            raise ValueError("names no host; write it as https://host/path, a name of other letters as xn--…")
        scheme, port = match["scheme"], int(host[2] or 0)
        if port > 65535:
            raise ValueError("names a port above 65535; correct it")
        name = host[1].lower()
        return cls(
            scheme, name if port in (0, _PORTS[scheme]) else f"{name}:{port}", _escaped(match["path"] or "/")
        )

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.host}"

    @property
    def hostname(self) -> str:
        """The host without a port, and without the brackets of an address."""
        match = _HOST.fullmatch(self.host)
        return match[1].strip("[]") if match else self.host

    @property
    def url(self) -> str:
        return f"{self.origin}{self.path}"

    @property
    def name(self) -> str:
        return unquote(self.path.rpartition("/")[2])

    def holds(self, other: WebPath) -> bool:
        """Whether the other is the same, or lies below it."""
        top = self.path.rstrip("/")
        return self.origin == other.origin and (
            not top or other.path == top or other.path.startswith(top + "/")
        )

    @property
    def climbs(self) -> bool:
        """Whether it has a segment that servers may treat as the directory above, or an escaped slash."""
        segments = re.split(r"[/\\]", unquote(self.path))
        return bool({".", ".."} & set(segments)) or len(segments) != self.path.count("/") + 1


def _escaped(path: str) -> str:
    """Escapes every character that a URL cannot have, and no character that has the same meaning
    unescaped."""
    path = _STRAY.sub("%25", path)
    path = _ESCAPE.sub(lambda match: _unreserved(match[1]), path)
    return quote(path, safe=_LITERAL)


def _unreserved(digits: str) -> str:
    character = chr(int(digits, 16))
    if character.isascii() and (character.isalnum() or character in "-._~"):
        return character
    return f"%{digits.upper()}"


def escaped_name(name: str) -> str:
    """A file's name, or relative path, as a part of a URL."""
    return quote(name, safe="/" + "!$&'()*+,;=:@-._~")


def prefix(text: str) -> str:
    """The canonical form of a prefix of `--allow`. Raises ValueError."""
    if text == "https://":
        return text
    if text == "http://":
        raise ValueError(f"{text!r} names no host, and plain http is for hosts that are named; add one")
    try:
        return WebPath.parse(text).url
    except ValueError as error:
        raise ValueError(f"{without_secrets(text)!r} {error}") from None


@dataclass(frozen=True, slots=True)
class Way:
    """How a URL may be requested."""

    public_only: bool
    """Only if all addresses of its host are public."""
    with_credentials: bool
    """The daemon's credentials for that host may be sent."""


_TRUSTED = Way(public_only=False, with_credentials=True)
_STRANGE = Way(public_only=True, with_credentials=False)


@dataclass(frozen=True, slots=True)
class Reach:
    """Which URLs the daemon may request for a caller."""

    uid: int
    privileged: bool
    everywhere: bool
    """One of the prefixes names every host: `https://`."""
    prefixes: tuple[WebPath, ...]

    @classmethod
    def of(cls, access: Access) -> Reach:
        prefixes = [one for one in access.prefixes if one.startswith(SCHEMES)]
        named = tuple(WebPath.parse(one) for one in prefixes if one != "https://")
        return cls(access.uid, access.privileged, "https://" in prefixes, named)

    def check(self, asked: WebPath) -> None:
        """Raises AccessDeniedError unless the caller may load this URL, which it named."""
        if self.privileged:
            return
        if asked.climbs:
            raise AccessDeniedError(
                f"uid {self.uid} may not load {asked.url}: its path has a '.' or '..' between slashes, or an "
                "escaped slash; rename the file",
                file=asked.url,
            )
        if not self._holds(asked) and not (self.everywhere and asked.scheme == "https"):
            raise AccessDeniedError(
                f"uid {self.uid} may not load {asked.url}: penstockd has no --allow prefix that holds it; "
                "start it with one",
                file=asked.url,
            )

    def way(self, url: str, what: str) -> Way:
        """The way to a URL: the one that the caller named as `what`, or the target of a redirect from it.
        Raises AccessDeniedError if it may not be requested for the caller."""
        parts = urlsplit(url)
        there = WebPath.parse(f"{parts.scheme}://{parts.netloc}{parts.path}")
        if self.privileged or self._holds(there):
            return _TRUSTED
        if there.scheme != "https":
            raise AccessDeniedError(
                f"{what}: the server leads to {there.host} by plain http; have it use https, or start "
                "penstockd with an --allow prefix that names that host",
                file=what,
            )
        return _STRANGE

    def _holds(self, there: WebPath) -> bool:
        return not there.climbs and any(one.holds(there) for one in self.prefixes)


def redirected(url: str, location: str) -> str | None:
    """The target of a Location header, without a fragment; None if it cannot be followed."""
    readable = location.isascii() and location.isprintable() and " " not in location
    if not location or not readable or len(location) > MAX_URL_CHARACTERS:
        return None
    try:
        parts = urlsplit(urljoin(url, location))
        plain = f"{parts.scheme}://{parts.netloc}{parts.path}"
        WebPath.parse(plain)
    except ValueError:
        return None
    return f"{plain}?{parts.query}" if parts.query else plain


def origin(url: str) -> str:
    """Scheme, host and port of a URL, for comparison."""
    parts = urlsplit(url)
    return WebPath.parse(f"{parts.scheme}://{parts.netloc}/").origin
