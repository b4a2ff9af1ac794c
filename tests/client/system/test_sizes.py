from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from penstock.client.system.sizes import absolute_sources, parse_memory_limit, show_bytes


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (-1, None), ("-1", None), (" -1 ", None), (0, 0), ("0", 0), (123, 123), ("4000000000", 4_000_000_000),
        ("4GB", 4 * 10**9), ("4GiB", 4 * 2**30), ("4gib", 4 * 2**30), ("64 MB", 64 * 10**6),
        ("1.5GB", 1_500_000_000), ("4G", 4 * 10**9), ("4Gi", 4 * 2**30), ("10kB", 10_000), ("10KiB", 10_240),
        ("2TB", 2 * 10**12), ("7B", 7),
    ],
)  # fmt: skip
def test_limits_as_people_write_them(limit: int | str, expected: int | None) -> None:
    assert parse_memory_limit(limit) == expected


@pytest.mark.parametrize(
    "limit", [-2, "-5", "", "GB", "4 GBs", "4XB", "1e9", "4GB!", "٤GB", 2**63, "99999999999TB"]
)
def test_what_is_no_limit_is_refused_with_a_hint(limit: int | str) -> None:
    with pytest.raises(ValueError, match="memory limit"):
        parse_memory_limit(limit)


@pytest.mark.parametrize("limit", [1.5, True, b"4GB"])
def test_other_types_are_refused(limit: Any) -> None:
    with pytest.raises(TypeError):
        parse_memory_limit(limit)


def test_the_environment_stands_in_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_MEMORY_LIMIT", raising=False)
    monkeypatch.delenv("RUNAI_STREAMER_MEMORY_LIMIT", raising=False)
    assert parse_memory_limit(None) is None
    monkeypatch.setenv("RUNAI_STREAMER_MEMORY_LIMIT", "1000")
    assert parse_memory_limit(None) == 1000
    monkeypatch.setenv("PENSTOCK_MEMORY_LIMIT", "2GB")
    assert parse_memory_limit(None) == 2 * 10**9
    assert parse_memory_limit(-1) is None
    monkeypatch.setenv("PENSTOCK_MEMORY_LIMIT", "lots")
    with pytest.raises(ValueError, match="PENSTOCK_MEMORY_LIMIT='lots'"):
        parse_memory_limit(None)


def test_relative_paths_become_absolute_and_the_rest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("/elsewhere")
    monkeypatch.chdir(tmp_path)
    here = os.fspath(tmp_path)
    assert absolute_sources("model.safetensors") == [f"{here}/model.safetensors"]
    assert absolute_sources(Path("link/x")) == [f"{here}/link/x"]
    assert absolute_sources("~/x") == [f"{here}/~/x"]
    uris = ["s3://bucket/a b/", "file:///x/../y", "/abs"]
    assert absolute_sources(uris) == uris
    assert absolute_sources(("a", Path("b"))) == [f"{here}/a", f"{here}/b"]


@pytest.mark.parametrize("source", ["", [], [""], "a\0b", "\udcff"])
def test_sources_that_cannot_be_are_refused(source: Any) -> None:
    with pytest.raises(ValueError):
        absolute_sources(source)


@pytest.mark.parametrize("source", [b"x", [b"x"], [1]])
def test_sources_of_other_types_are_refused(source: Any) -> None:
    with pytest.raises(TypeError):
        absolute_sources(source)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (4_020_000_000, "4.02 GB"), (2e15, "2000.00 TB")],
)
def test_bytes_for_people(size: float, text: str) -> None:
    assert show_bytes(size) == text
