"""What answers mean, by their headers alone."""

from __future__ import annotations

import pytest

from penstock.server.sources.objects.meaning import settled

EARLIER, NOW = "Wed, 21 Oct 2026 07:28:00 GMT", "Wed, 21 Oct 2026 07:28:05 GMT"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, True),
        ({"date": NOW}, True),
        ({"last-modified": EARLIER, "date": NOW}, True),
        ({"last-modified": EARLIER, "date": "Wed, 21 Oct 2026 07:28:04 GMT"}, False),
        ({"last-modified": NOW, "date": EARLIER}, False),
        ({"last-modified": "Thu, 01 Jan 1970 00:16:40 GMT"}, True),
        ({"last-modified": "Thu, 01 Jan 1970 00:16:40 GMT", "date": "now"}, True),
        ({"last-modified": "Fri, 31 Dec 9999 23:59:59 GMT"}, False),
        ({"last-modified": "yesterday", "date": NOW}, False),
        ({"last-modified": "Wed, 21 Oct 99999999999999999999 07:28:00 GMT", "date": NOW}, False),
        ({"last-modified": "Wed, 99 Oct 2026 07:28:00 GMT", "date": NOW}, False),
    ],
)
def test_an_object_is_settled_when_its_last_change_is_some_seconds_old(
    headers: dict[str, str], *, expected: bool
) -> None:
    assert settled(headers) is expected
