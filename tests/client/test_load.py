from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from penstock.client import (
    CheckpointChangedError,
    DaemonUnavailableError,
    DuplicateTensorError,
    Evicted,
    LoadClosedError,
    PenstockError,
    ProtocolError,
    StreamerClient,
    UnsupportedDtypeError,
)
from penstock.v1 import streamer_pb2 as pb

from .conftest import StartDaemon
from .fake_daemon import FakeDaemon, FakeTensor, random_tensors

TENSORS = random_tensors(40, 300_000)
TOTAL_BYTES = sum(len(tensor.data) for tensor in TENSORS)
WINDOW = 2  # slabs; the checkpoint goes through it three times
FULL_AND_WINDOW = pytest.mark.parametrize("window_slabs", [0, WINDOW], ids=["full", "window"])


def data(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.numpy().tobytes())


def assert_equal(state: dict[str, torch.Tensor], tensors: list[FakeTensor] = TENSORS) -> None:
    assert list(state) == [tensor.name for tensor in tensors]
    for tensor in tensors:
        assert data(state[tensor.name]) == tensor.data, tensor.name


def process_state() -> tuple[int, int]:
    """(file descriptors, mapped slabs)"""
    gc.collect()
    return (
        len(list(Path("/proc/self/fd").iterdir())),
        Path("/proc/self/maps").read_text().count("memfd:fake-slab"),
    )


