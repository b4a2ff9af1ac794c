"""Every way in which storage fails, on cue: the bytes are right in the end, or the error says what to do."""

from __future__ import annotations

import pytest

from penstock.client import errors

from ..e2e.support import DaemonProcess
from . import faults
from .fault_tables import FINAL, HALF, LASTING, TRANSIENT
from .proxy import Answer, Exchange, FaultProxy, Request, asks
from .support import BLOCK_BYTES, MIB, RETRIES, Bucket, load_and_compare, refused

KEY = "models/one.safetensors"


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_fault_in_mid_load_costs_no_byte(
    name: str, daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY)
    rule = proxy.on(asks("GET", bucket=bucket.name, beyond=BLOCK_BYTES), TRANSIENT[name], skip=3, times=2)
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    assert len(rule.hits) == 2


@pytest.mark.parametrize("name", [name for name in TRANSIENT if name != "another range"])
def test_a_fault_of_the_first_request_costs_no_byte(
    name: str, daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY)
    rule = proxy.on(asks(bucket=bucket.name), TRANSIENT[name])
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    assert len(rule.hits) == 1


@pytest.mark.parametrize("seed", range(4))
def test_connections_cut_at_random_bytes_cost_no_byte(
    seed: int, daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY)
    rule = proxy.on(asks("GET", bucket=bucket.name), faults.cut_at_random(seed), times=None)
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    assert len(rule.hits) > 2 * MIB // BLOCK_BYTES


@pytest.mark.parametrize("name", ["cut in mid-body", "stalled in mid-body"])
def test_reading_goes_on_from_the_byte_reached(
    name: str, daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY)

    def asks_for_a_block(request: Request) -> bool:
        """A whole one, beyond what the first request asks for."""
        first, last = request.range or (0, 0)
        return first > MIB // 2 and last - first + 1 == BLOCK_BYTES

    rule = proxy.on(asks_for_a_block, TRANSIENT[name])
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    assert rule.hits[0].range is not None
    first, last = rule.hits[0].range
    again = [request.range for request in proxy.requests() if request.range and request.range[1] == last]
    assert again == [(first, last), (first + HALF, last)]


def test_a_connection_that_sent_what_nobody_asked_for_is_used_no_more(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    """Or its rest would be taken for the next answer."""
    tensors = bucket.put_random(KEY)
    rule = proxy.on(asks("GET", bucket=bucket.name, beyond=BLOCK_BYTES), faults.long_body(b"x" * 1000))
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    requests = proxy.requests()
    later = requests[requests.index(rule.hits[0]) + 1 :]
    assert rule.hits[0].connection not in {request.connection for request in later}


@pytest.mark.parametrize("where", ["first request", "mid-load"])
@pytest.mark.parametrize("name", LASTING)
def test_a_fault_that_lasts_fails_the_load_with_a_reason(
    name: str, where: str, daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    fault, parts = LASTING[name]
    tensors = bucket.put_random(KEY)
    beyond = BLOCK_BYTES if where == "mid-load" else None
    rule = proxy.on(asks(bucket=bucket.name, beyond=beyond), fault, times=None)
    refused(daemon, bucket.uri(KEY), errors.SourceUnavailableError, bucket.name, KEY, *parts)
    if where == "first request":
        # A connection that was kept and turns out to be closed costs no attempt.
        assert RETRIES <= len(rule.hits) <= 2 * RETRIES
    # And nothing of it is left.
    proxy.reset()
    load_and_compare(daemon, bucket.uri(KEY), tensors)


@pytest.mark.parametrize("name", FINAL)
def test_what_no_retry_helps_fails_at_once(
    name: str, daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    fault, kind, parts = FINAL[name]
    bucket.put_random(KEY)
    rule = proxy.on(asks("GET", bucket=bucket.name, beyond=BLOCK_BYTES), fault, times=None)
    refused(daemon, bucket.uri(KEY), kind, bucket.name, KEY, *parts)
    asked = [request.range for request in rule.hits]
    assert len(set(asked)) == len(asked), "a range was asked for again"


@pytest.mark.parametrize("name", [name for name in FINAL if name != "412"])
def test_what_no_retry_helps_fails_with_the_first_request(
    name: str, daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    fault, kind, parts = FINAL[name]
    bucket.put_random(KEY)
    rule = proxy.on(asks(bucket=bucket.name), fault, times=None)
    refused(daemon, bucket.uri(KEY), kind, bucket.name, KEY, *parts)
    assert len(rule.hits) == 1


def test_an_error_page_of_any_size_is_not_kept(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    """Nor is what it says told to anybody."""
    # The first of a daemon imports boto3.
    load_and_compare(daemon, bucket.uri("first.safetensors"), bucket.put_random("first.safetensors"))
    bucket.put_random(KEY)
    page = Answer(403, [("Content-Type", "text/html")], b"<h1>" + b"inner-network-name " * (MIB // 2))
    proxy.on(asks(bucket=bucket.name), faults.raw_answer(page), times=None)
    before = daemon.memory_kib("RssAnon")
    message = refused(daemon, bucket.uri(KEY), errors.AccessDeniedError, bucket.name, KEY, "403")
    assert "inner-network-name" not in message
    assert daemon.memory_kib("RssAnon") - before < 8 * MIB / 1024


def test_an_object_that_is_replaced_in_mid_load_fails_it(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    old = bucket.put_random(KEY, mib=8)

    def replace(exchange: Exchange) -> None:
        bucket.put_random(KEY, mib=8, seed=1)
        exchange.pass_on()

    proxy.on(asks("GET", bucket=bucket.name, beyond=5 * MIB), replace)
    found = {}

    def load() -> None:
        with daemon.client() as client:
            for name, tensor in client.load(bucket.uri(KEY), memory_limit=4 * MIB):
                found[name] = tensor.clone()

    with pytest.raises(errors.CheckpointChangedError) as caught:
        load()
    assert KEY in str(caught.value)
    assert len(found) < len(old)
    for name, tensor in found.items():
        assert tensor.equal(old[name]), f"{name} is not of the version that the load began with"
    load_and_compare(daemon, bucket.uri(KEY), bucket.put_random(KEY, seed=2))


def test_an_object_that_is_deleted_in_mid_load_fails_it(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    bucket.put_random(KEY)

    def delete(exchange: Exchange) -> None:
        bucket.delete(KEY)
        exchange.pass_on()

    proxy.on(asks("GET", bucket=bucket.name, beyond=BLOCK_BYTES), delete)
    with daemon.client() as client, pytest.raises(errors.PenstockError) as caught:
        client.load_state_dict(bucket.uri(KEY))
    assert caught.value.reason in ("CHECKPOINT_CHANGED", "CHECKPOINT_NOT_FOUND")
    assert KEY in str(caught.value)
