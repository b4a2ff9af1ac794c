"""A daemon written against streamer.proto alone: real gRPC, real sockets, real sealed memfds, no storage.

It serves one checkpoint that lies in memory, from a full ring or a window, and does on demand what a
real daemon must never do: lies in the manifest, segments out of range, dying between two segments.
It overwrites what a client released, so that a tensor that still looks there is caught.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from penstock.v1 import streamer_pb2 as pb
from penstock.v1 import streamer_pb2_grpc

SLAB_BYTES = 2 * 1024 * 1024
PAGE = 4096
F_ADD_SEALS, SHRINK, GROW, FUTURE_WRITE = 1033, 0x2, 0x4, 0x10


@dataclass(frozen=True)
class FakeTensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def make_slab(
    size_bytes: int = SLAB_BYTES, seals: int = SHRINK | GROW | FUTURE_WRITE, name: str = "fake-slab"
) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    memory = mmap.mmap(fd, size_bytes)
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd, memory


def send_frame(connection: socket.socket, frame: pb.HandoffFrame, fds: list[int] | None = None) -> None:
    if fds:
        socket.send_fds(connection, [frame.SerializeToString()], fds)
    else:
        connection.send(frame.SerializeToString())


@dataclass
class Behaviour:
    """What the daemon does; tests change it."""

    window_slabs: int = 0  # 0: a full ring
    tensors_per_segment: int = 3
    version: str = "v1"
    # One entry per load: segments sent before the call breaks as if the process had died.
    die_after: list[int] = field(default_factory=list)
    refuse_hello: tuple[str, str] | None = None
    # gRPC status, reason, message
    refuse_load: tuple[grpc.StatusCode, str, str] | None = None
    tamper_manifest: Callable[[pb.Manifest], object] = lambda manifest: None
    tamper_segment: Callable[[pb.SegmentReady], object] = lambda segment: None
    stall_before_segment: int | None = None
    finish: bool = True
    # Whether anything that is to be evicted is there.
    evicts: bool = True
    # What it answers to a fetch.
    fetched: list[pb.FetchResponse] = field(default_factory=lambda: [pb.FetchResponse(done=True)])
    # gRPC status, reason, message with which prefetches and fetches end that were said to be done.
    refuse_end: tuple[grpc.StatusCode, str, str] | None = None
    # So many loads, and prefetches, break once they were told their place in the queue.
    die_queued: int = 0


@contextlib.contextmanager
def acting_after(event: threading.Event, act: Callable[[], object]) -> Iterator[None]:
    """Meanwhile another thread does that, once the event has come."""

    def wait_and_act() -> None:
        assert event.wait(60)
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    try:
        yield
    finally:
        thread.join()


class FakeDaemon(streamer_pb2_grpc.StreamerServiceServicer):
    def __init__(self, socket_dir: Path, tensors: list[FakeTensor], behaviour: Behaviour) -> None:
        self.socket_dir = socket_dir
        self.tensors = tensors
        self.behaviour = behaviour
        self.opens: list[pb.OpenLoad] = []
        self.prefetches: list[pb.PrefetchRequest] = []
        self.fetches: list[pb.FetchRequest] = []
        self.releases: list[int] = []
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.stalled = threading.Event()
        self.broken = threading.Event()
        self.connections: dict[str, socket.socket] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server = grpc.server(ThreadPoolExecutor(8))
        streamer_pb2_grpc.add_StreamerServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{socket_dir}/penstock.sock")
        self._server.start()
        self._listener.bind(os.fspath(socket_dir / "handoff.sock"))
        self._listener.listen()
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()

    def stop(self) -> None:
        if self._listener.fileno() < 0:
            return
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        self._server.stop(None).wait()
        for connection in self.connections.values():
            connection.close()

    def await_leases_closed(self) -> None:
        """Returns when every client has closed its handoff connection; times out otherwise."""
        for connection in self.connections.values():
            connection.settimeout(60)
            with contextlib.suppress(ConnectionResetError):  # closed with slabs in it that nobody took
                assert connection.recv(1) == b""

    def when_stalled(self, act: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
        """Meanwhile another thread does that, once a load has come to stand still."""
        return acting_after(self.stalled, act)

    def leased(self) -> bool:
        def open_(connection: socket.socket) -> bool:
            try:
                return bool(connection.recv(1, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return True

        return any(open_(connection) for connection in self.connections.values())

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            token = f"token-{len(self.connections)}"
            self.connections[token] = connection
            if self.behaviour.refuse_hello is not None:
                reason, message = self.behaviour.refuse_hello
                frame = pb.HandoffFrame(refused=pb.HandoffRefused(reason=reason, message=message))
            else:
                frame = pb.HandoffFrame(hello=pb.HandoffHello(token=token, daemon_version="fake"))
            send_frame(connection, frame)

    # ---- the service ----

    def GetStatus(self, request: pb.GetStatusRequest, context: grpc.ServicerContext) -> pb.GetStatusResponse:
        self._connection(context)
        return pb.GetStatusResponse(
            version="fake", pid=os.getpid(), serving=True, stages=[pb.StageStatus(id=7, sources=["/a", "/b"])]
        )

    def Evict(self, request: pb.EvictRequest, context: grpc.ServicerContext) -> pb.EvictResponse:
        self._connection(context)
        if not self.behaviour.evicts:
            return pb.EvictResponse()
        return pb.EvictResponse(freed_bytes=len(request.sources), leased_bytes=5)

    def Prefetch(
        self, requests: Iterator[pb.PrefetchRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.PrefetchResponse]:
        self._connection(context)
        self.prefetches.append(next(requests))
        yield pb.PrefetchResponse(queued=pb.Queued(place=1))
        self._die_queued(context)
        yield pb.PrefetchResponse(ready_bytes=1, total_bytes=2)
        yield pb.PrefetchResponse(ready_bytes=2, total_bytes=2, done=True)
        self._refuse_end(context)

    def Fetch(
        self, requests: Iterator[pb.FetchRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.FetchResponse]:
        self._connection(context)
        more = True
        while more:
            self.fetches.append(next(requests))
            more = self.fetches[-1].more
        yield from self.behaviour.fetched
        self._refuse_end(context)

    def Load(
        self, requests: Iterator[pb.LoadRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.LoadResponse]:
        try:
            yield from self._load(requests, context)
            self.ended.put("ok")
        except GeneratorExit:
            self.ended.put("cancelled")
            raise
        except BaseException as error:
            self.ended.put(type(error).__name__)
            raise

    def _load(
        self, requests: Iterator[pb.LoadRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.LoadResponse]:
        behaviour = self.behaviour
        connection = self._connection(context)
        request = pb.OpenLoad()
        request.CopyFrom(next(requests).open)
        self.opens.append(request)
        if behaviour.refuse_load is not None:
            refuse(context, *behaviour.refuse_load)
        if request.expect_version not in ("", behaviour.version):
            refuse(context, grpc.StatusCode.ABORTED, "CHECKPOINT_CHANGED", "it changed")
        yield pb.LoadResponse(queued=pb.Queued(place=1, reason="for the test"))
        tensors = self.tensors
        if request.list_tensors:
            for index, tensor in enumerate(tensors):
                entry = pb.Tensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape)
                yield pb.LoadResponse(listing=pb.Listing(tensors=[entry], last=index == len(tensors) - 1))
            request.tensors.CopyFrom(next(requests).select)
        if request.HasField("tensors"):
            tensors = [tensor for tensor in tensors if tensor.name in request.tensors.names]
        self._die_queued(context)
        tensors = tensors[request.skip_tensors :]
        step = behaviour.tensors_per_segment
        segments = [tensors[i : i + step] for i in range(0, len(tensors), step)]
        ring = Ring(behaviour.window_slabs, segments)
        manifest = pb.Manifest(
            load_id="load-1",
            version=behaviour.version,
            slab_count=len(ring.slabs),
            slab_bytes=SLAB_BYTES,
            full=not behaviour.window_slabs,
            tensor_count=len(tensors),
            segment_count=len(segments),
            total_bytes=sum(len(tensor.data) for tensor in tensors),
            warm_bytes=0,
            variant=request.variant,
            verify=request.verify or "auto",
            files=[
                pb.CheckpointFile(uri="/fake/a", size_bytes=1, metadata={"format": "pt", "who": "a"}),
                pb.CheckpointFile(uri="/fake/b", size_bytes=2, metadata={"who": "b"}),
            ],
        )
        behaviour.tamper_manifest(manifest)
        ring.send(connection)
        yield pb.LoadResponse(manifest=manifest)
        die_after = behaviour.die_after.pop(0) if behaviour.die_after else None
        released: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        reader = threading.Thread(target=self._read_releases, args=(requests, released), daemon=True)
        reader.start()
        for index, segment in enumerate(segments):
            if index == die_after:
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            if index == behaviour.stall_before_segment:
                gone = threading.Event()
                if context.add_callback(gone.set):
                    self.stalled.set()
                    gone.wait(60)
                return
            while not ring.fits(segment):
                count = released.get(timeout=60)
                if count is None:
                    return
                ring.release(count)
            ready = ring.write(index, segment)
            behaviour.tamper_segment(ready)
            yield pb.LoadResponse(segment_ready=ready)
        if die_after == len(segments):
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        if behaviour.finish:
            yield pb.LoadResponse(finished=pb.Finished(waited_seconds=0.5, read_bytes=manifest.total_bytes))
            reader.join(60)

    def _refuse_end(self, context: grpc.ServicerContext) -> None:
        if self.behaviour.refuse_end is not None:
            refuse(context, *self.behaviour.refuse_end)

    def _die_queued(self, context: grpc.ServicerContext) -> None:
        if self.behaviour.die_queued:
            self.behaviour.die_queued -= 1
            self.broken.set()
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    def _read_releases(
        self, requests: Iterator[pb.LoadRequest], released: queue.SimpleQueue[int | None]
    ) -> None:
        try:
            for request in requests:
                self.releases.append(request.release.segments)
                released.put(request.release.segments)
        except Exception:  # the client went away
            pass
        released.put(None)

    def _connection(self, context: grpc.ServicerContext) -> socket.socket:
        metadata = dict(context.invocation_metadata())
        token = str(metadata.get("penstock-session", ""))
        if token not in self.connections:
            refuse(context, grpc.StatusCode.UNAUTHENTICATED, "SESSION_REQUIRED", "no session")
        return self.connections[token]


class Ring:
    """Segments at increasing positions, each congruent to 8 modulo the page, in a ring of slabs."""

    def __init__(self, window_slabs: int, segments: list[list[FakeTensor]]) -> None:
        sizes = [sum(len(tensor.data) for tensor in segment) for segment in segments]
        need = sum(-(-(8 + size) // PAGE) * PAGE for size in sizes)
        count = window_slabs or -(-need // SLAB_BYTES)
        self.slabs = [make_slab() for _ in range(count)]
        self.capacity = count * SLAB_BYTES
        self._spans: list[tuple[int, int]] = []
        self._released = 0
        self._head = 0

    def send(self, connection: socket.socket) -> None:
        for first in range(0, len(self.slabs), 253):
            fds = [fd for fd, _ in self.slabs[first : first + 253]]
            send_frame(connection, pb.HandoffFrame(slabs=pb.HandoffSlabs(first=first, count=len(fds))), fds)
        for fd, _ in self.slabs:
            os.close(fd)

    def fits(self, segment: list[FakeTensor]) -> bool:
        size = sum(len(tensor.data) for tensor in segment)
        tail = self._spans[self._released][0] if self._released < len(self._spans) else self._head
        assert 8 + size <= self.capacity, "the test's window is too small"
        return -(-(self._head + 8 + size) // PAGE) * PAGE - tail <= self.capacity

    def release(self, count: int) -> None:
        for start, end in self._spans[self._released : count]:
            self._put(start, b"\xee" * (end - start))
        self._released = max(self._released, count)

    def write(self, index: int, segment: list[FakeTensor]) -> pb.SegmentReady:
        data = b"".join(tensor.data for tensor in segment)
        self._put(self._head + 8, data)
        ready = pb.SegmentReady(
            index=index,
            ring_offset=(self._head + 8) % self.capacity if self.capacity else 0,
            size_bytes=len(data),
        )
        offset = 0
        for tensor in segment:
            ready.tensors.add(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                offset=offset,
                size_bytes=len(tensor.data),
            )
            offset += len(tensor.data)
        end = -(-(self._head + 8 + len(data)) // PAGE) * PAGE
        self._spans.append((self._head, end))
        self._head = end
        return ready

    def _put(self, position: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            place = (position + done) % self.capacity
            slab, at = divmod(place, SLAB_BYTES)
            size = min(SLAB_BYTES - at, len(data) - done)
            self.slabs[slab][1][at : at + size] = data[done : done + size]
            done += size


def refuse(context: grpc.ServicerContext, status: grpc.StatusCode, reason: str, message: str) -> None:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="penstock", metadata={"load_id": "load-9"}))
    packed = status_pb2.Status(code=status.value[0], message=message, details=[detail])
    context.set_trailing_metadata((("grpc-status-details-bin", packed.SerializeToString()),))
    context.abort(status, message)


def random_tensors(count: int, size_bytes: int, seed: int = 0) -> list[FakeTensor]:
    import random

    source = random.Random(seed)
    sizes = [max(4, size_bytes + 4 * (index % 7)) // 4 * 4 for index in range(count)]
    return [
        FakeTensor(f"t{index}", "I32", (size // 4,), source.randbytes(size))
        for index, size in enumerate(sizes)
    ]
