from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from penstock.client import CheckpointChangedError, Evicted, LoadClosedError, Prefetched, StreamerClient

from .conftest import StartDaemon
from .fake_daemon import FakeDaemon
from .samples import TENSORS


def test_status_evict_and_prefetch(start_daemon: StartDaemon) -> None:
    daemon: FakeDaemon = start_daemon(TENSORS)
    client = StreamerClient(daemon.socket_dir)
    status = client.status()
    assert status["version"] == "fake"
    assert status["staging"]["limit_bytes"] is None
    assert status["staging"]["peak_bytes"] == 0
    assert status["stages"][0]["sources"] == ["/a", "/b"]
    assert status["loads"] == []
    assert client.evict(["/a", "/b"]) == Evicted(freed_bytes=2, leased_bytes=5)
    assert client.evict() == Evicted(freed_bytes=0, leased_bytes=5)
    assert client.prefetch("/x", pin=True) == Prefetched(total_bytes=2, warm_bytes=1)
    daemon.await_leases_closed()


def test_prefetches_and_fetches_are_over_when_their_call_has_ended(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Not with the message that says so: until the end a daemon counts them among those that run."""
    end = (grpc.StatusCode.FAILED_PRECONDITION, "CHECKPOINT_CHANGED", "at the end")
    client = StreamerClient(start_daemon(TENSORS, refuse_end=end).socket_dir)
    for call in (lambda: client.prefetch("/x"), lambda: client.fetch("/x", tmp_path / "x")):
        with pytest.raises(CheckpointChangedError, match="at the end"):
            call()
    assert not (tmp_path / "x").exists()


def test_a_closed_client_refuses(start_daemon: StartDaemon) -> None:
    client = StreamerClient(start_daemon(TENSORS).socket_dir)
    client.close()
    for call in (client.status, lambda: client.load("/x")):
        with pytest.raises(LoadClosedError, match="client is closed"):
            call()


def test_progress_counts_bytes(start_daemon: StartDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = start_daemon(TENSORS)
    StreamerClient(daemon.socket_dir).load_state_dict("/x", progress=True)
    assert "12.0M/12.0M" in capsys.readouterr().err


def test_progress_of_a_prefetch_counts_bytes(
    start_daemon: StartDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    client = StreamerClient(start_daemon(TENSORS).socket_dir)
    client.prefetch("/x")
    assert capsys.readouterr().err == ""
    client.prefetch("/x", progress=True)
    assert "2.00/2.00" in capsys.readouterr().err


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = """
import sys
import penstock.client
assert not {"torch", "grpc", "google.protobuf"} & set(sys.modules)
penstock.client.StreamerClient
assert not {"torch", "grpc"} & set(sys.modules)
for name in penstock.client.__all__:
    getattr(penstock.client, name)
assert set(penstock.client.__all__) <= set(dir(penstock.client))
assert not any(name.startswith("penstock.server") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
