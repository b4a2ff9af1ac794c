"""Conversations as they went over the sockets: recorded once for each release, replayed by test_wire.py.

    python -m tests.e2e.wire        # from the repository's root; writes tests/data/wire-VERSION

A directory holds one file for each message, as the bytes that were sent. Paths in them name a directory
whose name has always the same length, so that a replay can put its own in their place.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import torch
from safetensors.torch import save_file

from penstock.v1 import streamer_pb2 as pb

DATA = Path(__file__).parents[1] / "data"
SERVICE = "penstock.v1.StreamerService"
PLACEHOLDER = b"/tmp/penstock-recorded-XXXXXXXX/"
METHODS = ("Load", "Prefetch", "Evict", "GetStatus")
SHAPES = {"a": (3, 5), "b": (70, 70), "c": ()}


def make_checkpoint() -> Path:
    """A directory with two files whose contents never change. For whoever calls to remove."""
    directory = Path(tempfile.mkdtemp(prefix="penstock-recorded-", dir="/tmp"))
    assert len(f"{directory}/") == len(PLACEHOLDER)
    for number, file in enumerate(("one", "two")):
        tensors = {
            f"{file}.{name}": (torch.arange(torch.Size(shape).numel()) % 251 + number).float().reshape(shape)
            for name, shape in SHAPES.items()
        }
        save_file(tensors, directory / f"{file}.safetensors", {"format": "pt"})
    return directory


class Recording:
    """The messages of one release; `placed` puts a directory's name into them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def messages(self, name: str, directory: Path) -> list[bytes]:
        """Of one side of one conversation, such as Load.request, in order."""
        return [
            path.read_bytes().replace(PLACEHOLDER, f"{directory}/".encode())
            for path in sorted(self.path.glob(f"{name}.*.bin"))
        ]

    def write(self, name: str, messages: Iterable[bytes], directory: Path) -> None:
        for number, message in enumerate(messages):
            placed = message.replace(f"{directory}/".encode(), PLACEHOLDER)
            (self.path / f"{name}.{number}.bin").write_bytes(placed)


def recordings() -> list[Recording]:
    return [Recording(path) for path in sorted(DATA.glob("wire-*"))]


def raw_channel(socket_dir: Path) -> Any:
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.insecure_channel(f"unix:{socket_dir / 'penstock.sock'}", options=options)


def call(channel: Any, method: str, requests: Sequence[bytes], token: str) -> Iterator[bytes]:
    """What a daemon answers to requests that were sent by somebody else."""
    metadata = (("penstock-session", token),)
    path = f"/{SERVICE}/{method}"
    if method == "Load":
        yield from channel.stream_stream(path)(iter(requests), metadata=metadata, timeout=60)
    elif method == "Prefetch":
        yield from channel.unary_stream(path)(requests[0], metadata=metadata, timeout=60)
    else:
        yield channel.unary_unary(path)(requests[0], metadata=metadata, timeout=60)


