from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from penstock.client import DuplicateTensorError, StreamerClient
from penstock.v1 import streamer_pb2 as pb

from .conftest import StartDaemon
from .fake_daemon import FakeTensor
from .samples import FULL_AND_WINDOW, TENSORS, TOTAL_BYTES, WINDOW, assert_equal, data


@FULL_AND_WINDOW
def test_every_tensor_comes_once_in_order_with_its_bytes(
    window_slabs: int, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(TENSORS, window_slabs=window_slabs)
    with StreamerClient(daemon.socket_dir) as client, client.load("/x") as load:
        assert_equal(dict(load))
    assert daemon.ended.get(timeout=60) == "ok"
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
    waits = [record for record in caplog.records if "waiting for" in record.message]
    assert [record.levelname for record in waits] == ["INFO", "WARNING"]
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
        assert "all at once" in repr(load)
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
    with pytest.raises(TypeError, match="is one name: give a collection"):
        client.load("/x", tensors="t7")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("group", ("job",)), ("group", ("job", "8")), ("group", "job"), ("source", 5), ("source", b"/x")],
)
def test_an_argument_of_the_wrong_kind_is_named(
    argument: str, value: object, start_daemon: StartDaemon
) -> None:
    client = StreamerClient(start_daemon(TENSORS).socket_dir)
    arguments: dict[str, Any] = {"source": "/x", argument: value}
    with pytest.raises(TypeError, match=argument):
        client.load(**arguments)


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
    assert_equal(StreamerClient(daemon.socket_dir).load_state_dict("/x"))
    daemon.await_leases_closed()
