"""Repositories that huggingface_hub has fetched to this machine:

    models--org--repo/refs/main           the commit that a branch was when it was fetched
    models--org--repo/snapshots/SHA/file  a link to a file in blobs, which may be a link itself

They are read as files are. The cache is the daemon's own: who may read it is decided by the URI, as if the
files came from the Hub. Whoever can write to it could put links there that lead to other files which the
daemon can read. So links are followed only beneath the cache, for root too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import CheckpointNotFoundError
from .. import Access, Listed, Wanted
from ..checksums import sha256_checksum
from ..file import paths
from ..file.source import FileContext, LocalFile
from ..file.tree import walk
from ..objects.object import listed_version
from .location import Location, is_commit

_REF_BYTES = 64
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class HubCache:
    """`context` gives what files know of the machine, when first needed."""

    def __init__(self, root: Path, context: Callable[[], FileContext]) -> None:
        self._root = os.path.abspath(root)
        self._context = context

    def commit(self, location: Location) -> str:
        """What its revision was when it was fetched; empty where it is not there. Raises PenstockError where
        it cannot be read."""
        path = f"{self._folder(location)}/refs/{location.wanted_revision}"
        with self._context().asking(path):
            try:
                fd = paths.open_path(path, self._access(0), os.O_RDONLY)
            except CheckpointNotFoundError:
                return ""
            try:
                text = os.read(fd, _REF_BYTES).decode("latin-1").strip()
            finally:
                os.close(fd)
        return text if is_commit(text) else ""

    def open(self, location: Location, uid: int) -> CachedFile:
        """A file of its commit. The caller must close it. Raises PenstockError; CheckpointNotFoundError where
        it is not in the cache."""
        path = f"{self._snapshot(location)}/{location.key}"
        context = self._context()
        with context.asking(path):
            fd = paths.open_path(path, self._access(uid), os.O_RDONLY)
            return CachedFile(location, path, fd, context)

    def tree(self, location: Location, uid: int, wanted: Wanted) -> Iterator[Listed]:
        """What is there of its commit below its path, as `Source.tree` gives it."""
        top = f"{self._snapshot(location)}/{location.key}".rstrip("/")
        return walk(top, self._access(uid), wanted, self._context().asking)

    def _access(self, uid: int) -> Access:
        return Access(uid, privileged=False, prefixes=(self._root,))

    def _folder(self, location: Location) -> str:
        return f"{self._root}/models--{location.repository.replace('/', '--')}"

    def _snapshot(self, location: Location) -> str:
        return f"{self._folder(location)}/snapshots/{location.commit}"


class CachedFile(LocalFile):
    """A file of the cache, under the name that the Hub has for it."""

    def __init__(self, location: Location, path: str, fd: int, context: FileContext) -> None:
        super().__init__(path, fd, context)
        self.uri = location.uri
        if location.content:  # as the Hub's list says it; else as that of the directory does
            self.listed_version = listed_version(location.content, self.size_bytes)
        named = sha256_checksum(location.sha256 or _sha256_named(fd))
        self.checksums = () if named is None else (named,)


def _sha256_named(fd: int) -> str:
    """What the blob of an open file is named for."""
    try:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        return ""
    return name if _SHA256.fullmatch(name) else ""
