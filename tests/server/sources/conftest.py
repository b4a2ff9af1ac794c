"""A server of objects, and sources that read from it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.server.sources.objects import ObjectSettings, exchange, faults, response
from penstock.server.sources.objects import object as object_module
from penstock.server.sources.s3.settings import S3Settings
from penstock.server.sources.s3.source import S3Source

from ..objects import ObjectServer, share_models
from .hooks import KEY_ID, SECRET, Sources


@pytest.fixture
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "eu-west-3",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    share_models(monkeypatch)
    # Retries are to be counted, not waited for.
    monkeypatch.setattr(faults, "FIRST_DELAY_SECONDS", 0.0)


@pytest.fixture
def server(_environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    server = ObjectServer()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    yield server
    server.close()


@pytest.fixture
def retried() -> list[str]:
    return []


@pytest.fixture
def sources(_environment: None, retried: list[str]) -> Iterator[Sources]:
    made: list[S3Source] = []
    with ThreadPoolExecutor(2) as workers:

        def make(**settings: Any) -> S3Source:
            values: dict[str, Any] = {
                "retries": 3,
                "timeout_seconds": 20.0,
                "connections": 2,
                "checksums": False,  # which cost requests of their own
            }
            values.update({name: settings.pop(name) for name in set(values) & set(settings)})
            own = S3Settings(**settings)
            made.append(S3Source(ObjectSettings(**values), own, lambda uid: workers, retried.append))
            return made[-1]

        yield make
        for source in made:
            source.stop()


@pytest.fixture
def a_second_for_each_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this machine, when it is slow, would be taken for a store that trickles."""
    seconds = [0]
    read_raw = response._Timed.readinto

    def tick() -> None:
        seconds[0] += 1

    def readinto(raw: response._Timed, buffer: object) -> int | None:
        tick()
        return read_raw(raw, buffer)

    clock = SimpleNamespace(monotonic=lambda: seconds[0])
    monkeypatch.setattr(object_module, "time", clock)
    monkeypatch.setattr(response, "time", clock)
    monkeypatch.setattr(response._Timed, "readinto", readinto)
    monkeypatch.setattr(exchange, "beat", tick)  # what goes past the parser's buffer
    # Such a read otherwise waits a quarter of a second for more bytes.
    monkeypatch.setattr(exchange, "_TURN", struct.pack("ll", 0, 20_000))
