"""What a daemon takes back after it was announced is not yielded: a file turned out not to match its
checksum."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from penstock.client import CheckpointCorruptError, StreamerClient, delivery
from penstock.client.cuda import device as cuda
from penstock.client.load import Load
from penstock.client.ring.handoff import Handoff
from penstock.v1 import streamer_pb2 as pb

from .conftest import StartDaemon
from .fake_daemon import FakeDaemon, send_frame
from .fake_device import FakeDevice
from .samples import FULL_AND_WINDOW, TENSORS, assert_equal

OWNED = pytest.mark.parametrize("owned", [True, False])
DEVICE = pytest.mark.parametrize("device", ["cpu", "cuda:0"])


@pytest.fixture(autouse=True)
def looks_before_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """No millisecond passes between two of these tensors."""
    monkeypatch.setattr(delivery, "CHECK_SECONDS", 0.0)


def failed() -> pb.HandoffFrame:
    info = error_details_pb2.ErrorInfo(
        reason="CHECKPOINT_CORRUPT", domain="penstock", metadata={"file": "/x", "load_id": "load-1"}
    )
    packed = any_pb2.Any()
    packed.Pack(info)
    status = status_pb2.Status(code=15, message="/x: it is damaged; load it again", details=[packed])
    return pb.HandoffFrame(failed=pb.HandoffFailed(status=status.SerializeToString()))


def take_back(daemon: FakeDaemon) -> None:
    for connection in daemon.connections.values():
        send_frame(connection, failed())


def open_load(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, device: str, *, owned: bool) -> Load:
    if device != "cpu":
        fake = FakeDevice()
        monkeypatch.setattr(cuda, "open_device", lambda wanted: fake)
    return StreamerClient(daemon.socket_dir).load("/x", device=device, owned=owned)


@DEVICE
@OWNED
@FULL_AND_WINDOW
@pytest.mark.parametrize("before", [1, len(TENSORS) - 1])
def test_nothing_more_is_yielded_though_it_was_announced_and_copied(
    before: int,
    window_slabs: int,
    owned: bool,
    device: str,
    start_daemon: StartDaemon,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daemon = start_daemon(TENSORS, window_slabs=window_slabs)
    with open_load(daemon, monkeypatch, device, owned=owned) as load:
        iterator = iter(load)
        for _ in range(before):
            next(iterator)
        take_back(daemon)
        with pytest.raises(CheckpointCorruptError, match=r"/x: it is damaged; load it again") as caught:
            next(iterator)
        assert (caught.value.details["file"], caught.value.load_id) == ("/x", "load-1")
        assert load.stats.tensors == before
        with pytest.raises(StopIteration):
            next(iterator)


@DEVICE
def test_a_load_whose_last_tensor_was_yielded_ends_with_the_error(
    device: str, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon(TENSORS)
    with open_load(daemon, monkeypatch, device, owned=True) as load:
        iterator = iter(load)
        for _ in TENSORS:
            next(iterator)
        take_back(daemon)
        with pytest.raises(CheckpointCorruptError):
            next(iterator)


@OWNED
def test_who_keeps_the_error_keeps_no_lease(owned: bool, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS)
    with StreamerClient(daemon.socket_dir).load("/x", owned=owned) as load:
        iterator = iter(load)
        next(iterator)
        take_back(daemon)
        with pytest.raises(CheckpointCorruptError) as kept:
            next(iterator)
    daemon.await_leases_closed()
    assert kept.value.details["file"] == "/x"


@pytest.mark.parametrize(
    "what",
    [socket.socket.close, lambda connection: connection.send(b"\xfa\x01\x00")],
    ids=["its end", "an empty field 31, as of a newer daemon"],
)
def test_nothing_else_on_the_connection_takes_anything_back(
    what: Callable[[socket.socket], object], start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(TENSORS)
    found: dict[str, torch.Tensor] = {}
    with StreamerClient(daemon.socket_dir).load("/x") as load:
        for name, tensor in load:
            found[name] = tensor
            for connection in daemon.connections.values():
                what(connection)
    assert_equal(found)


def test_what_is_taken_back_before_the_slabs_came_is_the_same_error(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        send_frame(theirs, pb.HandoffFrame(hello=pb.HandoffHello(token="token")))
        send_frame(theirs, failed())
        handoff = Handoff(ours, os.fspath(tmp_path))
        with pytest.raises(CheckpointCorruptError, match="it is damaged"):
            list(handoff.receive_slabs(1))
        handoff.close()
