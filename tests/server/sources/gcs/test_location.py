"""gs:// URIs, taken as they are written."""

from __future__ import annotations

import pytest

from penstock.server.errors import AccessDeniedError, InvalidRequestError
from penstock.server.sources import Access
from penstock.server.sources.gcs.location import Location, parse
from penstock.server.sources.objects.keys import check_access


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("gs://b/a/b.safetensors", Location("b", "a/b.safetensors")),
        ("gs://my_bucket.example.com/", Location("my_bucket.example.com", "")),
        ("gs://b", Location("b", "")),
        ("gs://b/%41+ ?#x", Location("b", "%41+ ?#x")),
        ("gs://b/k#1700000000000001", Location("b", "k", "1700000000000001")),
        ("gs://b/a#1#2", Location("b", "a#1", "2")),
        ("gs://b/#1", Location("b", "#1")),
        ("gs://b/k#12345678901234567890", Location("b", "k#12345678901234567890")),
        ("gs://b/k#\u0661", Location("b", "k#\u0661")),
    ],
)
def test_a_uri_is_a_bucket_a_key_and_perhaps_a_generation(uri: str, location: Location) -> None:
    assert parse(uri) == location
    assert parse(location.uri) == location


@pytest.mark.parametrize(
    "uri", ["gs:///k", "gs://", "gs://B/k", "gs://b?/k", "GS://b/k", "gs://-b/k", "s3://b/k"]
)
def test_what_names_no_bucket_is_refused(uri: str) -> None:
    with pytest.raises(InvalidRequestError, match="gs://bucket/key"):
        parse(uri)


@pytest.mark.parametrize(
    ("prefix", "allowed"),
    [
        ("gs://b", True),
        ("gs://b/", True),
        ("gs://b/m", True),
        ("gs://b/m/", True),
        ("gs://b/m/k", True),
        ("gs://b/m/k/x", False),
        ("gs://b/m/kk", False),
        ("gs://b/mm", False),
        ("gs://bb", False),
        ("gs://", False),
        ("s3://b", False),
        ("/b/m", False),
    ],
)
def test_a_prefix_allows_what_lies_below_it(prefix: str, allowed: bool) -> None:
    access = Access(1000, privileged=False, prefixes=(prefix,))
    for uri in ("gs://b/m/k", "gs://b/m/k#1"):
        if allowed:
            check_access(parse(uri), access)
        else:
            with pytest.raises(AccessDeniedError, match="uid 1000 may not load"):
                check_access(parse(uri), access)


@pytest.mark.parametrize("key", ["m/../k", "m/./k", "..", "m\\..\\k", "m/..\\k"])
def test_keys_with_dots_between_slashes_are_for_the_privileged(key: str) -> None:
    with pytest.raises(AccessDeniedError, match=r"has a '\.' or"):
        check_access(parse(f"gs://b/{key}"), Access(1000, privileged=False, prefixes=("gs://b",)))
