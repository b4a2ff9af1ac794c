"""`hf://org/repo@revision/path` and who may read it. Pure.

A path is text, as in Git: nothing in it is decoded. A revision is a branch, a tag or a commit. One with a
slash is escaped (`@refs%2Fpr%2F1`), except for the two kinds that the Hub makes itself (`@refs/pr/1`,
`@refs/convert/parquet`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from ...errors import AccessDeniedError, InvalidRequestError
from .. import Access
from ..objects.reach import Reach

SCHEME = "hf://"
MAX_PATH_BYTES = 4096
_OTHER_KINDS = ("datasets", "spaces", "buckets")
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_REVISION = re.compile(r"(refs/(?:pr/\d{1,9}|convert/[A-Za-z0-9_.-]{1,100})|[^/]{1,600})(?:/|\Z)", re.DOTALL)
_PLAIN_REVISION = re.compile(r"[A-Za-z0-9._/+-]{1,200}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_MADE_BY_HUB = re.compile(r"refs/(pr/\d{1,9}|convert/[A-Za-z0-9_.-]{1,100})", re.ASCII)
DEFAULT_REVISION = "main"

_NOWHERE = Reach(uid=-1, privileged=False, everywhere=False, prefixes=())


@dataclass(frozen=True, slots=True)
class Location:
    """A repository, a file in one, or a directory in one, at a revision."""

    repository: str
    """`org/repo`."""
    revision: str | None
    """The revision; None if the URI names none."""
    key: str
    """The path. For a directory it may end in `/`, or be empty."""
    commit: str = ""
    """The commit of the revision, for this load; empty until it is known."""
    url: str = ""
    """Another repository name that the Hub redirects to; empty if there is none."""
    content: str = ""
    """Hash of a file's content: SHA-256 if it has 64 digits, else Git's."""
    size_bytes: int = 0
    reach: Reach = _NOWHERE
    """Where redirects may lead."""

    @property
    def uri(self) -> str:
        return f"{self.top}/{self.key}"

    @property
    def top(self) -> str:
        """The URI of the repository, without a slash at its end."""
        if self.revision is None:
            return f"{SCHEME}{self.repository}"
        shown = self.revision if _MADE_BY_HUB.fullmatch(self.revision) else quote(self.revision, safe="")
        return f"{SCHEME}{self.repository}@{shown}"

    @property
    def root(self) -> str:
        return f"{self.top}/"

    @property
    def wanted_revision(self) -> str:
        return self.revision or DEFAULT_REVISION

    @property
    def sha256(self) -> str:
        return self.content if len(self.content) == 64 else ""


def is_commit(revision: str) -> bool:
    """Whether it is a whole commit hash: the files of such a revision never change."""
    return _COMMIT.fullmatch(revision) is not None


def parse(uri: str) -> Location:
    """Raises InvalidRequestError."""
    rest = uri.removeprefix(SCHEME)
    first = rest.partition("/")[0]
    if first in _OTHER_KINDS:
        raise InvalidRequestError(
            f"sources: {uri[:200]!r} is of the Hub's {first}; penstockd loads models, name one"
        )
    if first == "models" and rest.count("/") >= 2:
        rest = rest.partition("/")[2]
    organisation, _, rest = rest.partition("/")
    repository = rest.partition("/")[0].partition("@")[0]
    rest = rest[len(repository) :]
    names = (organisation, repository)
    if not uri.startswith(SCHEME) or not all(_NAME.fullmatch(name) and _is_safe(name) for name in names):
        raise InvalidRequestError(
            f"sources: {uri[:200]!r} is not of the form hf://org/repo[@revision][/path]; write it so"
        )
    revision = None
    if rest.startswith("@"):
        match = _REVISION.match(rest[1:])
        revision = unquote(match[1]) if match else ""
        if not _PLAIN_REVISION.fullmatch(revision) or ".." in revision:
            raise InvalidRequestError(
                f"sources: {uri[:200]!r} names no revision; write a branch, a tag or a commit behind the @, "
                "with %2F for a slash"
            )
        assert match is not None
        rest = rest[1 + len(match[1]) :]
    return Location(f"{organisation}/{repository}", revision, _checked_path(uri, rest.removeprefix("/")))


def _is_safe(name: str) -> bool:
    """The Hub's own rule for names; in its cache `--` separates the parts of a name."""
    return "--" not in name and ".." not in name


def _checked_path(uri: str, path: str) -> str:
    try:
        path_bytes = len(path.encode())
    except UnicodeEncodeError:
        raise InvalidRequestError(f"sources: {uri[:200]!r} is no text; write it in UTF-8") from None
    if "\0" in path:
        raise InvalidRequestError(f"sources: {uri[:200]!r} holds a NUL character; remove it")
    if path_bytes > MAX_PATH_BYTES:
        raise InvalidRequestError(
            f"sources: {uri[:200]!r}… has a path of {path_bytes} bytes; penstockd takes none above "
            f"{MAX_PATH_BYTES}; name a shorter one"
        )
    return path


def admitted(location: Location, access: Access) -> Location:
    """The location, for a caller who may load it. A prefix allows the repository, organisation or path that
    it names, and all below it. A repository without a revision allows all its revisions. Raises
    AccessDeniedError."""
    if not access.privileged:
        if {".", ".."} & set(location.key.split("/")):
            raise AccessDeniedError(
                f"uid {access.uid} may not load {location.uri}: its path has a '.' or '..' between slashes; "
                "name it without",
                file=location.uri,
            )
        if not any(_holds(prefix, location) for prefix in access.prefixes if prefix.startswith(SCHEME)):
            raise AccessDeniedError(
                f"uid {access.uid} may not load {location.uri}: penstockd has no --allow prefix that holds "
                "it; start it with one",
                file=location.uri,
            )
    return replace(location, reach=Reach.of(access))


def _holds(prefix: str, location: Location) -> bool:
    """`prefix` comes from `allowed`."""
    rest = prefix.removeprefix(SCHEME).rstrip("/")
    if "/" not in rest:
        return rest in ("", location.repository.partition("/")[0])
    allowed = parse(SCHEME + rest)
    if allowed.repository != location.repository:
        return False
    if allowed.revision not in (None, location.revision):
        return False
    top = allowed.key.rstrip("/")
    return not top or location.key == top or location.key.startswith(top + "/")


def allowed(text: str) -> str:
    """The canonical form of a `--allow` prefix. Raises ValueError."""
    rest = text.removeprefix(SCHEME).removeprefix("models/").rstrip("/")
    if rest and "/" not in rest and not (_NAME.fullmatch(rest) and _is_safe(rest)):
        raise ValueError(f"{text!r} names no organisation of the Hub; write hf://org or hf://org/repo")
    if "/" in rest:
        try:
            parse(SCHEME + rest)
        except InvalidRequestError as error:
            raise ValueError(error.message.removeprefix("sources: ")) from None
    return SCHEME + rest
