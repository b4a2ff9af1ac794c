from __future__ import annotations

import gc
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from penstock.client import LoadClosedError, StreamerClient
from penstock.client.ring.stream import Stream
from penstock.v1 import streamer_pb2 as pb

from ..e2e.support import run_python
from .conftest import StartDaemon
from .samples import FULL_AND_WINDOW, TENSORS, WINDOW, assert_equal


def leave_by_break(client: StreamerClient) -> None:
    for _ in client.load("/x"):
        break


def leave_by_with(client: StreamerClient) -> None:
    with client.load("/x"):
        pass


def leave_by_dropping(client: StreamerClient) -> None:
    client.load("/x")


def leave_by_dropping_the_iterator(client: StreamerClient) -> None:
    next(iter(client.load("/x")))


def fail_in_loop(client: StreamerClient, error: type[BaseException]) -> None:
    for _ in client.load("/x"):
        raise error


def leave_by_exception(client: StreamerClient) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_in_loop(client, ZeroDivisionError)


def leave_by_interrupt(client: StreamerClient) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_in_loop(client, KeyboardInterrupt)


def leave_by_closing_the_client(client: StreamerClient) -> None:
    iterator = iter(client.load("/x"))
    next(iterator)
    client.close()
    with pytest.raises(LoadClosedError):
        list(iterator)


@FULL_AND_WINDOW
@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_with,
        leave_by_dropping,
        leave_by_dropping_the_iterator,
        leave_by_exception,
        leave_by_interrupt,
        leave_by_closing_the_client,
    ],
)
def test_leaving_early_gives_everything_back(
    leave: Any, window_slabs: int, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(TENSORS, window_slabs=window_slabs, stall_before_segment=2)
    leave(StreamerClient(daemon.socket_dir))
    gc.collect()
    daemon.await_leases_closed()
    assert daemon.ended.get(timeout=60)


def test_loads_leave_no_threads_descriptors_or_mappings(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, window_slabs=WINDOW)
    script = f"""
import os, threading, time
from penstock.client import StreamerClient

def settled():
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(60)
    return (
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
        open("/proc/self/maps").read().count("memfd"),
    )

client = StreamerClient({str(daemon.socket_dir)!r})
def some_loads():
    client.load_state_dict("/x")
    client.load("/x").close()
    client.load("/x")
    for _ in client.load("/x"):
        break
    client.status()

before = settled()
for _ in range(10):
    some_loads()
deadline = time.monotonic() + 60
while settled() != before and time.monotonic() < deadline:
    os.sched_yield()  # gRPC closes its sockets on a thread of its own
assert settled() == before == (1, before[1], 0), (before, settled())
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    daemon.await_leases_closed()


def test_closing_from_another_thread_ends_a_waiting_loop(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, stall_before_segment=2)
    load = StreamerClient(daemon.socket_dir).load("/x")
    with daemon.when_stalled(load.close), pytest.raises(LoadClosedError):
        list(load)
    daemon.await_leases_closed()


def test_a_segment_that_came_before_another_thread_closed_is_not_handed_out(
    start_daemon: StartDaemon,
) -> None:
    stream = Stream(start_daemon(TENSORS).socket_dir, pb.OpenLoad(sources=["/x"]))
    segment = stream.next_segment()
    assert segment is not None
    stream.close()
    with pytest.raises(LoadClosedError):
        stream.wrap(segment, copies=None)


def test_tensors_of_a_closed_window_are_not_handed_out(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, window_slabs=WINDOW)
    load = StreamerClient(daemon.socket_dir).load("/x")
    iterator = iter(load)
    next(iterator)
    load.close()
    with pytest.raises(LoadClosedError):
        next(iterator)


def test_a_load_is_iterated_once(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS)
    with StreamerClient(daemon.socket_dir).load("/x") as load:
        list(load)
        with pytest.raises(LoadClosedError, match="before"):
            iter(load)
    with StreamerClient(daemon.socket_dir).load("/x") as load:
        load.close()
        load.close()
        with pytest.raises(LoadClosedError, match="closed"):
            iter(load)


def test_two_threads_share_one_client(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, window_slabs=WINDOW)
    client = StreamerClient(daemon.socket_dir)
    states: list[dict[str, torch.Tensor]] = []
    threads = [threading.Thread(target=lambda: states.append(client.load_state_dict("/x"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(states) == 2
    for state in states:
        assert_equal(state)


@pytest.mark.parametrize("how", ["pass", "raise KeyboardInterrupt"])
def test_the_process_may_end_in_mid_load(how: str, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, stall_before_segment=2)
    script = f"""
import logging
from penstock.client import StreamerClient
logging.getLogger("penstock.client").setLevel("ERROR")
client = StreamerClient({str(daemon.socket_dir)!r})
load = client.load("/x")
iterator = iter(load)
kept = next(iterator)
other = client.load("/x")
if {how!r} != "pass":
    {how}
"""
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script], capture_output=True, text=True, timeout=60
    )
    noise = result.stderr.split("Traceback")[0]
    assert noise == ""
    assert "Error" not in result.stderr
    daemon.await_leases_closed()
