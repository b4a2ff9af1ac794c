"""The source of files: paths and `file://` URIs. `local_file.py` reads what it opens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

from ...errors import AccessDeniedError
from .. import Access, Listed, Wanted, join
from . import paths, tree
from .local_file import FileContext, LocalFile, open_file


class FileSource:
    """Paths and `file://` URIs. `workers` returns, for a path and a uid, the threads that open the file and
    read its header."""

    kind = "file"
    schemes = ("file",)
    descriptors_per_file = 2  # one of them for direct I/O

    def __init__(
        self,
        workers: Callable[[str, int], Executor],
        context: FileContext | None = None,
        *,
        patience_seconds: float = 60.0,
    ) -> None:
        self._workers = workers
        self._context = context or FileContext()
        self.patience_seconds = patience_seconds

    def workers(self, location: str, uid: int) -> Executor:
        return self._workers(location, uid)

    def location(self, source: str) -> str:
        return paths.local_path(source)

    def name(self, location: str) -> str:
        return os.path.basename(location)

    def join(self, directory: str, name: str) -> str:
        return join(directory, name)

    def list(self, location: str, access: Access) -> list[str] | None:
        with self._context.asking(location):
            return paths.list_directory(location, access)

    def tree(self, location: str, access: Access, wanted: Wanted) -> Iterator[Listed]:
        return tree.walk(location, access, wanted, self._context.asking)

    def dangles(self, location: str, access: Access) -> bool:
        try:
            with self._context.asking(location):
                os.close(paths.open_raw(location, access, os.O_PATH))
        except OSError as error:
            return error.errno in paths.NOT_THERE
        except AccessDeniedError:
            return False
        return False

    def open(self, location: str, access: Access) -> LocalFile:
        with self._context.asking(location):
            return open_file(location, access, self._context)
