"""On which threads the sources of a request are resolved."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from penstock.server.errors import InvalidRequestError
from penstock.server.sources.file.store import FileStore
from penstock.server.sources.resolvers import MOST_PLACED, Resolvers
from penstock.server.sources.s3.store import S3Store

from ..support import configuration_of

USER = 4242


@pytest.fixture
def resolvers() -> Iterator[Resolvers]:
    stores = {store.kind: store(configuration_of()) for store in (FileStore, S3Store)}
    resolvers = Resolvers(stores)
    yield resolvers
    resolvers.shutdown()
    for store in stores.values():
        store.stop()
        store.shutdown()


def thread_of(resolvers: Resolvers, sources: list[str]) -> str:
    """The name of the threads, without the number of the one."""
    named = resolvers.of(sources, USER).submit(lambda: threading.current_thread().name).result(60)
    return named.rpartition("-")[0]


@pytest.mark.parametrize(
    ("sources", "threads"),
    [
        (["/proc/1", "/proc/self"], "resolver:/proc"),
        (["/proc/1", "file:///proc/2"], "resolver:/proc"),
        (["s3://a/b", "s3://c/d"], "s3-resolver"),
        (["/proc/1", "/no/such/mount"], "mixed-resolver"),
        (["/proc/1", "s3://a/b"], "mixed-resolver"),
        (["/proc/1"] * MOST_PLACED, "resolver:/proc"),
        (["/proc/1"] * (MOST_PLACED + 1), "mixed-resolver"),
    ],
)
def test_sources_of_one_place_are_resolved_on_its_threads_and_others_apart(
    resolvers: Resolvers, sources: list[str], threads: str
) -> None:
    assert thread_of(resolvers, sources) == threads


@pytest.mark.parametrize("source", ["relative", "ftp://a/b"])
def test_what_is_no_source_is_refused_before_a_thread_is_asked(resolvers: Resolvers, source: str) -> None:
    with pytest.raises(InvalidRequestError):
        resolvers.of([source], USER)
