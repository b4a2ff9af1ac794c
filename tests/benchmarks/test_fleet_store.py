"""The server that counts what a fleet asks."""

from __future__ import annotations

from benchmarks import fleet_store
from benchmarks.fleet_formulas import Count
from benchmarks.fleet_store import INDEX, LIST, WEIGHTS, FleetStore

from .asking import LISTING, OBJECT, ask


def test_the_store_counts_requests_by_kind_and_bytes_of_objects(store: FleetStore) -> None:
    listed = ask(store, "GET", LISTING)
    assert (listed.status, listed.body.count(b"<Key>")) == (200, 2)
    assert ask(store, "HEAD", f"{OBJECT}.index.json").status == 200
    part = ask(store, "GET", OBJECT, Range="bytes=10-19")
    assert (part.status, part.body) == (206, bytes(range(10, 20)))
    requests = store.requests()
    assert fleet_store.count(requests) == Count(1, 1, 1, 10)
    assert [(request.kind, request.node) for request in requests] == [(LIST, 3), (INDEX, 3), (WEIGHTS, 3)]
    store.reset()
    assert fleet_store.count(store.requests()) == Count()


def test_a_published_version_has_another_etag_and_the_old_one_no_bytes(store: FleetStore) -> None:
    before = ask(store, "HEAD", OBJECT)
    store.publish()
    assert ask(store, "HEAD", OBJECT).etag != before.etag
    part = ask(store, "GET", OBJECT, Range="bytes=0-9", If_Match=before.etag)
    assert (part.status, part.body) == (412, b"")


def test_what_is_too_much_at_once_is_refused_and_not_counted_as_served(store: FleetStore) -> None:
    store.most_at_once = 0
    refusal = ask(store, "GET", OBJECT, Range="bytes=0-9")
    assert refusal.status == 503
    assert b"SlowDown" in refusal.body
    assert ask(store, "HEAD", OBJECT).status == 503
    assert fleet_store.refused(store.requests()) == 2
    assert fleet_store.count(store.requests()) == Count()