class Replay:
    """A daemon of bytes: sends what a recording holds, and the recorded segments' contents in slabs."""

    def __init__(self, socket_dir: Path, recording: Recording, directory: Path, more: bytes = b"") -> None:
        """`more` is put behind every message, as fields that a later version added would be."""
        self.received: dict[str, list[bytes]] = {}
        self._messages = {
            name: [message + more for message in recording.messages(name, directory)]
            for name in ("handoff", *(f"{method}.response" for method in METHODS))
        }
        self._directory = directory
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(socket_dir / "handoff.sock"))
        self._listener.listen()
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()
        self._server = grpc.server(ThreadPoolExecutor(4))
        handlers: dict[str, Any] = {
            "Load": grpc.stream_stream_rpc_method_handler(self._load),
            "Prefetch": grpc.unary_stream_rpc_method_handler(self._many("Prefetch")),
            "Evict": grpc.unary_unary_rpc_method_handler(self._one("Evict")),
            "GetStatus": grpc.unary_unary_rpc_method_handler(self._one("GetStatus")),
        }
        handler = grpc.method_handlers_generic_handler(SERVICE, handlers)
        self._server.add_generic_rpc_handlers((handler,))
        self._server.add_insecure_port(f"unix:{socket_dir / 'penstock.sock'}")
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        for connection in (self._listener, *self._connections):
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            connection.send(self._messages["handoff"][0])

    def _load(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        received = self.received["Load"] = [next(requests)]
        responses = self._messages["Load.response"]
        parsed = [pb.LoadResponse.FromString(response) for response in responses]
        manifest = next(one.manifest for one in parsed if one.HasField("manifest"))
        segments = [one.segment_ready for one in parsed if one.HasField("segment_ready")]
        slabs = [memory_of(manifest.slab_bytes) for _ in range(manifest.slab_count)]
        for segment, file in zip(segments, manifest.files, strict=True):
            data = Path(file.uri).read_bytes()[-segment.size_bytes :]
            slab, offset = divmod(segment.ring_offset, manifest.slab_bytes)
            os.pwrite(slabs[slab], data, offset)
        for slab in slabs:
            seal(slab)
        socket.send_fds(self._connections[-1], [self._messages["handoff"][1]], slabs)
        for slab in slabs:
            os.close(slab)
        yield from responses
        received.extend(requests)

    def _many(self, method: str) -> Any:
        def answer(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            self.received[method] = [request]
            yield from self._messages[f"{method}.response"]

        return answer

    def _one(self, method: str) -> Any:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.received[method] = [request]
            return self._messages[f"{method}.response"][0]

        return answer


def memory_of(size_bytes: int) -> int:
    fd = os.memfd_create("replayed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    return fd


def seal(fd: int) -> None:
    import fcntl

    fcntl.fcntl(fd, 1033, 0x2 | 0x4 | 0x10)  # F_ADD_SEALS: SHRINK, GROW, FUTURE_WRITE


def record() -> None:
    """What this release's client and daemon say to each other."""
    from penstock.client import StreamerClient
    from penstock.client.system.version import client_version

    from .support import running_daemon

    target = DATA / f"wire-{client_version()}"
    target.mkdir(parents=True, exist_ok=True)
    recording = Recording(target)
    directory = make_checkpoint()
    with running_daemon("--memory-limit", "8MiB") as daemon, tempfile.TemporaryDirectory() as top:
        for method in METHODS:
            requests = _requests(directory, method)
            recording.write(f"{method}.request", requests, directory)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as handoff:
                handoff.connect(str(daemon.socket_dir / "handoff.sock"))
                packets = [handoff.recv(1 << 16)]
                token = pb.HandoffFrame.FromString(packets[0]).hello.token
                with raw_channel(daemon.socket_dir) as channel:
                    responses = list(call(channel, method, requests, token))
                if method == "Load":
                    packets.append(handoff.recv(1 << 16))
                    recording.write("handoff", packets, directory)
            recording.write(f"{method}.response", responses, directory)
        # What the client itself says, from the other side.
        replay = Replay(Path(top), recording, directory)
        try:
            with StreamerClient(top) as client:
                talk(client, directory)
        finally:
            replay.close()
        for method in METHODS:
            recording.write(f"{method}.request", replay.received[method], directory)
    shutil.rmtree(directory)


def talk(client: Any, directory: Path) -> dict[str, torch.Tensor]:
    """One call of each kind; the tensors of the load."""
    sources = [directory / "one.safetensors", directory / "two.safetensors"]
    with client.load(sources) as load:
        tensors = dict(load)
    client.prefetch(sources)
    client.status()
    client.evict(sources)
    return tensors


def _requests(directory: Path, method: str) -> list[bytes]:
    sources = [f"{directory}/one.safetensors", f"{directory}/two.safetensors"]
    if method == "Load":
        return [pb.LoadRequest(open=pb.OpenLoad(sources=sources)).SerializeToString()]
    kinds: dict[str, Any] = {"Prefetch": pb.PrefetchRequest, "Evict": pb.EvictRequest}
    if method in kinds:
        return [bytes(kinds[method](sources=sources).SerializeToString())]
    return [pb.GetStatusRequest().SerializeToString()]


if __name__ == "__main__":
    record()
