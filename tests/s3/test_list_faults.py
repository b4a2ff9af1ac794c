"""What goes wrong with lists of a prefix: it is loaded whole in the end, or the error says what to do."""

from __future__ import annotations

import pytest

from penstock.client import errors

from ..e2e.support import DaemonProcess, random_tensors
from . import faults
from .fault_tables import FINAL, LASTING, TRANSIENT
from .proxy import Answer, Fault, FaultProxy, Match
from .support import RETRIES, Bucket, Tensors, load_and_compare, refused

OF_RANGES = {"the whole object", "another range", "wrong Content-Range", "unreadable Content-Range"}
NOTHING = faults.raw_answer(Answer(200, [], b""))


# A right page, and then what the next request must not take for its answer, more than a read takes along.
PAGE_AND_GARBAGE = faults.short_lists(
    2, faults.trailing_garbage(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" * 500)
)

# A list is shorter than a block, and is cut sooner.
LISTING: dict[str, Fault] = {
    **{name: fault for name, fault in TRANSIENT.items() if name not in OF_RANGES},
    "cut in mid-body": faults.cut(50),
    "reset in mid-body": faults.cut(50, by_reset=True),
    "stalled in mid-body": faults.stall_after(50),
    "short body": faults.short_body(100),
    "bytes after the body": PAGE_AND_GARBAGE,
    "200 and nothing": NOTHING,
    "429": faults.error(429, "TooManyRequests"),
}


@pytest.mark.parametrize("name", LISTING)
def test_a_fault_of_any_page_costs_no_object(
    name: str, daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors: Tensors = {}
    for number in range(3):
        shard = {f"{number}.{key}": tensor for key, tensor in random_tensors(2, 1000, seed=number).items()}
        bucket.put_tensors(f"models/{number}.safetensors", shard)
        tensors |= shard
    first = proxy.on(lists(bucket, later=False), LISTING[name])
    second = proxy.on(lists(bucket, later=True), LISTING[name])
    rest = [
        proxy.on(lists(bucket, later=later), faults.short_lists(2), times=None) for later in (False, True)
    ]
    load_and_compare(daemon, bucket.uri("models/"), tensors)
    assert (len(first.hits), len(second.hits)) == (1, 1)
    again = 0 if name == "bytes after the body" else 1
    assert [len(rule.hits) for rule in rest] == [again, again], "a page that had come was asked for again"


@pytest.mark.parametrize("name", [*(name for name in LASTING if name not in OF_RANGES), "200 and nothing"])
def test_a_fault_of_a_list_that_lasts_fails_the_load_with_a_reason(
    name: str, daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    fault, parts = LASTING.get(name, (NOTHING, ("200",)))
    bucket.put_random("models/one.safetensors")
    rule = proxy.on(lists(bucket), fault, times=None)
    uri = bucket.uri("models/")
    refused(daemon, uri, errors.SourceUnavailableError, uri, "listing", "--object-retries", *parts)
    assert len(rule.hits) == RETRIES


@pytest.mark.parametrize("name", [name for name in FINAL if name != "412"])
def test_what_no_retry_helps_fails_with_the_first_list(
    name: str, daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    fault, kind, parts = FINAL[name]
    bucket.put_random("models/one.safetensors")
    rule = proxy.on(lists(bucket), fault, times=None)
    refused(daemon, bucket.uri("models/"), kind, bucket.uri("models/"), *parts)
    assert len(rule.hits) == 1


def lists(bucket: Bucket, *, later: bool | None = None) -> Match:
    """Requests for a list of it: for the first page, for a later one, or for any."""
    return lambda request: (
        request.bucket == bucket.name
        and request.query.get("list-type") == "2"
        and later in (None, "continuation-token" in request.query)
    )
