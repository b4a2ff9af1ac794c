from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest

from penstock.client import (
    CheckpointChangedError,
    DaemonUnavailableError,
    LoadClosedError,
    PenstockError,
    StreamerClient,
)
from penstock.v1 import streamer_pb2 as pb

from ..conftest import StartDaemon
from ..samples import FULL_AND_WINDOW, TENSORS, assert_equal


@FULL_AND_WINDOW
@pytest.mark.parametrize("die_after", [[0], [2], [3, 0, 2], [14], [13]], ids=str)
def test_a_load_goes_on_at_the_next_daemon(
    die_after: list[int], window_slabs: int, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(TENSORS, window_slabs=window_slabs, die_after=list(die_after))
    with StreamerClient(daemon.socket_dir).load("/x") as load:
        assert_equal(dict(load))
    assert load.stats.tensors == 40
    skipped = [request.skip_tensors for request in daemon.opens]
    assert skipped[:2] == ([0] if die_after == [14] else [0, die_after[0] * 3])
    assert {request.expect_version for request in daemon.opens[1:]} <= {"v1"}


def test_the_next_daemon_may_take_its_time(socket_dir: Path, start_daemon: StartDaemon) -> None:
    first = start_daemon(TENSORS, stall_before_segment=2)
    started = threading.Event()

    def replace() -> None:
        assert first.stalled.wait(60)
        first.stop()
        (socket_dir / "handoff.sock").unlink()
        started.set()
        start_daemon(TENSORS)

    replacer = threading.Thread(target=replace)
    replacer.start()
    assert_equal(StreamerClient(socket_dir).load_state_dict("/x"))
    replacer.join()
    assert started.is_set()


def test_a_predicate_is_asked_once(start_daemon: StartDaemon) -> None:
    asked: list[str] = []

    def predicate(name: str) -> bool:
        asked.append(name)
        return name != "t5"

    daemon = start_daemon(TENSORS, die_after=[2])
    state = StreamerClient(daemon.socket_dir).load_state_dict("/x", tensors=predicate)
    assert_equal(state, [tensor for tensor in TENSORS if tensor.name != "t5"])
    assert len(asked) == 40


def test_a_load_that_loses_its_place_in_the_queue_takes_one_at_the_next_daemon(
    start_daemon: StartDaemon,
) -> None:
    """With what is there then: nothing was yielded yet, so another version is as good."""
    daemon = start_daemon(TENSORS, die_queued=2)
    asked: list[str] = []

    def predicate(name: str) -> bool:
        asked.append(name)
        if len(asked) == 40:
            daemon.tensors = TENSORS[:-1]
            daemon.behaviour.version = "v2"
        return name != "t5"

    state = StreamerClient(daemon.socket_dir).load_state_dict("/x", tensors=predicate)
    assert_equal(state, [tensor for tensor in TENSORS[:-1] if tensor.name != "t5"])
    assert len(asked) == 40 + 39 + 39
    assert [request.expect_version for request in daemon.opens] == [""] * 3


def test_a_prefetch_that_loses_its_place_in_the_queue_takes_one_at_the_next_daemon(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon(TENSORS, die_queued=2)
    assert StreamerClient(daemon.socket_dir).prefetch("/x").total_bytes == 2
    assert len(daemon.connections) == 3


@pytest.mark.parametrize("method", ["load", "prefetch"])
def test_without_patience_a_lost_place_in_the_queue_raises_at_once(
    method: str, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(TENSORS, die_queued=2)
    client = StreamerClient(daemon.socket_dir, reconnect_timeout=0)
    with pytest.raises(DaemonUnavailableError):
        getattr(client, method)("/x")
    assert daemon.behaviour.die_queued == 1


def test_closing_the_client_ends_the_wait_of_a_prefetch(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, die_queued=10**9)
    client = StreamerClient(daemon.socket_dir)
    ended: list[type[BaseException]] = []

    def prefetch() -> None:
        try:
            client.prefetch("/x")
        except LoadClosedError as error:
            ended.append(type(error))

    thread = threading.Thread(target=prefetch)
    thread.start()
    daemon.broken.wait(60)
    client.close()
    thread.join()
    assert ended == [LoadClosedError]


def test_another_version_after_the_death_raises(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, die_after=[2])
    load = StreamerClient(daemon.socket_dir).load("/x")
    daemon.behaviour.version = "v2"
    with pytest.raises(CheckpointChangedError):
        list(load)


def test_another_version_is_seen_even_when_the_daemon_does_not_care(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, die_after=[2])
    load = StreamerClient(daemon.socket_dir).load("/x")

    def other_version(manifest: pb.Manifest) -> None:
        manifest.version = "v2"

    daemon.behaviour.tamper_manifest = other_version
    with pytest.raises(CheckpointChangedError):
        list(load)


def test_without_patience_the_death_raises_at_once(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, die_after=[2])
    client = StreamerClient(daemon.socket_dir, reconnect_timeout=0)
    load = client.load("/x")
    with pytest.raises(DaemonUnavailableError) as caught:
        list(load)
    assert load.stats.tensors == 6
    assert caught.value.load_id == "load-1"
    assert len(daemon.opens) == 1


def test_other_errors_are_not_met_by_connecting_again(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, die_after=[2])
    load = StreamerClient(daemon.socket_dir).load("/x")
    daemon.behaviour.refuse_load = (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_LOADS", "full")
    with pytest.raises(PenstockError, match="full"):
        list(load)
    assert len(daemon.opens) == 2
