"""The tier behind a real daemon and an S3 server: what is loaded once comes from the disk the next time."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.client import errors
from penstock.client.cli.status_text import show
from penstock.server.sources.file.local_file import FileContext
from penstock.server.sources.file.mounts import MountTable
from penstock.server.sources.file.source import FileSource
from penstock.server.tier.source import TieredFile, TieredSource

from ..e2e.conftest import StartDaemon
from ..e2e.support import DaemonProcess, random_tensors, same, wait_until, write_checkpoint
from ..server.support import ROOT
from ..server.tier.bench import tier_in
from . import faults
from .proxy import FaultProxy, asks
from .support import FLAGS, MIB, Bucket, assert_no_secret, environment, load_and_compare, refused
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


def metric(daemon: DaemonProcess, name: str, **labels: str) -> float:
    code, body = daemon.http("/metrics")
    assert code == 200
    return next(
        sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
        if sample.name == f"penstock_{name}" and sample.labels == labels
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
    wait_until(lambda: metric(daemon, "tier_versions") == 1, "the metrics to tell of the file")


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


def test_a_store_that_cannot_be_asked_is_answered_for_by_the_disk_and_everybody_is_told(
    start: Start, proxy: FaultProxy, bucket: Bucket
) -> None:
    """A directory of two shards, after the daemon was killed; then again without `--tier-stale`."""
    tensors = {}
    for name in ("a", "b"):
        shard = random_tensors(16, MIB // 16, seed=ord(name))
        part = {f"{name}.{key}": value for key, value in shard.items()}
        bucket.put_tensors(f"models/{name}.safetensors", part)
        tensors.update(part)
    source = bucket.uri("models/")
    first = start("--tier-stale", "3600")
    load_and_compare(first, source, tensors)
    wait_written(first, 8 * MIB)
    first.kill()
    proxy.on(asks(bucket=bucket.name), faults.reset, times=None)
    second = start("--tier-stale", "3600")
    with second.client() as client:
        with pytest.warns(errors.CheckpointWarning, match="its store cannot be asked"):
            load = client.load(source)
        with load:
            same(load, tensors)
    assert load.stats.stale_seconds is not None
    assert 0 <= load.stats.stale_seconds < 3600
    assert load.stats.tier_bytes == load.stats.read_bytes == 8 * MIB
    assert metric(second, "tier_stale_loads_total") == 1
    assert second.http_status()["tier"]["stale_loads"] == 1
    assert "1 loads of stores that could not be asked" in show(second.status())
    assert f"{source}: its store cannot be asked; this is the version that it had" in second.log()
    assert_no_secret(second.log())
    second.kill()
    refused(start(), source, errors.SourceUnavailableError, "failed 3 times in a row")


def test_status_and_metrics_say_where_delivered_bytes_came_from(
    start: Start, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY, mib=4)
    first = start()
    for _ in range(2):
        load_and_compare(first, bucket.uri(KEY), tensors)
    wait_written(first, 4 * MIB)
    came = origins(first)
    assert came["memory"] == came["tier"] + came["storage"] == 4 * MIB
    # What was read with the header may have been kept by the time the first segment was read.
    assert came["tier"] <= HEADER_BYTES
    first.kill()
    second = start()
    load_and_compare(second, bucket.uri(KEY), tensors)
    assert origins(second) == {"memory": 0, "tier": 4 * MIB, "storage": 0}
    shown = show(second.status())
    assert "4.19 MB delivered (4.19 MB from local disk)" in shown
    assert "from_tier=4194304" in second.log()
    history = second.http_status()["throughput"]
    wait_until(
        lambda: sum(second.http_status()["throughput"]["tier_bytes"]) == 4 * MIB, "the interval to end"
    )
    assert len(history["memory_bytes"]) == len(history["tier_bytes"]) == len(history["read_bytes"])


def origins(daemon: DaemonProcess) -> dict[str, float]:
    """By metrics, which have to agree with status."""
    counted = {
        origin: metric(daemon, "delivered_from_bytes_total", origin=origin)
        for origin in ("memory", "tier", "storage")
    }
    totals = daemon.status()["totals"]
    assert (counted["memory"], counted["tier"]) == (totals["memory_bytes"], totals["tier_bytes"])
    assert sum(counted.values()) == totals["delivered_bytes"]
    return counted


def test_files_of_a_prefix_come_from_the_disk_after_a_restart(
    start: Start, proxy: FaultProxy, tmp_path: Path
) -> None:
    tensors = random_tensors(16, MIB // 16)
    (tmp_path / "files").mkdir()
    path = write_checkpoint(tmp_path / "files/one.safetensors", tensors)
    flags = ("--tier-files", str(path.parent))
    first = start(*flags)

    def written() -> bool:
        """Once the file is some seconds old."""
        load_and_compare(first, str(path), tensors)
        with first.client() as client:
            client.evict()
        return metric(first, "tier_written_bytes_total") >= 4 * MIB

    wait_until(written, "the file to be kept")
    first.kill()
    second = start(*flags)
    with second.client() as client, client.load(str(path)) as load:
        same(load, tensors)
    assert load.stats.tier_bytes == load.stats.read_bytes == 4 * MIB


def test_damage_that_was_kept_of_a_local_file_is_not_given_again(
    start: Start, proxy: FaultProxy, tmp_path: Path
) -> None:
    """As if the file's server had once sent it damaged."""
    tensors = random_tensors(16, MIB // 16)
    (tmp_path / "files").mkdir()
    path = write_checkpoint(tmp_path / "files/one.safetensors", tensors)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    mounts = MountTable()
    with (
        contextlib.closing(mounts),
        ThreadPoolExecutor(1) as threads,
        tier_in(tmp_path / "tier", 64 * MIB) as tier,
    ):
        source = FileSource(lambda path, uid: threads, FileContext(mounts, settled_seconds=0))
        file = TieredSource(source, tier).open(str(path), ROOT)
        assert isinstance(file, TieredFile)
        file.keep_bytes(0, [memoryview(damaged)])
        wait_until(lambda: file.has(0, file.size_bytes), "the damage to be kept")
        file.close()
    daemon = start("--tier-files", str(path.parent))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    corrupt(daemon, str(path), digests=digests)
    with daemon.client() as client, client.load(str(path), digests=digests) as load:
        same(load, tensors)
    assert load.stats.verified_bytes == 4 * MIB


def test_evicting_a_checkpoint_that_is_being_written_leaves_its_memory_free(
    start: Start, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY, mib=16)
    daemon = start()
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    wait_until(lambda: not daemon.leased_bytes(), "the load to let go")
    with daemon.client() as client:
        client.evict()
    wait_until(lambda: daemon.status()["staging"]["free_bytes"] == 64 * MIB, "all memory to be free")
