"""What every kind of source has to do, asked of files and of objects alike."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock.server.checkpoint.catalog import Catalog
from penstock.server.errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    InvalidRequestError,
)
from penstock.server.sources import Access, Patient, Source
from penstock.server.sources.file.source import FileSource
from penstock.server.sources.objects import ObjectSettings
from penstock.server.sources.s3.settings import S3Settings
from penstock.server.sources.s3.source import S3Source

from .objects import ObjectServer
from .support import ROOT, checkpoint_bytes, wait_for_tick

CONTENT = random.Random(7).randbytes(400_000)


@dataclass
class Storage:
    """A source, where its files lie, and how they get there."""

    source: Source
    catalog: Catalog
    top: str
    server: ObjectServer | None

    def put(self, name: str, content: bytes) -> str:
        """Its location."""
        if self.server is not None:
            self.server.put(f"top/{name}", content)
        else:
            path = Path(self.top, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            wait_for_tick(path.parent)
            path.write_bytes(content)
        return f"{self.top}/{name}"

    def read(self, location: str, start: int, end: int) -> bytes:
        file = self.source.open(location, ROOT)
        try:
            buffer = bytearray(end - start)
            Patient(file).read_into(start, [memoryview(buffer)[:5], memoryview(buffer)[5:]])
            file.check_unchanged()
            return bytes(buffer)
        finally:
            file.close()


@pytest.fixture(params=["file", "s3"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Storage]:
    server = ObjectServer()
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    settings, own = ObjectSettings(retries=2, timeout_seconds=20, connections=4), S3Settings(unsigned=True)
    with ThreadPoolExecutor(4) as workers, ThreadPoolExecutor(4) as others:
        files = FileSource(lambda path, uid: workers)
        objects = S3Source(settings, own, lambda uid: others, print)
        catalog = Catalog([files, objects])
        if request.param == "file":
            yield Storage(files, catalog, str(tmp_path), None)
        else:
            yield Storage(objects, catalog, "s3://bucket/top", server)
        objects.stop()
        catalog.shutdown()
    server.close()


def test_it_says_its_kind(storage: Storage) -> None:
    file = storage.source.open(storage.put("a", CONTENT), ROOT)
    assert file.kind == storage.source.kind
    assert file.size_bytes == len(CONTENT)
    file.close()


@pytest.mark.parametrize(("start", "end"), [(0, 8), (0, 400_000), (4096, 8192), (262_140, 262_150)])
def test_views_get_the_bytes_of_the_range(storage: Storage, start: int, end: int) -> None:
    assert storage.read(storage.put("a", CONTENT), start, end) == CONTENT[start:end]


def test_versions_are_equal_until_the_bytes_change(storage: Storage) -> None:
    versions = []
    for content in (CONTENT, None, CONTENT[::-1]):
        if content is not None:
            storage.put("a", content)
        file = storage.source.open(f"{storage.top}/a", ROOT)
        versions.append(file.version)
        file.close()
    assert versions[0] == versions[1] != versions[2]


def test_a_change_while_it_is_read_is_noticed(storage: Storage) -> None:
    file = storage.source.open(storage.put("a", CONTENT), ROOT)
    buffer = memoryview(bytearray(1000))
    Patient(file).read_into(300_000, [buffer])
    storage.put("a", CONTENT[:350_000])

    def go_on() -> None:
        Patient(file).read_into(310_000, [buffer])
        file.check_unchanged()

    with pytest.raises(CheckpointChangedError, match="/a was changed"):
        go_on()
    file.close()


def test_what_does_not_exist_is_named(storage: Storage) -> None:
    with pytest.raises(CheckpointNotFoundError, match="nothing-here"):
        storage.source.open(f"{storage.top}/nothing-here", ROOT)


def test_what_is_not_allowed_is_refused_by_name(storage: Storage) -> None:
    location = storage.put("models/a", CONTENT)
    storage.put("models-secret/a", CONTENT)
    access = Access(uid=1000, privileged=False, prefixes=(f"{storage.top}/models",))
    storage.source.open(location, access).close()
    for name in ("models-secret/a", "models/../models-secret/a"):
        with pytest.raises(AccessDeniedError, match="models-secret/a"):
            storage.source.open(f"{storage.top}/{name}", access)


def test_the_catalog_reads_headers_of_files_with_awkward_names(storage: Storage) -> None:
    names = ["a b+%41#c.safetensors", "é漢.safetensors", "plain.safetensors"]
    locations = [
        storage.put(name, checkpoint_bytes([10, 20], prefix=f"{number}-"))
        for number, name in enumerate(names)
    ]
    checkpoint = storage.catalog.resolve(locations, ROOT)
    try:
        assert [list(table.names()) for table in checkpoint.tables] == [
            ["0-0", "0-1"],
            ["1-0", "1-1"],
            ["2-0", "2-1"],
        ]
        again = storage.catalog.resolve(locations, ROOT)
        again.close()
        assert again.version == checkpoint.version
        assert again.headers[0] is checkpoint.headers[0]
    finally:
        checkpoint.close()


def test_files_and_objects_make_one_checkpoint(storage: Storage, tmp_path: Path) -> None:
    """And one that fails leaves none of the others open."""
    local = tmp_path / "local.safetensors"
    local.write_bytes(checkpoint_bytes([3], prefix="l"))
    there = storage.put("there.safetensors", checkpoint_bytes([4], prefix="t"))
    checkpoint = storage.catalog.resolve([there, str(local)], ROOT)
    checkpoint.close()
    assert [list(table.names()) for table in checkpoint.tables] == [["t0"], ["l0"]]
    with pytest.raises(CheckpointNotFoundError, match="gone"):
        storage.catalog.resolve([str(local), f"{storage.top}/gone.safetensors"], ROOT)


def test_what_names_nothing_is_an_invalid_request(storage: Storage) -> None:
    with pytest.raises(InvalidRequestError, match="NUL"):
        storage.source.location(f"{storage.top}/\0")
