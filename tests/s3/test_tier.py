"""The tier behind a real daemon and an S3 server: what is loaded once comes from the disk the next time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.client import errors
from penstock.client.cli.status_text import show

from ..e2e.conftest import StartDaemon
from ..e2e.support import DaemonProcess, same, wait_until
from . import faults
from .proxy import FaultProxy, asks
from .support import FLAGS, MIB, Bucket, environment, load_and_compare, refused
from .test_verified import Stored, corrupt

KEY = "models/one.safetensors"
HEADER_BYTES = 256 << 10
"""What the first read of a file asks for."""
Start = Callable[..., DaemonProcess]


@pytest.fixture
def start(start_daemon: StartDaemon, proxy: FaultProxy, tmp_path: Path) -> Start:
    """Daemons with one tier of 64 MiB, one after the other."""

    def start(*flags: str) -> DaemonProcess:
        tier = ("--tier-dir", str(tmp_path / "tier"), "--tier-limit", "64MiB")
        return start_daemon(*FLAGS, *tier, *flags, environment=environment(proxy.endpoint))

    return start


def metric(daemon: DaemonProcess, name: str) -> float:
    code, body = daemon.http("/metrics")
    assert code == 200
    return next(
        sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
        if sample.name == f"penstock_{name}"
    )


def wait_written(daemon: DaemonProcess, size_bytes: int) -> None:
    """Until the tier has written so many bytes, headers included."""
    wait_until(
        lambda: metric(daemon, "tier_written_bytes_total") >= size_bytes, f"{size_bytes} bytes in the tier"
    )


def test_after_a_crash_a_load_comes_from_the_disk_and_asks_the_store_for_versions_only(
    start: Start, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY, mib=8)
    first = start()
    load_and_compare(first, bucket.uri(KEY), tensors)
    wait_written(first, 8 * MIB)
    first.kill()
    proxy.reset()
    proxy.on(asks("GET", bucket=bucket.name, key=KEY), faults.stall, times=None)
    second = start()
    with second.client() as client, client.load(bucket.uri(KEY)) as load:
        same(load, tensors)
    assert (load.stats.read_bytes, load.stats.tier_bytes) == (8 * MIB, 8 * MIB)
    assert [request.method for request in proxy.requests()] == ["HEAD"]
    assert metric(second, "tier_read_bytes_total") > 8 * MIB  # the header too
    tier = second.http_status()["tier"]
    assert tier["read_bytes"] > 8 * MIB
    assert tier["used_bytes"] <= tier["limit_bytes"] == 64 * MIB
    assert " 1 files; " in show(second.status())


def test_a_window_keeps_what_passes_through_it_and_the_rest_another_time(
    start: Start, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY, mib=24)
    daemon = start("--memory-limit", "8MiB")
    for _ in range(10):
        with daemon.client() as client, client.load(bucket.uri(KEY)) as load:
            same(load, tensors)
        daemon.wait_idle()
        if load.stats.tier_bytes == 24 * MIB:
            break
    assert load.stats.tier_bytes == 24 * MIB
    assert metric(daemon, "tier_versions") == 1


def test_a_new_version_has_nothing_of_the_old_one(start: Start, proxy: FaultProxy, bucket: Bucket) -> None:
    old = bucket.put_random(KEY, mib=2)
    daemon = start()
    load_and_compare(daemon, bucket.uri(KEY), old)
    wait_written(daemon, 2 * MIB)
    new = bucket.put_random(KEY, mib=2, seed=7)
    with daemon.client() as client, client.load(bucket.uri(KEY)) as load:
        same(load, new)
    # What this load itself read with the header may have been kept by the time its segments were read.
    assert load.stats.tier_bytes <= HEADER_BYTES


@pytest.mark.parametrize("where", ["header", "first segment"])
def test_damage_that_was_kept_before_it_was_found_is_not_given_again(
    where: str, start: Start, proxy: FaultProxy, bucket: Bucket
) -> None:
    """From a window segments are kept as they come, and the file is compared at its end."""
    one = Stored(bucket, proxy, mib=8)
    daemon = start()
    one.says()
    one.flips(one.body.index(b"layer") if where == "header" else one.data_start + 5)
    corrupt(daemon, one.uri, memory_limit=0)
    wait_written(daemon, 1)
    one.is_intact()
    with daemon.client() as client, client.load(one.uri, memory_limit=0) as load:
        same(load, one.tensors)
    assert load.stats.verified_bytes == 8 * MIB


def test_who_may_not_load_from_the_store_gets_nothing_from_the_disk(
    start: Start, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY, mib=1)
    first = start()
    load_and_compare(first, bucket.uri(KEY), tensors)
    wait_written(first, MIB)
    first.kill()
    proxy.on(asks(bucket=bucket.name, key=KEY), faults.error(403, "AccessDenied"), times=None)
    refused(start(), bucket.uri(KEY), errors.AccessDeniedError, KEY)


def test_evicting_a_checkpoint_that_is_being_written_leaves_its_memory_free(
    start: Start, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY, mib=16)
    daemon = start()
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    with daemon.client() as client:
        client.evict()
    wait_until(lambda: daemon.status()["staging"]["free_bytes"] == 64 * MIB, "all memory to be free")
