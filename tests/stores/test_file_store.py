"""Files on a disk pass what every store has to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.server.sources import SourceFile
from penstock.server.sources.file.store import FileStore

from ..server.support import make_config, wait_for_tick
from .conformance import Storage, StoreTests, closing


class Files(Storage):
    def put(self, name: str, content: bytes) -> str:
        path = Path(self.top, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        wait_for_tick(path.parent)
        path.write_bytes(content)
        return str(path)

    @contextlib.contextmanager
    def fail(self, file: SourceFile) -> Iterator[None]:
        """Its descriptors become those of a directory, which the kernel refuses to read."""
        directory = os.open(self.top, os.O_RDONLY)
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the one that listed them
                if os.readlink(f"/proc/self/fd/{name}") == file.uri:
                    os.dup2(directory, int(name), inheritable=False)
        os.close(directory)
        yield


class TestFileStore(StoreTests):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[Storage]:
        yield from closing(Files(FileStore(make_config()), str(tmp_path)))
