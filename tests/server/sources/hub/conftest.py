"""A Hub, and sources that read from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.server.sources.file.local_file import FileContext
from penstock.server.sources.hub.source import HubSource
from penstock.server.sources.objects import ObjectSettings, faults

from ...hub_server import HubServer

Sources = Callable[[], HubSource]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    monkeypatch.setattr(faults, "FIRST_DELAY_SECONDS", 0.0)  # retries are not waited for
    with contextlib.closing(HubServer()) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        # Other tests of this process set it before they import transformers.
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield server


@pytest.fixture
def sources(hub: HubServer) -> Iterator[Sources]:
    """Each reads the environment as it is when it is first asked."""
    made: list[HubSource] = []
    with ThreadPoolExecutor(2) as workers:

        def make() -> HubSource:
            settings = ObjectSettings(retries=3, timeout_seconds=20.0, connections=4)
            made.append(HubSource(settings, FileContext, lambda uid: workers, lambda reason: None))
            return made[-1]

        yield make
        for source in made:
            source.stop()


@pytest.fixture
def source(sources: Sources) -> HubSource:
    return sources()
