"""Directories that are complete or do not exist; e2e/loading/test_fetch.py writes them by real fetches."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.client.system.trees import Draft


def test_a_draft_that_another_fetch_removes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not locked was left by a killed process, as far as another fetch can tell."""
    made: list[Path] = []
    make = Path.mkdir

    def make_and_lose(path: Path, *arguments: object, **named: object) -> None:
        make(path, *arguments, **named)  # type: ignore[arg-type]
        made.append(path)
        if len(made) == 1:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", make_and_lose)
    with Draft(tmp_path, "/model") as draft:
        assert draft.path == made[-1]
        assert len(made) == 2
        assert draft.path.is_dir()
    assert not any(tmp_path.iterdir())
