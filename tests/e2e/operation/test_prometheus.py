"""A real Prometheus scrapes a daemon under load; what it says then is what the loads really were."""

from __future__ import annotations

import contextlib
import functools
import gc
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.client import errors

from ..conftest import StartDaemon
from ..support import random_tensors, same, wait_until, write_checkpoint
from .prometheus import Prometheus, running_prometheus

MIB = 1 << 20


@pytest.fixture
def start_prometheus(
    require_tool: Callable[[str], str], tmp_path: Path
) -> Iterator[Callable[[str], Prometheus]]:
    program = require_tool("prometheus")
    with contextlib.ExitStack() as started:
        yield lambda target: started.enter_context(running_prometheus(program, tmp_path, target))


def test_queries_give_the_numbers_that_the_loads_really_had(
    start_daemon: StartDaemon, start_prometheus: Callable[[str], Prometheus], tmp_path: Path
) -> None:
    small, large = random_tensors(4, MIB // 2), random_tensors(12, MIB // 2, seed=1)
    paths = [
        write_checkpoint(tmp_path / "small.safetensors", small),
        write_checkpoint(tmp_path / "large.safetensors", large),
    ]
    daemon = start_daemon("--memory-limit", "16MiB")
    prometheus = start_prometheus(daemon.http_address)
    prometheus.comes_to_say('up{job="penstock"}', 1)

    def load_small() -> None:
        for _ in range(4):
            same(daemon.client().load(paths[0]), small)

    same(daemon.client().load(paths[0]), small)
    loading = [threading.Thread(target=load_small) for _ in range(3)]
    for thread in loading:
        thread.start()
    same(daemon.client().load(paths[1], owned=False, memory_limit=0), large)
    for thread in loading:
        thread.join()
    with pytest.raises(errors.CheckpointNotFoundError):
        daemon.client().load(tmp_path / "gone.safetensors")
    with daemon.client().load(paths[1], memory_limit=0) as load:
        prometheus.comes_to_say("penstock_loads_active", 1)
        prometheus.comes_to_say('penstock_staging_bytes{state="reading"}', 4 * MIB)
    del load
    gc.collect()

    small_bytes, large_bytes = 8 * MIB, 24 * MIB
    prometheus.comes_to_say('penstock_loads_total{source="file",result="ok"}', 14)
    prometheus.comes_to_say('penstock_loads_total{source="file",result="failed"}', 1)
    prometheus.comes_to_say('penstock_loads_total{source="file",result="cancelled"}', 1)
    prometheus.comes_to_say('penstock_rejected_total{reason="CHECKPOINT_NOT_FOUND"}', 1)
    prometheus.comes_to_say("sum(penstock_rejected_total)", 1)
    prometheus.comes_to_say('penstock_load_seconds_count{source="file",cache="hit"}', 12)
    prometheus.comes_to_say('penstock_load_seconds_count{source="file",cache="miss"}', 2)
    prometheus.comes_to_say("penstock_load_wait_seconds_count", 15)
    prometheus.comes_to_say("penstock_stage_hits_total", 12)
    prometheus.comes_to_say("penstock_stage_misses_total", 3)
    prometheus.comes_to_say("penstock_loads_active", 0)
    totals = daemon.status()["totals"]
    assert totals["delivered_bytes"] >= 13 * small_bytes + large_bytes
    prometheus.comes_to_say("penstock_delivered_bytes_total", totals["delivered_bytes"])
    prometheus.comes_to_say('penstock_read_bytes_total{source="file"}', totals["read_bytes"])
    assert totals["read_bytes"] >= small_bytes + large_bytes
    for query in (
        'penstock_read_seconds_count{source="file"} >= 5',
        "penstock_load_seconds_sum{cache='miss',source='file'} > 0",
    ):
        wait_until(functools.partial(prometheus.ask, query), query)
    prometheus.comes_to_say("penstock_staging_limit_bytes", 16 * MIB)
    prometheus.comes_to_say("sum(penstock_staging_bytes)", 16 * MIB)
    prometheus.comes_to_say('sum(penstock_build_info{version!=""})', 1)


def test_promtool_finds_nothing_to_say_about_a_live_scrape(
    start_daemon: StartDaemon, require_tool: Callable[[str], str], tmp_path: Path
) -> None:
    promtool = require_tool("promtool")
    path = write_checkpoint(tmp_path / "m.safetensors", random_tensors(2, 1000))
    daemon = start_daemon("--memory-limit", "16MiB")
    daemon.client().load_state_dict(path)
    gc.collect()
    scraped = daemon.http("/metrics", accept="text/plain")[1]
    done = subprocess.run(
        [promtool, "check", "metrics"], input=scraped, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
