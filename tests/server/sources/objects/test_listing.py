"""Lists in pages: what is asked for again, what is too long, and that they end with the daemon."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from penstock.server.errors import (
    CheckpointInvalidError,
    CheckpointNotFoundError,
    ShuttingDownError,
    SourceUnavailableError,
)
from penstock.server.sources.objects import listing
from penstock.server.sources.s3.source import S3Source

from ...objects import Asked, ObjectServer
from ...support import ROOT
from ..hooks import (
    TRANSIENT,
    Sources,
    always,
    lists,
    once,
    page,
    query_of,
    trickle_body,
)

LISTS: dict[str, tuple[str, Callable[[Asked], None]]] = {
    **{name: TRANSIENT[name] for name in ("reset", "500", "503", "429", "400")},
    "no HTTP": TRANSIENT["no HTTP"],
    "408": ("timeout", lambda asked: asked.fail(408, "")),
    "200 and HTML": ("bad_response", lambda asked: asked.answer(200, b"<html><body>Sorry</body></html>")),
    "200 and half a page": ("bad_response", lambda asked: asked.answer(200, b"<html>" * 100)),
    "200 and nothing": ("bad_response", lambda asked: asked.answer(200)),
    "200 and an error": ("server_error", lambda asked: asked.fail(200, "InternalError")),
    "200 and too many at once": ("throttled", lambda asked: asked.fail(200, "SlowDown")),
    "cut list": ("short_body", lambda asked: cut_list(asked)),
    "cut in mid-chunk": ("short_body", lambda asked: cut_list(asked, chunked=True)),
    "no numbers": ("bad_response", lambda asked: asked.answer(200, page(more="<MaxKeys>x</MaxKeys>"))),
    "another directory": ("bad_response", lambda asked: asked.answer(200, page("other/a"))),
    "entries without a key": ("bad_response", lambda asked: asked.answer(200, page(more="<Contents/>"))),
    "no next page": ("bad_response", lambda asked: endless(asked, "")),
    "the same page": ("bad_response", lambda asked: endless(asked, "t")),
}


def cut_list(asked: Asked, *, chunked: bool = False) -> None:
    asked.handler.send_response(200)
    framing = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", "1000")
    asked.handler.send_header(*framing)
    asked.handler.end_headers()
    asked.handler.wfile.write((b"1000\r\n" if chunked else b"") + b"<ListBucketResult>")
    asked.handler.close_connection = True


def endless(asked: Asked, token: str) -> None:
    """Says that there is more where the page before said it, or does not say where."""
    body = (
        f"<Name>b</Name><IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
    )
    asked.answer(200, f"<ListBucketResult>{body}</ListBucketResult>".encode())


@pytest.mark.parametrize("name", LISTS)
def test_a_page_that_fails_is_asked_for_again_and_counted(
    name: str, server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    reason, act = LISTS[name]
    server.hooks += [once(act, skip=1), once(act, skip=1)]
    server.hooks += [lists("m/", "m/b", after="t"), lists("m/", "m/a", token="t")]
    assert sources().list("s3://bucket/m/", ROOT) == ["a", "b"]
    assert retried == [reason, reason]
    assert len(server.asked) == 4, "the first page was asked for again"


@pytest.mark.parametrize("name", LISTS)
def test_a_list_that_keeps_failing_is_given_up_with_a_remedy(
    name: str, server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    server.hooks += [lists("m/", "m/b", after="t"), always(LISTS[name][1])]
    with pytest.raises(SourceUnavailableError, match=r"bucket/m/: listing it .*3 times.*--object-retries"):
        sources().list("s3://bucket/m/", ROOT)
    assert (len(server.asked), len(retried)) == (4, 2)


@pytest.mark.parametrize("announced", [True, False])
def test_a_page_longer_than_any_is_not_kept(
    announced: bool,
    server: ObjectServer,
    sources: Sources,
    retried: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def long(asked: Asked) -> None:
        if announced:
            asked.answer(200, page("m/a"))
            return
        asked.handler.send_response(200)
        asked.handler.end_headers()
        asked.handler.wfile.write(page("m/a"))
        asked.handler.close_connection = True

    monkeypatch.setattr(listing, "MAX_PAGE_BYTES", len(page("m/a")))
    server.hooks.append(always(long))
    assert sources().list("s3://bucket/m/", ROOT) == ["a"]
    monkeypatch.setattr(listing, "MAX_PAGE_BYTES", len(page("m/a")) - 1)
    with pytest.raises(SourceUnavailableError, match=f"more than {len(page('m/a')) - 1} bytes"):
        sources().list("s3://bucket/m/", ROOT)
    assert retried == ["bad_response"] * 2


def tree(source: S3Source, location: str = "s3://bucket/m/") -> dict[str, tuple[int, str]]:
    listed = source.tree(location, ROOT, lambda name: name != "unwanted")
    return {one.name: (one.size_bytes, one.version) for one in listed}


def test_a_tree_is_listed_page_by_page_without_what_stands_for_directories(
    server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    about = "<Size>7</Size><ETag>&quot;e&quot;</ETag>"
    server.hooks += [
        once(lambda asked: asked.fail(500, "InternalError"), skip=1),
        lists("m/", "m/", "m/a", "m/d/", "m/d/b", after="t", about=about),
        lists("m/", token="t", after="u"),
        lists("m/", "m/d/e/c", "m/unwanted", token="u"),
    ]
    assert tree(sources()) == {"a": (7, "e:7"), "d/b": (7, "e:7"), "d/e/c": (1, "")}
    assert retried == ["server_error"]
    assert not any("delimiter" in query_of(asked) for asked in server.asked)


def test_a_tree_is_asked_for_as_it_is_read(server: ObjectServer, sources: Sources) -> None:
    server.hooks += [lists("m/", "m/a", "m/b", after="t"), lists("m/", "m/c", token="t")]
    listed = sources().tree("s3://bucket/m", ROOT, lambda name: True)
    assert next(listed).name == "a"
    assert len(server.asked) == 1


@pytest.mark.parametrize("about", ["", "<Size/>", "<Size>-1</Size>"])
def test_a_list_that_does_not_say_how_long_objects_are_is_no_tree(
    about: str, server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    server.hooks.append(lists("m/", "m/a", about=about))
    with pytest.raises(SourceUnavailableError, match=r"listing it .*3 times"):
        tree(sources())
    assert retried == ["bad_response"] * 2


def test_below_a_key_where_nothing_is_there_is_no_tree(server: ObjectServer, sources: Sources) -> None:
    server.hooks.append(lists("m/"))
    with pytest.raises(CheckpointNotFoundError, match="s3://bucket/m/: no object lies below it"):
        tree(sources())
    with pytest.raises(CheckpointInvalidError, match="versionId=1 is a version of one object"):
        tree(sources(), "s3://bucket/m?versionId=1")


@pytest.mark.parametrize(("bound", "most"), [("MAX_TREE_NAMES", 3), ("MAX_TREE_PAGES", 2)])
def test_a_tree_that_does_not_end_is_given_up(
    bound: str, most: int, server: ObjectServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.hooks += [
        lists("m/", "m/a", "m/unwanted", after="t"),
        lists("m/", "m/c", "m/d", token="t", after="u"),
        lists("m/", "m/e", token="u"),
    ]
    assert len(tree(sources())) == 4
    monkeypatch.setattr(listing, bound, most)
    with pytest.raises(CheckpointInvalidError, match=r"s3://bucket/m/ holds more than \d+ names"):
        tree(sources())


def assert_a_list_ends_with(source: S3Source, met: threading.Event) -> None:
    """With the daemon, which stops when the server has been `met`."""
    with ThreadPoolExecutor(1) as pool:
        listing = pool.submit(source.list, "s3://bucket/m/", ROOT)
        assert met.wait(60)
        source.stop()
        with pytest.raises(ShuttingDownError):
            listing.result(60)


def test_a_list_that_trickles_ends_with_the_daemon(server: ObjectServer, sources: Sources) -> None:
    met = threading.Event()

    def slowly(asked: Asked) -> None:
        asked.handler.send_response(200)
        met.set()
        trickle_body(asked, b" " * 100_000, "Content-Length")

    server.hooks.append(always(slowly))
    source = sources(timeout_seconds=600.0)
    assert_a_list_ends_with(source, met)


def test_a_list_waits_as_long_as_it_is_told_and_no_longer_than_the_daemon_runs(
    server: ObjectServer, sources: Sources
) -> None:
    met = threading.Event()

    def throttle(asked: Asked) -> None:
        asked.fail(503, "SlowDown", Retry_After="30")
        met.set()

    server.hooks.append(always(throttle))
    source = sources()
    assert_a_list_ends_with(source, met)
    assert len(server.asked) == 1
