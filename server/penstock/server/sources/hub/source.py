"""`hf://` URIs as a source."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import replace

from ...errors import AccessDeniedError, CheckpointInvalidError, CheckpointNotFoundError, PenstockError
from .. import Access, Listed, Wanted
from ..file.local_file import FileContext
from ..objects import ObjectFile, ObjectSettings, ObjectSource
from ..objects.faults import Transient
from ..objects.object import listed_version
from ..objects.requests import no_range
from ..objects.service import ObjectService
from ..objects.source import OBJECT_SUFFIX
from .answers import no_such_file, not_cached
from .api import HubApi, state_of
from .cache import CachedFile, HubCache
from .location import Location, admitted, is_commit, parse
from .service import HubService
from .settings import HubSettings

WHOLE_BYTES = 16 << 20
"""The Hub keeps files of up to 10 MB in Git itself, and may answer with a whole file."""


class HubSource(ObjectSource[Location]):
    """Repositories, directories and files in them. Files in the local cache are read from there."""

    kind = "hub"
    schemes = ("hf",)
    descriptors_per_file = 2  # of one in the cache

    def __init__(
        self,
        settings: ObjectSettings,
        context: Callable[[], FileContext],
        workers: Callable[[int], Executor],
        on_retry: Callable[[str], None],
    ) -> None:
        """Arguments as for `ObjectSource`; `context` is what files of the cache need to know of the
        machine."""
        super().__init__(settings, workers, on_retry)
        self._context = context
        self._making = threading.Lock()
        self._hub: _Hub | None = None

    def parse(self, uri: str) -> Location:
        return parse(uri)

    def admitted(self, location: str, access: Access) -> Location:
        return admitted(parse(location), access)

    def is_version(self, location: Location) -> bool:
        return False

    def as_directory(self, location: Location) -> Location:
        return replace(location, key=location.key + "/")

    def whole(self, location: Location, size_bytes: int | None) -> PenstockError | Transient | None:
        if size_bytes is not None and size_bytes <= WHOLE_BYTES:
            return None
        return no_range(location, size_bytes)

    def connect(self) -> ObjectService[Location]:
        return HubService(self._connected().api)

    def list(self, location: str, access: Access) -> list[str] | None:
        named = self.admitted(location, access)
        if named.key.endswith(OBJECT_SUFFIX):
            return None
        directory = self._directory(named)
        found = self._below(self._pinned(directory, access), access, lambda name: "/" not in name)
        names = sorted(listed.name for listed in found)
        return names if names or directory is named else None

    def tree(self, location: str, access: Access, wanted: Wanted) -> Iterator[Listed]:
        directory = self._directory(self.admitted(location, access))
        return self._tree(directory, access, wanted)

    def open(self, location: str, access: Access) -> ObjectFile[Location] | CachedFile:  # type: ignore[override]
        named = self.admitted(location, access)
        if not named.key or named.key.endswith("/"):
            raise CheckpointNotFoundError(
                f"{location} names no file; add the path of one to it", file=location
            )
        at = self._pinned(named, access)
        hub = self._connected()
        if hub.settings.offline:
            return self._open_offline(hub, at, access)
        file = hub.api.tree(at).get(at.key)
        if file is None:
            raise no_such_file(at)
        at = replace(at, content=file.content, size_bytes=file.size_bytes)
        cached = _open_cached(hub.cache, at, access)
        if cached is not None:
            return cached
        return ObjectFile(self.kind, self._requests(), at, state_of(at), b"")

    def stop(self) -> None:
        super().stop()
        with self._making:
            if self._hub is not None:
                self._hub.api.stop()

    def _tree(self, directory: Location, access: Access, wanted: Wanted) -> Iterator[Listed]:
        empty = True
        for listed in self._below(self._pinned(directory, access), access, lambda name: True):
            empty = False
            if wanted(listed.name):
                yield listed
        if empty:
            raise CheckpointNotFoundError(
                f"{directory.uri}: nothing lies below it; check the URI, and that it names a directory",
                file=directory.uri,
            )

    # ---- inside ---------------------------------------------------------------------------------

    def _connected(self) -> _Hub:
        """Reads the environment when first called."""
        with self._making:
            if self._hub is None:
                settings = HubSettings.of(os.environ)
                api = HubApi(settings, self._settings, self._on_retry)
                self._hub = _Hub(settings, api, HubCache(settings.cache, self._context))
            return self._hub

    def _pinned(self, location: Location, access: Access) -> Location:
        """The location with the commit of its revision, which then stays the same for the whole load."""
        revision = location.wanted_revision
        if is_commit(revision):
            return replace(location, commit=revision)
        commit = access.pins.get(location.top, lambda: self._commit(location))
        return replace(location, commit=commit)

    def _commit(self, location: Location) -> str:
        hub = self._connected()
        if not hub.settings.offline:
            return hub.api.commit(location)
        commit = hub.cache.commit(location)
        if not commit:
            raise not_cached(location)
        return commit

    def _below(self, directory: Location, access: Access, wanted: Wanted) -> Iterator[Listed]:
        """The files of a commit below a path that ends in `/` or is empty, by names relative to it."""
        hub = self._connected()
        top = directory.key
        if hub.settings.offline:
            yield from self._below_offline(hub, directory, access, wanted)
            return
        for path, file in hub.api.tree(replace(directory, key="")).items():
            name = path[len(top) :]
            if path.startswith(top) and name and wanted(name):
                yield Listed(name, file.size_bytes, listed_version(file.content, file.size_bytes))

    def _below_offline(
        self, hub: _Hub, directory: Location, access: Access, wanted: Wanted
    ) -> Iterator[Listed]:
        try:
            yield from hub.cache.tree(directory, access, wanted)
        except CheckpointNotFoundError:
            if not directory.key:
                raise not_cached(directory) from None
        except CheckpointInvalidError:
            if not directory.key:
                raise
            """Whether it is a file."""

    def _open_offline(self, hub: _Hub, at: Location, access: Access) -> CachedFile:
        try:
            return hub.cache.open(at, access.uid)
        except CheckpointNotFoundError:
            raise not_cached(at) from None


class _Hub:
    """The Hub as the environment configures it."""

    def __init__(self, settings: HubSettings, api: HubApi, cache: HubCache) -> None:
        self.settings = settings
        self.api = api
        self.cache = cache


def _open_cached(cache: HubCache, at: Location, access: Access) -> CachedFile | None:
    """The file from the cache. None if the cache does not have it whole, or it may not be followed there; it
    then comes from the Hub."""
    try:
        file = cache.open(at, access.uid)
    except (CheckpointNotFoundError, AccessDeniedError, CheckpointInvalidError):
        return None
    if file.size_bytes != at.size_bytes:
        file.close()
        return None
    return file
