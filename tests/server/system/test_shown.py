"""What of a caller's text is shown."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock.server.system.shown import SHOWN_BYTES, cut, shown_source, shown_sources


def test_what_is_shown_of_a_url_holds_no_secret() -> None:
    urls = ["https://anne:SECRET@h/x", "HTTP://h/x?token=SECRET", "https://h/x#SECRET", "https://SECRET@h"]
    assert shown_sources(urls) == ["https://h/x", "HTTP://h/x", "https://h/x", "https://h"]
    assert "SECRET" not in shown_source(urls)


def test_keys_and_paths_are_shown_as_they_are() -> None:
    sources = ["s3://b/a@b?versionId=1#2", "/models/a@b?c#d", "hf://org/repo@main/a?b"]
    assert shown_sources(sources) == sources


@pytest.mark.parametrize("text", ["x" * 5000, "\U0001f600" * 5000, "é%" * 5000])
@pytest.mark.parametrize("size", [len, lambda text: len(text.encode())])
def test_a_text_is_cut_to_its_bound_with_a_mark(text: str, size: Callable[[str], int]) -> None:
    shown = cut(text, size=size)
    assert SHOWN_BYTES - 8 <= size(shown) <= SHOWN_BYTES
    kept, _, mark = shown.partition("...[")
    assert text.startswith(kept)
    assert mark == f"{len(text) - len(kept)} more characters]"
    assert cut("short", size=size) == "short"


def test_sources_are_cut_together() -> None:
    assert shown_sources(["/a"] * 20) == ["/a"] * 16
    assert sum(map(len, shown_sources(["/" + "x" * 8000] * 20))) <= SHOWN_BYTES
