"""Storage that stalls holds back nobody but those who wait for it."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from ..e2e.conftest import StartDaemon
from ..e2e.support import Nursery, expected, random_tensors, wait_until, write_checkpoint
from . import faults
from .proxy import Fault, FaultProxy, asks
from .support import BLOCK_BYTES, FLAGS, IMPATIENT, Bucket, environment, load_and_compare

KEY = "models/one.safetensors"
CONNECTIONS = 4
PATIENT = (*FLAGS, "--object-timeout", "600", "--grace", "0")


@pytest.mark.parametrize(
    "fault",
    [
        faults.stall,
        faults.stall_after(BLOCK_BYTES // 2),
        faults.error(503, "SlowDown", ("Retry-After", "30")),
    ],
    ids=["stalled", "stalled in mid-body", "told to wait"],
)
def test_a_stalled_object_holds_back_neither_files_nor_other_objects(
    fault: Fault,
    start_daemon: StartDaemon,
    proxy: FaultProxy,
    bucket: Bucket,
    nursery: Nursery,
    tmp_path: Path,
) -> None:
    """Every connection that the daemon may have waits for the one object, and goes on waiting."""
    stalled = bucket.put_random(KEY, mib=2)
    healthy = bucket.put_random("models/two.safetensors", mib=2, seed=1)
    local = random_tensors(16, 1 << 16, seed=2)
    path = write_checkpoint(tmp_path / "local.safetensors", local)
    flags = (
        *FLAGS,
        "--object-concurrency",
        str(CONNECTIONS),
        "--concurrency",
        "2",
        "--object-timeout",
        "600",
    )
    daemon = start_daemon(*flags, environment=environment(proxy.endpoint))
    rule = proxy.on(asks("GET", bucket=bucket.name, key=KEY, beyond=4 * BLOCK_BYTES), fault, times=None)

    waiting = nursery.start("load", socket_dir=daemon.socket_dir, source=bucket.uri(KEY))
    rule.wait_hit(CONNECTIONS)
    for _ in range(2):
        load_and_compare(daemon, str(path), local)
        load_and_compare(daemon, bucket.uri("models/two.safetensors"), healthy)
        with daemon.client() as client:
            client.evict(str(path))
            client.evict(bucket.uri("models/two.safetensors"))
    assert waiting.exit_code() is None
    wait_until(
        lambda: [load["state"] for load in daemon.status()["loads"]] == ["streaming"], "only it to stream"
    )

    if fault is faults.stall:
        # What stalls is given up when storage is back, and the load ends as if nothing had been.
        proxy.reset()
        assert waiting.hear("loaded")["found"] == expected(stalled)
    else:
        waiting.kill()


def test_a_stalled_list_or_header_holds_back_nobody(
    start_daemon: StartDaemon, proxy: FaultProxy, bucket: Bucket, nursery: Nursery
) -> None:
    healthy = bucket.put_random("models/two.safetensors")
    bucket.put_random("stalled/one.safetensors")
    daemon = start_daemon(*FLAGS, "--object-timeout", "600", environment=environment(proxy.endpoint))
    lists = proxy.on(lambda request: request.query.get("prefix") == "stalled/", faults.stall, times=None)
    headers = proxy.on(asks(bucket=bucket.name, key=KEY), faults.stall, times=None)
    clients = [
        nursery.start("load", socket_dir=daemon.socket_dir, source=bucket.uri(source))
        for source in ["stalled/", KEY] * 2
    ]
    lists.wait_hit(2)
    headers.wait_hit(2)
    load_and_compare(daemon, bucket.uri("models/two.safetensors"), healthy)
    for client in clients:
        client.kill()


def test_a_client_that_leaves_a_stalled_load_frees_its_memory(
    start_daemon: StartDaemon, proxy: FaultProxy, bucket: Bucket, nursery: Nursery
) -> None:
    """At once as far as it was not being read; the rest when its reads end."""
    bucket.put_random(KEY, mib=2)
    daemon = start_daemon(*FLAGS, *IMPATIENT, environment=environment(proxy.endpoint))
    rule = proxy.on(asks("GET", bucket=bucket.name, beyond=4 * BLOCK_BYTES), faults.stall, times=None)
    client = nursery.start("load", socket_dir=daemon.socket_dir, source=bucket.uri(KEY))
    rule.wait_hit()
    client.kill()
    wait_until(lambda: not daemon.status()["loads"], "the load to be gone")
    daemon.wait_idle()
    proxy.reset()
    load_and_compare(daemon, bucket.uri(KEY), bucket.put_random(KEY, mib=2))


def test_a_daemon_that_is_told_to_stop_does_not_wait_for_stalled_storage(
    start_daemon: StartDaemon, proxy: FaultProxy, bucket: Bucket, nursery: Nursery
) -> None:
    bucket.put_random(KEY, mib=2)
    daemon = start_daemon(*PATIENT, environment=environment(proxy.endpoint))
    rule = proxy.on(asks("GET", bucket=bucket.name, beyond=4 * BLOCK_BYTES), faults.stall, times=None)
    client = nursery.start(
        "load", socket_dir=daemon.socket_dir, source=bucket.uri(KEY), reconnect_timeout=0.0
    )
    rule.wait_hit()
    assert daemon.terminate() == 0
    assert client.hear("failed")["error"] in ("ShuttingDownError", "DaemonUnavailableError")


@pytest.mark.parametrize("what", ["list", "header"])
def test_a_daemon_that_is_told_to_stop_does_not_wait_for_stalled_lists_and_headers(
    what: str, start_daemon: StartDaemon, proxy: FaultProxy, bucket: Bucket, nursery: Nursery
) -> None:
    bucket.put_random(KEY)
    rule = proxy.on(lambda request: request.method == "GET", faults.stall, times=None)
    daemon = start_daemon(*PATIENT, environment=environment(proxy.endpoint))
    source = bucket.uri("models/" if what == "list" else KEY)
    client = nursery.start("load", socket_dir=daemon.socket_dir, source=source, reconnect_timeout=0.0)
    rule.wait_hit()
    assert daemon.terminate() == 0
    assert client.hear("failed")["error"] in ("ShuttingDownError", "DaemonUnavailableError")


@pytest.mark.parametrize("what", ["connection", "TLS handshake"])
@pytest.mark.parametrize("source", ["s3://bucket/models/", "s3://bucket/one.safetensors"])
def test_a_daemon_that_is_told_to_stop_does_not_wait_for_a_store_that_takes_no_connection(
    source: str, what: str, start_daemon: StartDaemon, nursery: Nursery
) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        scheme = "https"
        if what == "connection":
            scheme = "http"
            for _ in range(3):  # the first ones take all the room there is
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
        endpoint = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        daemon = start_daemon(*PATIENT, environment=environment(endpoint))
        client = nursery.start("load", socket_dir=daemon.socket_dir, source=source, reconnect_timeout=0.0)
        wait_until(lambda: daemon.status()["loads"], "the load begins")
        if what == "TLS handshake":
            connection, _ = listener.accept()
            stack.enter_context(connection)
            assert connection.recv(1)
        assert daemon.terminate() == 0
        assert client.hear("failed")["error"] in ("ShuttingDownError", "DaemonUnavailableError")
