"""hf:// URIs: what they name, and who may load it."""

from __future__ import annotations

import pytest

from penstock.server.errors import AccessDeniedError, InvalidRequestError
from penstock.server.sources import Access
from penstock.server.sources.hub.location import admitted, allowed, parse


@pytest.mark.parametrize(
    ("uri", "repository", "revision", "key"),
    [
        ("hf://org/repo", "org/repo", None, ""),
        ("hf://org/repo/", "org/repo", None, ""),
        ("hf://models/org/repo/x", "org/repo", None, "x"),
        ("hf://org/repo@main/a/b.safetensors", "org/repo", "main", "a/b.safetensors"),
        ("hf://org/repo@refs/pr/12", "org/repo", "refs/pr/12", ""),
        ("hf://org/repo@refs/pr/12/x", "org/repo", "refs/pr/12", "x"),
        ("hf://org/repo@refs%2Fconvert%2Fparquet/x", "org/repo", "refs/convert/parquet", "x"),
        ("hf://org/repo@feature%2Fx/y", "org/repo", "feature/x", "y"),
        ("hf://o/r-1.5_b/a b%41#c?d", "o/r-1.5_b", None, "a b%41#c?d"),
        ("hf://org/repo/x@y", "org/repo", None, "x@y"),
    ],
)
def test_a_uri_names_a_repository_a_revision_and_a_path(
    uri: str, repository: str, revision: str | None, key: str
) -> None:
    location = parse(uri)
    assert (location.repository, location.revision, location.key) == (repository, revision, key)
    assert parse(location.uri) == location


@pytest.mark.parametrize(
    "uri",
    [
        "hf://",
        "hf://org",
        "hf:///repo",
        "hf://org/",
        "hf://../repo",
        "hf://org/..",
        "hf://org/a--b",
        "hf://org/.repo",
        "hf://org/repo.",
        "hf://org/re po",
        "hf://o%72g/repo",
        "hf://datasets/org/repo",
        "hf://spaces/org/repo",
        "hf://org/repo@",
        "hf://org/repo@/x",
        "hf://org/repo@a..b/x",
        "hf://org/repo@%2E%2E%2Fx/y",
        "hf://org/repo@a b",
        "hf://org/repo/\0",
        "hf://org/repo/\udcff",
        "hf://org/repo/" + "x" * 5000,
        "hf://user:secret@host/repo",
    ],
)
def test_what_names_none_is_refused(uri: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse(uri)


@pytest.mark.parametrize(
    ("prefix", "holds", "holds_not"),
    [
        ("hf://", ["hf://org/repo", "hf://x/y@z/a"], []),
        ("hf://org", ["hf://org/repo", "hf://org/repo@v1/x"], ["hf://organisation/repo", "hf://x/org"]),
        ("hf://org/repo", ["hf://org/repo", "hf://org/repo@v1/x"], ["hf://org/repository", "hf://org/rep"]),
        ("hf://models/org/repo/", ["hf://org/repo/x"], ["hf://org/other"]),
        ("hf://org/repo@v1", ["hf://org/repo@v1", "hf://org/repo@v1/x"], ["hf://org/repo", "hf://org/repo@v10"]),
        ("hf://org/repo/sub", ["hf://org/repo/sub", "hf://org/repo@v1/sub/x"], ["hf://org/repo/subway", "hf://org/repo"]),
    ],
)  # fmt: skip
def test_a_prefix_holds_what_it_names_and_what_lies_below(
    prefix: str, holds: list[str], holds_not: list[str]
) -> None:
    access = Access(uid=1000, privileged=False, prefixes=("/", "s3://org", allowed(prefix)))
    for uri in holds:
        assert admitted(parse(uri), access).uri == parse(uri).uri
    for uri in [*holds_not, "hf://other/repo/../x"]:
        with pytest.raises(AccessDeniedError, match="uid 1000 may not load"):
            admitted(parse(uri), access)


@pytest.mark.parametrize("prefix", ["hf://-", "hf://a b", "hf://datasets/x/y", "hf://org/repo@", "hf://o/.r"])
def test_a_prefix_that_names_nothing_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"write|name"):
        allowed(prefix)
