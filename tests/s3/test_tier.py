"""The tier behind a real daemon and an S3 server: what is loaded once comes from the disk the next time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ..e2e.conftest import StartDaemon
from ..e2e.support import DaemonProcess, wait_until
from . import faults
from .proxy import FaultProxy, asks
from .support import FLAGS, MIB, Bucket, environment, load_and_compare

KEY = "models/one.safetensors"
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
    load_and_compare(second, bucket.uri(KEY), tensors)
    assert [request.method for request in proxy.requests()] == ["HEAD"]
    assert metric(second, "tier_read_bytes_total") > 8 * MIB