@FULL_AND_WINDOW
def test_every_tensor_comes_once_in_order_with_its_bytes(
    window_slabs: int, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(TENSORS, window_slabs=window_slabs)
    with StreamerClient(daemon.socket_dir) as client, client.load("/x") as load:
        assert_equal(dict(load))
    assert daemon.ended.get(timeout=10) == "ok"
    assert daemon.releases == (list(range(1, 15)) if window_slabs else [])


@FULL_AND_WINDOW
def test_owned_tensors_stay_right_and_writable_after_everything_ended(
    window_slabs: int, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(TENSORS, window_slabs=window_slabs)
    with StreamerClient(daemon.socket_dir) as client:
        state = client.load_state_dict("/x")
        assert daemon.leased() == (window_slabs == 0)
    state["t0"].add_(1)
    assert data(state["t0"] - 1) == TENSORS[0].data
    assert_equal({name: tensor for name, tensor in state.items() if name != "t0"}, TENSORS[1:])
    state.clear()
    daemon.await_leases_closed()


def test_the_lease_lasts_as_long_as_one_view(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS)
    kept = StreamerClient(daemon.socket_dir).load_state_dict("/x")["t39"][1:2]
    assert daemon.leased()
    assert data(kept) == TENSORS[39].data[4:8]
    del kept
    daemon.await_leases_closed()


@FULL_AND_WINDOW
def test_borrowed_views_are_right_until_the_next_even_when_written_into(
    window_slabs: int, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(TENSORS, window_slabs=window_slabs)
    count = 0
    for (_, tensor), expected in zip(
        StreamerClient(daemon.socket_dir).load("/x", owned=False), TENSORS, strict=True
    ):
        assert data(tensor) == expected.data
        tensor.fill_(-1)
        count += 1
    assert count == 40


@FULL_AND_WINDOW
def test_the_loop_variable_that_is_left_of_a_borrowing_load_holds_no_lease(
    window_slabs: int, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(TENSORS, window_slabs=window_slabs)
    for _, tensor in StreamerClient(daemon.socket_dir).load("/x", owned=False):  # noqa: B007
        pass
    daemon.await_leases_closed()
    assert not tensor.any()  # not right any more, but no crash either
    tensor.fill_(1)


def test_a_borrowed_tensor_stays_right_after_a_break(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, window_slabs=WINDOW)
    for name, tensor in StreamerClient(daemon.socket_dir).load("/x", owned=False):  # noqa: B007
        if name == "t4":
            break
    assert data(tensor) == TENSORS[4].data
    assert daemon.leased()


def test_waiting_for_memory_that_this_process_holds_is_warned_of(
    start_daemon: StartDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = start_daemon(TENSORS)
    client = StreamerClient(daemon.socket_dir)
    gc.collect()
    with caplog.at_level("INFO", logger="penstock.client"):
        state = client.load_state_dict("/x")
        client.load("/x").close()
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "for the test" in caplog.text
    assert "12582912 bytes" in caplog.text
    del state


def test_a_window_segment_is_released_only_when_the_caller_moved_past_it(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, window_slabs=WINDOW)
    with StreamerClient(daemon.socket_dir).load("/x", owned=False) as load:
        iterator = iter(load)
        for _ in range(3):
            _, tensor = next(iterator)
        assert daemon.releases == []
        assert data(tensor) == TENSORS[2].data
        # The window holds four segments: the fifth can only come after the first was released.
        for _ in range(10):
            next(iterator)
        assert daemon.releases[0] == 1


def test_what_the_load_knows(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS)
    with StreamerClient(daemon.socket_dir).load("/x") as load:
        assert (load.load_id, load.tensor_count, load.total_bytes) == ("load-1", 40, TOTAL_BYTES)
        assert load.metadata == {"format": "pt", "who": "b"}
        assert [(file.uri, file.size_bytes) for file in load.files] == [("/fake/a", 1), ("/fake/b", 2)]
        assert load.files[0].metadata == {"format": "pt", "who": "a"}
        assert load.stats.tensors == 0
        assert load.stats.first_tensor_seconds is None
        assert "open: 0 of 40" in repr(load)
        for _ in load:
            pass
        stats = load.stats
    assert "closed: 40 of 40" in repr(load)
    assert (stats.bytes, stats.tensors, stats.read_bytes) == (TOTAL_BYTES, 40, TOTAL_BYTES)
    assert (stats.waited_seconds, stats.cache_hit) == (0.5, False)
    assert stats.first_tensor_seconds is not None
    assert 0 < stats.first_tensor_seconds <= stats.seconds == load.stats.seconds


def test_warm_loads_are_told(start_daemon: StartDaemon) -> None:
    def warm(manifest: pb.Manifest) -> None:
        manifest.warm_bytes = manifest.total_bytes

    daemon = start_daemon(TENSORS, tamper_manifest=warm)
    with StreamerClient(daemon.socket_dir).load("/x") as load:
        assert load.stats.cache_hit


def test_the_request_says_what_was_asked(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PENSTOCK_MEMORY_LIMIT", raising=False)
    monkeypatch.delenv("RUNAI_STREAMER_MEMORY_LIMIT", raising=False)
    daemon = start_daemon(TENSORS)
    client = StreamerClient(daemon.socket_dir)
    client.load("model").close()
    client.load(["s3://b/x", Path("y")], memory_limit="1GB", tensors=["t3"], group=("g", 4)).close()
    client.load("model", memory_limit=0, tensors=[]).close()
    plain, full, none = daemon.opens
    assert list(plain.sources) == [f"{tmp_path}/model"]
    assert not plain.HasField("memory_limit_bytes")
    assert not plain.HasField("tensors")
    assert not plain.HasField("group")
    assert plain.client_name
    assert plain.client_version
    assert list(full.sources) == ["s3://b/x", f"{tmp_path}/y"]
    assert full.memory_limit_bytes == 10**9
    assert list(full.tensors.names) == ["t3"]
    assert (full.group.name, full.group.size) == ("g", 4)
    assert none.HasField("memory_limit_bytes")
    assert none.memory_limit_bytes == 0
    assert none.HasField("tensors")


def test_names_and_predicates_select(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS)
    client = StreamerClient(daemon.socket_dir)
    wanted = [tensor for tensor in TENSORS if tensor.name.endswith("7")]
    assert_equal(client.load_state_dict("/x", tensors={tensor.name for tensor in wanted}), wanted)
    assert_equal(client.load_state_dict("/x", tensors=lambda name: name.endswith("7")), wanted)
    assert client.load_state_dict("/x", tensors=[]) == {}
    assert client.load_state_dict("/x", tensors=lambda name: False) == {}
    with pytest.raises(TypeError, match="not one name"):
        client.load("/x", tensors="t7")


def test_an_error_in_the_predicate_ends_the_load(start_daemon: StartDaemon) -> None:
    def broken(name: str) -> bool:
        raise KeyError(name)

    daemon = start_daemon(TENSORS)
    with pytest.raises(KeyError):
        StreamerClient(daemon.socket_dir).load("/x", tensors=broken)
    daemon.await_leases_closed()


def test_a_name_in_two_files_raises_for_a_dict_and_not_for_a_loop(start_daemon: StartDaemon) -> None:
    daemon = start_daemon([TENSORS[0], TENSORS[1], TENSORS[0]])
    client = StreamerClient(daemon.socket_dir)
    with pytest.raises(DuplicateTensorError, match="'t0'"):
        client.load_state_dict("/x")
    assert [name for name, _ in client.load("/x")] == ["t0", "t1", "t0"]


def test_only_zero_size_tensors_need_no_slabs(start_daemon: StartDaemon) -> None:
    daemon = start_daemon([FakeTensor("empty", "F32", (0, 3), b"")])
    state = StreamerClient(daemon.socket_dir).load_state_dict("/x")
    assert state["empty"].shape == (0, 3)
    daemon.await_leases_closed()


def test_many_slabs_come_in_several_packets(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, window_slabs=300)
    before = process_state()
    assert_equal(StreamerClient(daemon.socket_dir).load_state_dict("/x"))
    daemon.await_leases_closed()
    assert process_state()[1] <= before[1] + 300  # the daemon's own mappings


# ---- leaving early ----


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
    assert daemon.ended.get(timeout=10)


def test_loads_leave_no_threads_descriptors_or_mappings(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, window_slabs=WINDOW)
    script = f"""
import os, threading
from penstock.client import StreamerClient

def settled():
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(10)
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

some_loads()
before = settled()
for _ in range(10):
    some_loads()
assert before[0] == 1 and before[2] == 0, before
assert settled() == before, (before, settled())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    daemon.await_leases_closed()


def test_closing_from_another_thread_ends_a_waiting_loop(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, stall_before_segment=2)
    load = StreamerClient(daemon.socket_dir).load("/x")

    def close_when_stalled() -> None:
        assert daemon.stalled.wait(10)
        load.close()

    closer = threading.Thread(target=close_when_stalled)
    closer.start()
    with pytest.raises(LoadClosedError):
        list(load)
    closer.join()
    daemon.await_leases_closed()


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
        thread.join(30)
    assert len(states) == 2
    for state in states:
        assert_equal(state)


@pytest.mark.parametrize("how", ["pass", "raise KeyboardInterrupt"])
def test_the_process_may_end_in_mid_load(how: str, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, stall_before_segment=2)
    script = f"""
from penstock.client import StreamerClient
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


# ---- a daemon that breaks the contract ----


def shift_index(segment: pb.SegmentReady) -> None:
    segment.index += 1


def beyond_ring(segment: pb.SegmentReady) -> None:
    segment.ring_offset = 1 << 40


def offset_near_the_end_of_integers(segment: pb.SegmentReady) -> None:
    segment.ring_offset = 2**64 - 1


def longer_than_ring(segment: pb.SegmentReady) -> None:
    segment.size_bytes = 1 << 40


def beyond_a_full_ring(segment: pb.SegmentReady) -> None:
    segment.ring_offset = 6 * 2 * 1024 * 1024 - 8


def tensor_beyond_segment(segment: pb.SegmentReady) -> None:
    segment.tensors[-1].offset += 8


def wrong_size(segment: pb.SegmentReady) -> None:
    segment.tensors[0].shape[0] += 1


@pytest.mark.parametrize(
    "tamper",
    [
        shift_index,
        beyond_ring,
        offset_near_the_end_of_integers,
        longer_than_ring,
        beyond_a_full_ring,
        tensor_beyond_segment,
        wrong_size,
    ],
)
def test_segments_that_lie_outside_are_refused(tamper: Any, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, tamper_segment=tamper)
    with pytest.raises(ProtocolError) as caught:
        StreamerClient(daemon.socket_dir).load_state_dict("/x")
    assert caught.value.load_id == "load-1"
    del caught
    gc.collect()
    daemon.await_leases_closed()


def more_slabs(manifest: pb.Manifest) -> None:
    manifest.slab_count -= 1


def other_slab_size(manifest: pb.Manifest) -> None:
    manifest.slab_bytes *= 2


def odd_slab_size(manifest: pb.Manifest) -> None:
    manifest.slab_bytes -= 1


def fewer_segments(manifest: pb.Manifest) -> None:
    manifest.segment_count -= 1


def more_segments(manifest: pb.Manifest) -> None:
    manifest.segment_count += 1


def more_tensors(manifest: pb.Manifest) -> None:
    manifest.tensor_count += 1


def no_slabs(manifest: pb.Manifest) -> None:
    manifest.slab_count = 0


@pytest.mark.parametrize(
    "tamper",
    [
        more_slabs,
        other_slab_size,
        odd_slab_size,
        fewer_segments,
        more_segments,
        more_tensors,
        no_slabs,
    ],
)
def test_manifests_that_lie_are_refused(tamper: Any, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, tamper_manifest=tamper)
    with pytest.raises(ProtocolError):
        StreamerClient(daemon.socket_dir).load_state_dict("/x")
    gc.collect()
    daemon.await_leases_closed()


def test_a_call_that_ends_without_its_last_message_raises(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, finish=False)
    with pytest.raises(ProtocolError, match="before its last message"):
        StreamerClient(daemon.socket_dir).load_state_dict("/x")


def test_a_dtype_that_torch_lacks_names_the_load(start_daemon: StartDaemon) -> None:
    daemon = start_daemon([FakeTensor("t", "F99", (4,), b"abcd")])
    with pytest.raises(UnsupportedDtypeError) as caught:
        StreamerClient(daemon.socket_dir).load_state_dict("/x")
    assert caught.value.load_id == "load-1"


# ---- a daemon that dies ----


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
        assert first.stalled.wait(10)
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


# ---- the other calls ----


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
    assert client.prefetch("/x", pin=True) == 2
    daemon.await_leases_closed()


def test_the_socket_directory_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_SOCKET_DIR", raising=False)
    assert "/run/penstock" in repr(StreamerClient())
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", "/elsewhere")
    assert StreamerClient().socket_dir == Path("/elsewhere")
    assert StreamerClient("/here").socket_dir == Path("/here")


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
