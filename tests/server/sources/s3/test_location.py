"""`s3://` URIs: keys are literal, and prefixes allow at a slash."""

from __future__ import annotations

import pytest

from penstock.server.errors import AccessDeniedError, InvalidRequestError
from penstock.server.sources import Access
from penstock.server.sources.objects.keys import check_access
from penstock.server.sources.s3.location import Location, parse


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("s3://bucket", Location("bucket", "")),
        ("s3://bucket/", Location("bucket", "")),
        ("s3://bucket/a/b.safetensors", Location("bucket", "a/b.safetensors")),
        ("s3://bucket//a//b/", Location("bucket", "/a//b/")),
        ("s3://bucket/a/../b", Location("bucket", "a/../b")),
        ("s3://bucket/a%20b+c#d?e=f&é ~", Location("bucket", "a%20b+c#d?e=f&é ~")),
        ("s3://bucket/k?versionId=a.B_1-~", Location("bucket", "k", "a.B_1-~")),
        ("s3://bucket/a?versionId=x?versionId=y", Location("bucket", "a?versionId=x", "y")),
    ],
)
def test_a_key_is_taken_literally(uri: str, location: Location) -> None:
    assert parse(uri) == location
    assert parse(parse(uri).uri) == location


@pytest.mark.parametrize(
    "uri",
    [
        "s3:/bucket/key",
        "s3://",
        "s3:///key",
        "s3://user@host/key",
        "s3://bucket:80/key",
        "s3://../key",
        "s3://bucket/k?versionId=",
        "s3://bucket/?versionId=v",
        "s3://bucket/k?versionId=a&X-Amz-Expires=1",
        "s3://bucket/k?versionId=a/b",
        "s3://bucket/nul\0",
        "s3://bucket/\udcff",
        f"s3://bucket/{'é' * 513}",
    ],
)
def test_what_names_no_object_is_refused(uri: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^sources: ") as caught:
        parse(uri)
    caught.value.message.encode()


def allowed(uri: str, *prefixes: str) -> bool:
    try:
        check_access(parse(uri), Access(uid=1000, privileged=False, prefixes=prefixes))
    except AccessDeniedError:
        return False
    return True


@pytest.mark.parametrize("prefix", ["s3://bucket/models", "s3://bucket/models/"])
def test_a_prefix_allows_itself_and_what_is_below_it(prefix: str) -> None:
    for key in ("models", "models/", "models/a", "models//a", "models/a/b?x#y%2e"):
        assert allowed(f"s3://bucket/{key}", prefix)
    for uri in (
        "s3://bucket/models-secret/a",
        "s3://bucket/model",
        "s3://bucket/",
        "s3://bucket//models/a",
        "s3://bucket/MODELS/a",
        "s3://bucket2/models/a",
        "s3://bucket/models%2Fa",
        "s3://bucket/models/../secret",
        "s3://bucket/models/./a",
        "s3://bucket/models/..",
    ):
        assert not allowed(uri, prefix)


def test_a_bucket_allows_all_of_it_and_a_path_nothing() -> None:
    for prefix in ("s3://bucket", "s3://bucket/"):
        assert allowed("s3://bucket/any/key", prefix)
        assert not allowed("s3://bucket-2/any/key", prefix)
    assert not allowed("s3://bucket/any/key", "/", "/bucket")
    assert not allowed("s3://bucket/any/key")


def test_a_privileged_caller_may_name_any_key() -> None:
    check_access(parse("s3://bucket/a/../b"), Access(uid=0, privileged=True, prefixes=()))
