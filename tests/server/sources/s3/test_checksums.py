"""What S3 says of an object's whole content, and how it is asked."""

from __future__ import annotations

import pytest

from penstock.server.sources.checksums import CRC32C, CRC64NVME, Checksum
from penstock.server.sources.s3.answers import whole_checksums

from ...objects import Asked, ObjectServer
from ...support import ROOT
from ..hooks import Sources

CRC64, CRC32 = "AQIDBAUGBwg=", "AQIDBA=="
WHOLE = Checksum(CRC64NVME, "0102030405060708")


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"crc64nvme": CRC64, "type": "FULL_OBJECT"}, (WHOLE,)),
        ({"crc64nvme": CRC64}, (WHOLE,)),
        ({"crc32c": CRC32, "type": "FULL_OBJECT"}, (Checksum(CRC32C, "01020304"),)),
        ({"crc64nvme": CRC64, "crc32c": CRC32, "type": "full_object"}, (WHOLE, Checksum(CRC32C, "01020304"))),
        ({"crc32c": CRC32}, ()),
        ({"crc32c": CRC32, "type": "COMPOSITE"}, ()),
        ({"crc32c": f"{CRC32}-3", "type": "FULL_OBJECT"}, ()),
        ({"crc64nvme": CRC64, "type": "COMPOSITE"}, ()),
        ({"crc64nvme": CRC32}, ()),
        ({"sha256": "A" * 43 + "=", "type": "FULL_OBJECT"}, ()),
        ({}, ()),
    ],
)
def test_only_checksums_of_the_full_object_count(
    headers: dict[str, str], found: tuple[Checksum, ...]
) -> None:
    assert whole_checksums({f"x-amz-checksum-{name}": value for name, value in headers.items()}) == found


def says_checksum(asked: Asked) -> bool:
    if asked.method != "HEAD":
        return False
    assert asked.headers["x-amz-checksum-mode"] == "ENABLED"
    asked.answer(200, bytes(9), ETag='"v1"', x_amz_checksum_crc64nvme=CRC64)
    return True


def test_a_checksum_of_the_version_that_was_found_counts(server: ObjectServer, sources: Sources) -> None:
    server.put("k", bytes(9), etag='"v1"')
    server.hooks.append(says_checksum)
    source = sources(checksums=True)
    for _ in range(2):  # known the second time
        assert source.open("s3://bucket/k", ROOT).checksums == (WHOLE,)
    assert server.asked[1].headers["if-match"] == '"v1"'


def test_a_checksum_of_another_version_does_not_count(server: ObjectServer, sources: Sources) -> None:
    server.put("k", bytes(9), etag='"v2"')
    server.hooks.append(says_checksum)
    assert not sources(checksums=True).open("s3://bucket/k", ROOT).checksums


def test_a_daemon_that_does_not_verify_asks_for_no_checksum(server: ObjectServer, sources: Sources) -> None:
    server.put("k", bytes(9), etag='"v1"')
    source = sources(checksums=False)
    for _ in range(2):
        source.open("s3://bucket/k", ROOT)
    assert [asked.method for asked in server.asked] == ["GET", "HEAD"]
    assert all("x-amz-checksum-mode" not in asked.headers for asked in server.asked)
