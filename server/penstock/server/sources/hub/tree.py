"""Parses the Hub's lists of the files of a commit: pages of JSON in, files out. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from ...errors import CheckpointInvalidError
from ..objects.faults import Transient
from ..objects.service import Entry, Page
from .location import Location

MAX_FILES = 20_000
MAX_NAMES_BYTES = 8 << 20
"""Bounds for a repository."""
MAX_PAGE_FILES = 20_000
"""Most files on a page. The Hub sends 1000."""
FILE_BYTES = 350
"""Memory of a file, besides its name."""
_CONTENT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.ASCII)
_NEXT = re.compile(r'<([^<>\s]{1,8192})>\s*;\s*rel="?next"?')
_PATH = b'"path"'


class _Lfs(msgspec.Struct):
    oid: str = ""


class _Item(msgspec.Struct):
    type: str
    path: str
    oid: str = ""
    size: int = 0
    lfs: _Lfs | None = None


class _Info(msgspec.Struct):
    sha: str


_ITEMS = msgspec.json.Decoder(list[_Item])
_INFO = msgspec.json.Decoder(_Info)


@dataclass(frozen=True, slots=True)
class HubFile:
    size_bytes: int
    content: str
    """Hash: SHA-256 of the content of a large file (64 digits), Git's of another (40)."""


Tree = Mapping[str, HubFile]
"""Files by path."""


def page(body: bytes, headers: Mapping[str, str]) -> Page:
    """One page of a tree. Raises Transient."""
    if body.count(_PATH) > MAX_PAGE_FILES:
        raise Transient("bad_response", "a page of the Hub's list has too many names")
    try:
        items = _ITEMS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Transient("bad_response", "the answer is no list of files that can be read") from None
    entries = [_entry(item) for item in items if item.type == "file"]
    following = _NEXT.search(headers.get("link", ""))
    return Page(entries, following[1] if following else "")


def _entry(item: _Item) -> Entry:
    content = item.lfs.oid.removeprefix("sha256:") if item.lfs is not None else item.oid
    if not _CONTENT.fullmatch(content):
        raise Transient("bad_response", "the list does not say what a file holds")
    return Entry(item.path, item.size, content)


def commit(body: bytes) -> str:
    """The commit of a revision. Raises Transient."""
    try:
        sha = _INFO.decode(body).sha
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        sha = ""
    if not re.fullmatch(r"[0-9a-f]{40}", sha):
        raise Transient("bad_response", "the answer does not say which commit the revision is")
    return sha


def weight(tree: Tree) -> int:
    """Memory of a tree in bytes."""
    return sum(FILE_BYTES + len(name.encode(errors="replace")) for name in tree)


def too_many(location: Location) -> CheckpointInvalidError:
    return CheckpointInvalidError(
        f"{location.uri}: {location.repository} has more than {MAX_FILES} files, or longer names than "
        f"{MAX_NAMES_BYTES >> 20} MiB together; copy those that are needed to a repository of their own",
        file=location.uri,
    )
