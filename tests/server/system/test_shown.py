"""What of a caller's text is shown."""

from __future__ import annotations

from penstock.server.system.shown import shown_source, shown_sources


def test_what_is_shown_of_a_url_holds_no_secret() -> None:
    urls = ["https://anne:SECRET@h/x", "HTTP://h/x?token=SECRET", "https://h/x#SECRET", "https://SECRET@h"]
    assert shown_sources(urls) == ["https://h/x", "HTTP://h/x", "https://h/x", "https://h"]
    assert "SECRET" not in shown_source(urls)


def test_keys_and_paths_are_shown_as_they_are() -> None:
    sources = ["s3://b/a@b?versionId=1#2", "/models/a@b?c#d", "hf://org/repo@main/a?b"]
    assert shown_sources(sources) == sources
