from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import objects
from benchmarks.fleet_store import FleetStore


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FleetStore]:
    """It has `m/model.safetensors`, of 200 bytes, and an index beside it."""
    monkeypatch.setattr(objects, "DATA_DIR", tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m/model.safetensors").write_bytes(bytes(range(200)))
    (tmp_path / "m/model.safetensors.index.json").write_text("{}")
    with FleetStore(1e9) as store:
        yield store
