"""Within v1 any client works with any daemon: recorded messages replayed to both."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from penstock.client import StreamerClient
from penstock.v1 import streamer_pb2 as pb

from .conftest import StartDaemon
from .support import same, wait_until
from .wire import METHODS, Recording, Replay, call, make_checkpoint, raw_channel, recordings, talk

# A field that this version does not know: number 9999, a string.
LATER = bytes([0xFA, 0xF0, 0x04, 0x05]) + b"later"
EACH = pytest.mark.parametrize("recording", recordings(), ids=lambda recording: recording.path.name)
BOTH = pytest.mark.parametrize("more", [b"", LATER], ids=["as-recorded", "with-later-fields"])
RESPONSES: dict[str, Any] = {
    "Load": pb.LoadResponse,
    "Prefetch": pb.PrefetchResponse,
    "Evict": pb.EvictResponse,
    "GetStatus": pb.GetStatusResponse,
}


@pytest.fixture
def directory() -> Iterator[Path]:
    made = make_checkpoint()
    yield made
    shutil.rmtree(made)


def truth(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in ("one", "two"):
        found.update(load_file(directory / f"{file}.safetensors"))
    return found


def test_there_are_recordings() -> None:
    assert recordings()
    for recording in recordings():
        names = {path.name.split(".")[0] for path in recording.path.iterdir()}
        assert names == {"handoff", *METHODS}


@EACH
@BOTH
def test_a_recorded_daemon_serves_this_client(
    recording: Recording, more: bytes, directory: Path, socket_dir: Path
) -> None:
    socket_dir.mkdir()
    replay = Replay(socket_dir, recording, directory, more)
    try:
        with StreamerClient(socket_dir) as client:
            tensors = talk(client, directory)
            assert client.status()["serving"] is True
            assert client.evict().freed_bytes >= 0
        same(tensors.items(), truth(directory))
        assert set(replay.received) == set(METHODS)
    finally:
        replay.close()


@EACH
def test_messages_of_a_kind_that_came_later_are_passed_over(
    recording: Recording, directory: Path, socket_dir: Path
) -> None:
    socket_dir.mkdir()
    replay = Replay(socket_dir, recording, directory)
    responses = replay._messages["Load.response"]
    replay._messages["Load.response"] = [message for one in responses for message in (LATER, one)]
    try:
        with StreamerClient(socket_dir) as client, client.load([directory / "one.safetensors"]) as load:
            same(load, truth(directory))
    finally:
        replay.close()


@EACH
@BOTH
def test_a_recorded_client_is_served_by_this_daemon(
    recording: Recording, more: bytes, directory: Path, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon("--memory-limit", "8MiB")
    answers = {}
    with raw_channel(daemon.socket_dir) as channel:
        for method in METHODS:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as handoff:
                handoff.connect(str(daemon.socket_dir / "handoff.sock"))
                token = pb.HandoffFrame.FromString(handoff.recv(1 << 16)).hello.token
                requests = [message + more for message in recording.messages(f"{method}.request", directory)]
                kind = RESPONSES[method]
                answers[method] = [kind.FromString(raw) for raw in call(channel, method, requests, token)]
            wait_until(lambda: not daemon.leased_bytes(), "the lease to end")
    names = [tensor.name for response in answers["Load"] for tensor in response.segment_ready.tensors]
    assert sorted(names) == sorted(truth(directory))
    assert answers["Load"][-1].HasField("finished")
    assert answers["Prefetch"][-1].done
    assert answers["GetStatus"][0].serving
    assert answers["Evict"][0].freed_bytes
