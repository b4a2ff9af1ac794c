"""docs/fleet-cache.conf in a real nginx, before the server that counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import fleet_cache, fleet_store
from benchmarks.fleet_cache import Cache
from benchmarks.fleet_formulas import Count
from benchmarks.fleet_store import FleetStore

from .asking import LISTING, OBJECT, ask


@pytest.fixture
def cache(require_tool: Callable[[str], str]) -> Iterator[Cache]:
    require_tool("nginx")
    with Cache() as cache:
        yield cache


def test_a_range_of_a_named_version_is_asked_for_once(store: FleetStore, cache: Cache) -> None:
    etag = ask(store, "HEAD", OBJECT).etag
    store.reset()
    for node in range(3):
        part = ask(store, "GET", OBJECT, cache.url, node, Range="bytes=10-19", If_Match=etag)
        assert (part.status, part.etag, part.body) == (206, etag, bytes(range(10, 20)))
    assert fleet_store.count(store.requests()) == Count(gets=1, body_bytes=10)
    other = ask(store, "GET", OBJECT, cache.url, Range="bytes=20-29", If_Match=etag)
    assert other.body == bytes(range(20, 30))


def test_nodes_that_ask_at_the_same_moment_share_one_request(store: FleetStore, cache: Cache) -> None:
    etag = ask(store, "HEAD", OBJECT).etag
    store.reset()
    together = threading.Barrier(8)
    bodies = []

    def node(number: int) -> None:
        together.wait(60)
        bodies.append(ask(store, "GET", OBJECT, cache.url, number, Range="bytes=0-99", If_Match=etag).body)

    threads = [threading.Thread(target=node, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert bodies == [bytes(range(100))] * 8
    assert fleet_store.count(store.requests()) == Count(gets=1, body_bytes=100)


def test_what_says_which_version_is_current_is_asked_for_each_time(store: FleetStore, cache: Cache) -> None:
    for _ in range(2):
        assert ask(store, "GET", LISTING, cache.url).body.count(b"<Key>") == 2
        head = ask(store, "HEAD", OBJECT, cache.url)
        assert (head.status, head.body) == (200, b"")
        first = ask(store, "GET", OBJECT, cache.url, Range="bytes=0-9")
        assert (first.etag, first.body) == (head.etag, bytes(range(10)))
    assert fleet_store.count(store.requests()) == Count(2, 2, 2, 20)


def test_a_new_version_gets_nothing_of_the_old_one(store: FleetStore, cache: Cache) -> None:
    old = ask(store, "HEAD", OBJECT, cache.url).etag
    ask(store, "GET", OBJECT, cache.url, Range="bytes=0-9", If_Match=old)
    store.publish()
    new = ask(store, "HEAD", OBJECT, cache.url).etag
    assert new != old
    part = ask(store, "GET", OBJECT, cache.url, Range="bytes=0-9", If_Match=new)
    assert (part.status, part.etag) == (206, new)
    refused = ask(store, "GET", OBJECT, cache.url, Range="bytes=50-59", If_Match=old)
    assert (refused.status, refused.body) == (412, b"")


def test_a_refusal_is_passed_on_and_not_kept(store: FleetStore, cache: Cache) -> None:
    etag = ask(store, "HEAD", OBJECT).etag
    store.most_at_once = 0
    assert ask(store, "GET", OBJECT, cache.url, Range="bytes=0-9", If_Match=etag).status == 503
    store.most_at_once = 1
    assert ask(store, "GET", OBJECT, cache.url, Range="bytes=0-9", If_Match=etag).status == 206


def test_the_configuration_is_adapted_to_this_machine(tmp_path: Path) -> None:
    text = fleet_cache.CONFIGURATION.read_text()
    adapted = fleet_cache.adapted(text, port=1234, directory=tmp_path)
    assert "listen 127.0.0.1:1234;" in adapted
    assert f"proxy_cache_path {tmp_path}/cache " in adapted
    assert "proxy_pass http://" in adapted


def test_a_configuration_that_lacks_what_is_adapted_is_an_error(tmp_path: Path) -> None:
    text = fleet_cache.CONFIGURATION.read_text().replace("listen 3128;", "listen 3129;")
    with pytest.raises(ValueError, match="listen 3128"):
        fleet_cache.adapted(text, port=1234, directory=tmp_path)
