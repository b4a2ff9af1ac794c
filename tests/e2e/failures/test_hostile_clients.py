"""Clients that break the protocol: each gets an error, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from penstock.server.checkpoint.catalog import MAX_SOURCES
from penstock.v1 import streamer_pb2 as pb
from penstock.v1 import streamer_pb2_grpc

from ..conftest import StartDaemon
from ..support import (
    MIB,
    Checkpoint,
    DaemonProcess,
    Nursery,
    random_tensors,
    running_daemon,
    same,
    wait_until,
    write_checkpoint,
)

HUGE = 2**64 - 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """24 MiB in 24 tensors."""
    tensors = random_tensors(24, MIB // 4)
    return write_checkpoint(tmp_path_factory.mktemp("hostile") / "m.safetensors", tensors), tensors


@pytest.fixture(scope="module")
def module_daemon() -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "16MiB") as daemon:
        yield daemon


@pytest.fixture
def daemon(module_daemon: DaemonProcess, checkpoint: Checkpoint) -> Iterator[DaemonProcess]:
    """16 MiB of memory. After every test it is idle, still the same, and serves."""
    yield module_daemon
    module_daemon.wait_idle()
    path, tensors = checkpoint
    same(module_daemon.client().load_state_dict(path).items(), tensors)
    module_daemon.assert_log_clean()


class RawClient:
    """Speaks the protocol by hand: one handoff connection, one channel, any number of calls."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.handoff = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.handoff.connect(str(daemon.socket_dir / "handoff.sock"))
        self.token = pb.HandoffFrame.FromString(self.handoff.recv(1 << 16)).hello.token
        self.channel = grpc.insecure_channel(
            f"unix:{daemon.socket_dir / 'penstock.sock'}", options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.service: Any = streamer_pb2_grpc.StreamerServiceStub(self.channel)
        self._queues: list[queue.SimpleQueue[pb.LoadRequest | None]] = []

    def load(self, *requests: pb.LoadRequest, token: str | None = None) -> Any:
        """A Load call that has sent these and stays open."""
        sent: queue.SimpleQueue[pb.LoadRequest | None] = queue.SimpleQueue()
        self._queues.append(sent)
        for request in requests:
            sent.put(request)
        metadata = [("penstock-session", self.token if token is None else token)]
        return self.service.Load(iter(sent.get, None), metadata=metadata, timeout=60)

    def send(self, request: pb.LoadRequest | None) -> None:
        """On the latest call; None ends its requests."""
        self._queues[-1].put(request)

    def close(self) -> None:
        for sent in self._queues:
            sent.put(None)
        self.channel.close()
        self.handoff.close()


@pytest.fixture
def raw(daemon: DaemonProcess) -> Iterator[RawClient]:
    client = RawClient(daemon)
    yield client
    client.close()


def opening(source: Path | str, **fields: Any) -> pb.LoadRequest:
    return pb.LoadRequest(open=pb.OpenLoad(sources=[str(source)], **fields))


def release(segments: int) -> pb.LoadRequest:
    return pb.LoadRequest(release=pb.Release(segments=segments))


def refused(call: Any) -> tuple[str, str, str]:
    """Status, reason and message of a call that has to fail."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call) if hasattr(call, "__iter__") else call()
    error: Any = caught.value
    info = error_details_pb2.ErrorInfo()
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin":
            assert status_pb2.Status.FromString(value).details[0].Unpack(info)
    return error.code().name, info.reason, error.details()


# ---- sessions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "0" * 32, "x" * 4000])
def test_a_load_with_a_token_that_was_never_given_out_is_refused(
    token: str, raw: RawClient, checkpoint: Checkpoint
) -> None:
    assert refused(raw.load(opening(checkpoint[0]), token=token))[:2] == (
        "UNAUTHENTICATED",
        "SESSION_REQUIRED",
    )


def test_calls_without_a_token_are_refused(raw: RawClient, checkpoint: Checkpoint) -> None:
    wanted = ("UNAUTHENTICATED", "SESSION_REQUIRED")
    assert refused(raw.service.Load(iter([opening(checkpoint[0])])))[:2] == wanted
    assert refused(lambda: raw.service.GetStatus(pb.GetStatusRequest()))[:2] == wanted


def test_a_token_opens_one_load_only(raw: RawClient, checkpoint: Checkpoint) -> None:
    first = raw.load(opening(checkpoint[0]))
    assert next(first).HasField("manifest")
    second = raw.load(opening(checkpoint[0]))
    assert refused(second)[:2] == ("UNAUTHENTICATED", "SESSION_REQUIRED")
    first.cancel()
    assert refused(raw.load(opening(checkpoint[0])))[:2] == ("UNAUTHENTICATED", "SESSION_REQUIRED")


def test_a_token_dies_with_its_connection(
    daemon: DaemonProcess, raw: RawClient, checkpoint: Checkpoint
) -> None:
    raw.handoff.close()

    def gone() -> bool:
        try:
            raw.service.GetStatus(pb.GetStatusRequest(), metadata=[("penstock-session", raw.token)])
        except grpc.RpcError as error:
            return isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAUTHENTICATED
        return False

    wait_until(gone, "the token to die")
    assert refused(raw.load(opening(checkpoint[0])))[:2] == ("UNAUTHENTICATED", "SESSION_REQUIRED")


@pytest.mark.parametrize("segments", [0, 1])
def test_a_load_whose_handoff_connection_closes_ends(
    segments: int, daemon: DaemonProcess, raw: RawClient, checkpoint: Checkpoint
) -> None:
    call = raw.load(opening(checkpoint[0], memory_limit_bytes=8 * MIB))
    for _ in range(1 + segments):
        next(call)
    raw.handoff.close()
    assert refused(call)[:2] == ("UNAUTHENTICATED", "SESSION_REQUIRED")
    daemon.wait_idle()


def test_a_load_whose_handoff_connection_closes_while_it_waits_for_a_choice_ends(
    daemon: DaemonProcess, raw: RawClient, checkpoint: Checkpoint
) -> None:
    call = raw.load(opening(checkpoint[0], list_tensors=True))
    assert next(call).HasField("listing")
    raw.handoff.close()
    assert refused(call)[:2] == ("UNAUTHENTICATED", "SESSION_REQUIRED")
    daemon.wait_idle()


@pytest.mark.parametrize("garbage", [b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 60_000])
def test_garbage_on_the_handoff_socket_ends_that_connection(garbage: bytes, raw: RawClient) -> None:
    raw.handoff.send(garbage)
    raw.handoff.settimeout(30)
    with contextlib.suppress(ConnectionResetError):
        assert raw.handoff.recv(1) == b""


def test_descriptors_sent_to_the_daemon_are_not_kept(
    daemon: DaemonProcess, raw: RawClient, tmp_path: Path
) -> None:
    with (tmp_path / "mine").open("w") as mine:
        socket.send_fds(raw.handoff, [b"have these"], [mine.fileno()] * 100)
    raw.handoff.settimeout(30)
    with contextlib.suppress(ConnectionResetError):
        raw.handoff.recv(1)
    daemon.wait_idle()
    assert str(tmp_path / "mine") not in daemon.fds()


def test_garbage_on_the_grpc_socket_is_shrugged_off(daemon: DaemonProcess) -> None:
    for data in (
        b"\0" * 1000,
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000,
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(daemon.socket_dir / "penstock.sock"))
            connection.sendall(data)


def test_idle_connections_cost_nobody_anything(daemon: DaemonProcess, checkpoint: Checkpoint) -> None:
    connections = [RawClient(daemon) for _ in range(50)]
    calls = [connection.load() for connection in connections]  # sends nothing
    path, tensors = checkpoint
    same(daemon.client().load_state_dict(path).items(), tensors)
    for connection in connections:
        connection.close()
    assert len(calls) == 50


def test_connections_of_one_user_are_bounded(
    start_daemon: StartDaemon, nursery: Nursery, checkpoint: Checkpoint
) -> None:
    """Also those whose hello is never read. The daemon says why it refuses, and recovers."""
    if os.geteuid() != 0:
        pytest.skip("needs root: the bound is for a user who is not")
    daemon = start_daemon("--memory-limit", "16MiB", "--allow", str(checkpoint[0].parent))
    flood = nursery.start("flood", uid=1001, socket_dir=daemon.socket_dir, count=1100)
    said = flood.hear("flooded")
    assert said["refused"] > 0
    assert "connections" in said["message"]
    flood.kill()

    def recovered() -> bool:
        try:
            daemon.status()
        except Exception:
            return False
        return True

    wait_until(recovered, "the connections to be forgotten")


# ---- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first", [pb.LoadRequest(), release(1), pb.LoadRequest(select=pb.SelectTensors(names=["x"]))]
)
def test_the_first_message_must_be_the_opening(first: pb.LoadRequest, raw: RawClient) -> None:
    status, reason, message = refused(raw.load(first))
    assert (status, reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert "OpenLoad" in message


def test_a_call_that_ends_before_its_first_message_is_refused(raw: RawClient) -> None:
    call = raw.load()
    raw.send(None)
    assert refused(call)[1] == "INVALID_REQUEST"


BAD_OPENINGS: dict[str, tuple[pb.OpenLoad, str, str]] = {
    "no source": (pb.OpenLoad(), "INVALID_REQUEST", "sources"),
    "empty source": (pb.OpenLoad(sources=[""]), "INVALID_REQUEST", "relative"),
    "relative path": (pb.OpenLoad(sources=["m.safetensors"]), "INVALID_REQUEST", "relative"),
    "unknown scheme": (pb.OpenLoad(sources=["ftp://x/y"]), "INVALID_REQUEST", "ftp"),
    "file on another host": (pb.OpenLoad(sources=["file://host/m"]), "INVALID_REQUEST", "file:///path"),
    "broken URI": (pb.OpenLoad(sources=["file://[/m"]), "INVALID_REQUEST", "file://["),
    "NUL": (pb.OpenLoad(sources=["/m\0.safetensors"]), "INVALID_REQUEST", "NUL"),
    "quoted NUL": (pb.OpenLoad(sources=["file:///m%00.safetensors"]), "INVALID_REQUEST", "NUL"),
    "no UTF-8": (pb.OpenLoad(sources=["file:///%ff%fe.safetensors"]), "CHECKPOINT_NOT_FOUND", "exist"),
    "too many sources": (pb.OpenLoad(sources=["/m"] * 100_000), "INVALID_REQUEST", "100000"),
    "long path": (pb.OpenLoad(sources=["/" + "x" * 100_000]), "INVALID_REQUEST", "too long"),
    "path of 8 KiB": (pb.OpenLoad(sources=["/" + "x" * 8000]), "CHECKPOINT_NOT_FOUND", "too long"),
    "proc": (pb.OpenLoad(sources=["/proc/self/mem"]), "CHECKPOINT_INVALID", "/proc/self/mem"),
    "device": (pb.OpenLoad(sources=["/dev/zero"]), "CHECKPOINT_INVALID", "regular"),
    "tty": (pb.OpenLoad(sources=["/dev/tty"]), "CHECKPOINT_INVALID", "regular"),
}


@pytest.mark.parametrize("case", BAD_OPENINGS)
def test_an_opening_that_makes_no_sense_is_refused_with_the_reason(case: str, raw: RawClient) -> None:
    message, reason, words = BAD_OPENINGS[case]
    status = refused(raw.load(pb.LoadRequest(open=message)))
    assert status[1] == reason, status
    assert words in status[2]
    assert len(status[2]) <= 1000


BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "empty group": ({"group": pb.LoadGroup()}, "INVALID_REQUEST"),
    "group of none": ({"group": pb.LoadGroup(name="g")}, "INVALID_REQUEST"),
    "group without name": ({"group": pb.LoadGroup(size=2)}, "INVALID_REQUEST"),
    "group of too many": ({"group": pb.LoadGroup(name="g", size=2**32 - 1)}, "INVALID_REQUEST"),
    "tiny limit": ({"memory_limit_bytes": 1}, "MEMORY_LIMIT_TOO_SMALL"),
    "unknown tensor": ({"tensors": pb.SelectTensors(names=["nothing"])}, "TENSOR_NOT_FOUND"),
    "long names": ({"tensors": pb.SelectTensors(names=["n" * 100_000] * 10)}, "TENSOR_NOT_FOUND"),
    "another version": ({"expect_version": "made up"}, "CHECKPOINT_CHANGED"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_field_that_makes_no_sense_is_refused_with_the_reason(
    case: str, raw: RawClient, checkpoint: Checkpoint
) -> None:
    fields, reason = BAD_FIELDS[case]
    status = refused(raw.load(opening(checkpoint[0], **fields)))
    assert status[1] == reason, status
    assert len(status[2]) <= 1000


def test_huge_numbers_are_taken_for_what_they_mean(raw: RawClient, checkpoint: Checkpoint) -> None:
    call = raw.load(
        opening(checkpoint[0], memory_limit_bytes=HUGE, skip_tensors=HUGE, client_name="x" * 10**6)
    )
    manifest = next(call).manifest
    assert (manifest.tensor_count, manifest.segment_count) == (0, 0)
    assert next(call).HasField("finished")


@pytest.mark.parametrize("size_bytes", [MIB, 65 * MIB])
def test_a_message_too_large_is_refused_with_what_to_do(size_bytes: int, raw: RawClient) -> None:
    call = raw.load(pb.LoadRequest(open=pb.OpenLoad(client_name="x" * size_bytes)))
    status, reason, message = refused(call)
    assert (status, reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert "at most 1048576: update penstock" in message


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("count", [1, 5, 1000, HUGE])
def test_releasing_more_than_was_announced_frees_no_more_than_that(
    count: int, full: bool, daemon: DaemonProcess, raw: RawClient, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Releases ahead of time must not make a window move on under the client's feet."""
    path = (
        checkpoint[0]
        if not full
        else write_checkpoint(tmp_path / "s.safetensors", random_tensors(8, MIB // 4))
    )
    call = raw.load(opening(path), release(count))
    manifest = next(call).manifest
    assert manifest.full is full
    announced = next(call).segment_ready
    assert announced.index == 0
    for _ in range(20):
        raw.send(release(count))
    got = 1
    if full:
        assert [message.WhichOneof("response") for message in call][-1] == "finished"
        return
    while got < manifest.segment_count:
        got += 1
        assert next(call).segment_ready.index == got - 1
        raw.send(release(HUGE))
    assert next(call).HasField("finished")


def test_releases_that_go_back_mean_nothing(raw: RawClient, checkpoint: Checkpoint) -> None:
    call = raw.load(opening(checkpoint[0], memory_limit_bytes=4 * MIB))
    manifest = next(call).manifest
    for number in range(manifest.segment_count):
        assert next(call).segment_ready.index == number
        raw.send(release(number + 1))
        raw.send(release(0))
    assert next(call).HasField("finished")


def test_opening_twice_and_choosing_unasked_change_nothing(raw: RawClient, checkpoint: Checkpoint) -> None:
    select = pb.LoadRequest(select=pb.SelectTensors(names=["layer.1.weight"]))
    again = opening("/somewhere/else")
    call = raw.load(
        opening(checkpoint[0], memory_limit_bytes=8 * MIB), again, select, again, pb.LoadRequest()
    )
    manifest = next(call).manifest
    assert manifest.tensor_count == 24
    assert next(call).segment_ready.index == 0


def test_choosing_twice_counts_once(raw: RawClient, checkpoint: Checkpoint) -> None:
    call = raw.load(opening(checkpoint[0], list_tensors=True))
    assert next(call).listing.last
    for name in ("layer.1.weight", "layer.2.weight"):
        raw.send(pb.LoadRequest(select=pb.SelectTensors(names=[name])))
    assert next(call).manifest.tensor_count == 1
    assert [tensor.name for tensor in next(call).segment_ready.tensors] == ["layer.1.weight"]


def test_ending_the_requests_early_ends_nothing_else(raw: RawClient, checkpoint: Checkpoint) -> None:
    call = raw.load(opening(checkpoint[0], tensors=pb.SelectTensors(names=["layer.1.weight"])))
    raw.send(None)
    assert [message.WhichOneof("response") for message in call] == ["manifest", "segment_ready", "finished"]


def test_a_choice_that_never_comes_ends_with_the_call(raw: RawClient, checkpoint: Checkpoint) -> None:
    call = raw.load(opening(checkpoint[0], list_tensors=True))
    assert next(call).HasField("listing")
    call.cancel()


def test_thousands_of_sources_leave_the_daemon_able_to_open_files(
    daemon: DaemonProcess, checkpoint: Checkpoint
) -> None:
    """A file that is named thousands of times is open once, and more names than may be are refused."""
    path, tensors = checkpoint
    clients = [RawClient(daemon) for _ in range(4)]
    calls = [
        client.load(pb.LoadRequest(open=pb.OpenLoad(sources=[str(path)] * count, list_tensors=True)))
        for client, count in zip(clients, [MAX_SOURCES] * 3 + [MAX_SOURCES + 1], strict=True)
    ]
    for call in calls[:3]:
        assert next(call).HasField("listing")
    _, reason, message = refused(calls[3])
    assert (reason, message) == (
        "INVALID_REQUEST",
        "sources: 2001 are more than 2000; load fewer at a time",
    )
    # Those of the loads before are closed after a while.
    wait_until(lambda: daemon.fds().count(str(path)) == 3 * 2, "it to be open twice for each load")
    same(daemon.client().load_state_dict(path).items(), tensors)
    for client in clients:
        client.close()
    daemon.wait_idle()
    wait_until(lambda: str(path) not in daemon.fds(), "the files to be closed")


# ---- hostile files -------------------------------------------------------------------------------


def _file(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


HOSTILE: dict[str, Callable[[Path], Path]] = {
    "empty": lambda path: (path.write_bytes(b""), path)[1],
    "short": lambda path: (path.write_bytes(b"\x08\0\0"), path)[1],
    "length near 2^64": lambda path: _file(path, b"{}", length=HUGE),
    "length near 2^63": lambda path: _file(path, b"{}", length=2**63),
    "nested": lambda path: _file(path, b'{"a":' * 200_000),
    "offsets near 2^63": lambda path: _file(
        path,
        json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [2**63 - 2, 2**63 - 1]}}).encode(),
    ),
    "shape near 2^64": lambda path: _file(
        path, json.dumps({"x": {"dtype": "U8", "shape": [2**62, 4, 0], "data_offsets": [0, 0]}}).encode()
    ),
    "not JSON": lambda path: _file(path, b"\xff\xfe" * 100),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_costs_an_error_that_names_it(
    case: str, daemon: DaemonProcess, raw: RawClient, tmp_path: Path
) -> None:
    path = HOSTILE[case](tmp_path / "h.safetensors")
    _, reason, message = refused(raw.load(opening(path)))
    assert reason == "CHECKPOINT_INVALID"
    assert str(path) in message


def test_names_that_are_no_utf_8_are_refused_by_name(
    daemon: DaemonProcess, raw: RawClient, tmp_path: Path
) -> None:
    tensors = random_tensors(1, 10)
    write_checkpoint(tmp_path / "m.safetensors", tensors)
    (tmp_path / "m.safetensors").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.safetensors"))
    _, reason, message = refused(raw.load(opening(tmp_path)))
    assert reason == "CHECKPOINT_INVALID"
    assert str(tmp_path) in message


def test_what_clients_choose_cannot_forge_lines_of_the_log(daemon: DaemonProcess, raw: RawClient) -> None:
    refused(raw.load(opening("/x\n2026-01-01T00:00:00.000Z error forged=1\n\x1b[31m")))
    wait_until(lambda: "forged" in daemon.log(), "the load to be logged")
    assert not any(" forged=1" in line and "load=" not in line for line in daemon.log().splitlines())
    assert "\x1b" not in daemon.log()


# ---- what else is served -------------------------------------------------------------------------


def test_health_is_served(raw: RawClient) -> None:
    stub: Any = health_pb2_grpc.HealthStub(raw.channel)
    for service in ("", "penstock.v1.StreamerService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_service(raw: RawClient) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(raw.channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(stub.ServerReflectionInfo(iter([ask])))
    assert "penstock.v1.StreamerService" in [one.name for one in answer.list_services_response.service]


def test_many_sessions_at_once_get_different_tokens(daemon: DaemonProcess) -> None:
    found: list[RawClient] = []
    threads = [threading.Thread(target=lambda: found.append(RawClient(daemon))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({client.token for client in found}) == 20
    assert all(len(client.token) >= 32 for client in found)
    for client in found:
        client.close()
