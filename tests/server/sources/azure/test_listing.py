"""What lists of Azure say, and what hostile ones cannot do."""

from __future__ import annotations

import pytest

from penstock.server.sources.azure import listing
from penstock.server.sources.azure.listing import parse_page
from penstock.server.sources.objects import markup
from penstock.server.sources.objects.faults import Transient
from penstock.server.sources.objects.service import Entry, Page

HEAD = '<?xml version="1.0" encoding="utf-8"?>'


def page(*blobs: str, marker: str = "") -> bytes:
    inside = "".join(blobs)
    return (
        f'{HEAD}<EnumerationResults ContainerName="c"><Prefix>p/</Prefix><Blobs>{inside}</Blobs>'
        f"<NextMarker>{marker}</NextMarker></EnumerationResults>"
    ).encode()


def blob(name: str, *, size: str = "3", etag: str = "0x8D", more: str = "", attribute: str = "") -> str:
    return (
        f"<Blob><Name{attribute}>{name}</Name><Properties><Etag>{etag}</Etag>"
        f"<Content-Length>{size}</Content-Length>{more}</Properties><Metadata/></Blob>"
    )


def test_a_list_gives_names_sizes_versions_and_where_it_goes_on() -> None:
    body = page(blob("p/a &amp; b"), blob("p/ c ", size="0", etag='"0x9"'), marker="2!92!x")
    assert parse_page(body) == Page([Entry("p/a & b", 3, "0x8D"), Entry("p/ c ", 0, "0x9")], "2!92!x")


def test_the_mark_that_azure_begins_its_lists_with_is_no_part_of_them() -> None:
    assert parse_page(b"\xef\xbb\xbf" + page(blob("p/\u00e9"))).entries[0].key == "p/\u00e9"


def test_names_that_xml_cannot_hold_are_encoded() -> None:
    body = page(blob("p/%EF%BF%BE%25", attribute=' Encoded="true"'), blob("p/%25"))
    assert [entry.key for entry in parse_page(body).entries] == ["p/\ufffe%", "p/%25"]


@pytest.mark.parametrize(
    "more",
    [
        "<ResourceType>directory</ResourceType>",
        "</Properties><Metadata><hdi_isfolder>true</hdi_isfolder></Metadata><Properties>",
    ],
)
def test_directories_are_left_out(more: str) -> None:
    assert [entry.key for entry in parse_page(page(blob("p/d", more=more), blob("p/a"))).entries] == ["p/a"]


def test_prefixes_are_no_blobs() -> None:
    body = page("<BlobPrefix><Name>p/d/</Name></BlobPrefix>", blob("p/a"))
    assert [entry.key for entry in parse_page(body).entries] == ["p/a"]


@pytest.mark.parametrize("size", ["", "-1", "x", "\u0663", "1" * 30])
def test_a_size_that_is_none_is_not_believed(size: str) -> None:
    assert parse_page(page(blob("p/a", size=size))).entries[0].size_bytes is None


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<",
        b"not XML",
        b"{}",
        b"<Other/>",
        b"\xff\xfe\x00",
        page(blob("p/a"))[:-5],
        page("<Blob><Properties/></Blob>"),
        page(blob("p/%FF", attribute=' Encoded="true"')),
        page(blob("p/a")).decode().replace("utf-8", "utf-16").encode("utf-16"),
        page("<x " + " ".join(f'a{number}=""' for number in range(20_000)) + "/>"),
        f'{HEAD}<!DOCTYPE x [<!ENTITY l0 "ha">{LAUGHS}]><EnumerationResults>&l9;'.encode(),
        f'{HEAD}<!DOCTYPE x SYSTEM "file:///etc/passwd"><EnumerationResults/>'.encode(),
        page(blob("p/" + "x" * (listing.MAX_TEXT_CHARACTERS + 1))),
        page("<x>" * 100_000),
        page("<x/>" * (markup.MAX_ELEMENTS + 1)),
    ],
    ids=lambda body: body[:30],
)
def test_what_is_no_list_is_asked_for_again(body: bytes) -> None:
    with pytest.raises(Transient, match="not the list that was asked for"):
        parse_page(body)
