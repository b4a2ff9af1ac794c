"""Repositories that huggingface_hub has fetched to this machine:

    models--org--repo/refs/main           the commit that a branch was when it was fetched
    models--org--repo/snapshots/SHA/file  a link to a file in blobs, which may be a link itself

They are read as local files are. The cache belongs to the daemon: the URI decides who may read it, as if the
files came from the Hub. A user who can write to it could add links to other files that the daemon can read.
So links are followed only beneath the cache, for root too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ...errors import CheckpointInvalidError, CheckpointNotFoundError
from .. import Access, Listed, Wanted
from ..checksums import sha256_checksum
from ..file import paths
from ..file.local_file import FileContext, LocalFile
from ..file.tree import walk
from ..objects.object import listed_version
from .location import Location, is_commit

_REF_BYTES = 64
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class HubCache:
    """`context` returns what files need to know of the machine; it is called when first needed."""

    def __init__(self, root: Path, context: Callable[[], FileContext]) -> None:
        self._root = os.path.abspath(root)
        self._context = context

    def commit(self, location: Location) -> str:
        """The commit of its revision when it was fetched; empty if it is not in the cache. Raises
        PenstockError if it cannot be read."""
        path = f"{self._folder(location)}/refs/{location.wanted_revision}"
        with self._context().asking(path):
            try:
                fd = paths.open_regular(path, self._access(0))
            except (CheckpointNotFoundError, CheckpointInvalidError):  # or a directory of several branches
                return ""
            try:
                text = os.read(fd, _REF_BYTES).decode("latin-1").strip()
            except OSError as error:
                raise paths.path_error(path, self._access(0), error) from error
            finally:
                os.close(fd)
        return text if is_commit(text) else ""

    def open(self, location: Location, uid: int) -> CachedFile:
        """A file of its commit. The caller must close it. Raises PenstockError; CheckpointNotFoundError if it
        is not in the cache."""
        path = f"{self._snapshot(location)}/{location.key}"
        context = self._context()
        with context.asking(path):
            fd = paths.open_regular(path, self._access(uid))
            return CachedFile(location, path, fd, context, uid)

    def tree(self, location: Location, access: Access, wanted: Wanted) -> Iterator[Listed]:
        """The cached files of its commit below its path, as for `Source.tree`."""
        top = f"{self._snapshot(location)}/{location.key}".rstrip("/")
        own = replace(self._access(access.uid), listing=access.listing)
        return walk(top, own, wanted, self._context().asking)

    def _access(self, uid: int) -> Access:
        return Access(uid, privileged=False, prefixes=(self._root,))

    def _folder(self, location: Location) -> str:
        return f"{self._root}/models--{location.repository.replace('/', '--')}"

    def _snapshot(self, location: Location) -> str:
        return f"{self._folder(location)}/snapshots/{location.commit}"


class CachedFile(LocalFile):
    """A file of the cache, under its name on the Hub."""

    def __init__(self, location: Location, path: str, fd: int, context: FileContext, uid: int) -> None:
        super().__init__(path, fd, context, uid)
        self.uri = location.uri
        if location.content:  # from the Hub's list; without one, from the cache directory
            self.listed_version = listed_version(location.content, self.size_bytes)
        named = sha256_checksum(location.sha256 or _sha256_named(fd))
        self.checksums = () if named is None else (named,)


def _sha256_named(fd: int) -> str:
    """The hash in the name of the blob that an open file is."""
    try:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        return ""
    return name if _SHA256.fullmatch(name) else ""
