"""One call of Load against one daemon process: from the request to the last segment.

Stream knows the order of messages and trusts none of their numbers. `segments.py` and `load.py` decide what a
load means to its caller, and what happens when the daemon dies.
"""

from __future__ import annotations

import ctypes
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import torch

from penstock.v1 import streamer_pb2 as pb

from .. import errors
from ..system.shield import end, shielded
from . import tensors
from .copies import CopyPool
from .mapping import Mapping
from .name_parts import parts
from .progress import tell_queued
from .receiver import Receiver
from .rpc import Session

# Gets all tensors of the checkpoint, and returns the names of those to load.
Choose = Callable[[list[pb.Tensor]], Sequence[str]]


class Stream:
    """An open load. `close()` gives everything back, except what living tensors still need."""

    def __init__(self, socket_dir: Path, request: pb.OpenLoad, choose: Choose | None = None) -> None:
        """Returns when the manifest has arrived and the slabs are mapped.

        Fills `request.tensors` with the answer of `choose`, so that the same request opens the same load
        again. Raises the error with which the daemon refuses the load.
        """
        self.closed = False
        self.finished: pb.Finished | None = None
        self.manifest = pb.Manifest()
        self._begun = False
        self._mapping: Mapping | None = None
        self._leased = False
        self._segments = 0
        self._requests = _Requests()
        self._receiver = Receiver()
        self._pid = os.getpid()
        self._connected: Session | None = None
        self._call: Any = None
        try:
            self._receiver.start(lambda: self._begin(socket_dir, request))
            self.manifest = self._await_manifest(request, choose)
            if self.manifest.variant != request.variant:
                raise errors.ProtocolError(
                    f"the daemon in {socket_dir} does not know variants, and would load the default one "
                    f"instead of {request.variant!r} ({self._session.versions}): upgrade the daemon, or name "
                    "the variant's files themselves"
                )
            if (request.verify or request.digests) and not self.manifest.verify:
                raise errors.ProtocolError(
                    f"the daemon in {socket_dir} does not know checksums, and would not verify this load "
                    f"({self._session.versions}): upgrade the daemon, or leave out verify and digests"
                )
            if self.manifest.slab_count:
                shielded(self._map_slabs)
        except BaseException:
            self.close()
            raise

    def next_segment(self) -> pb.SegmentReady | None:
        """The next segment whose bytes are in memory, None after the last one.

        Raises DaemonUnavailableError when the daemon is gone, LoadClosedError after `close()`.
        """
        response = self._receive()
        if response is None:
            raise self._broken("the end of the call before its last message")
        kind = response.WhichOneof("response")
        if kind == "segment_ready":
            self._check(response.segment_ready)
            self._segments += 1
            return response.segment_ready
        if kind != "finished":
            raise self._broken(f"{kind} where a segment should come")
        if self._segments != self.manifest.segment_count:
            raise self._broken(f"the end after {self._segments} of {self.manifest.segment_count} segments")
        self._requests.end()
        self.finished = response.finished
        if self._receive() is not None:  # a call that is left before its status counts as cancelled
            raise self._broken("a message after the last")
        return None

    def check_intact(self) -> None:
        """Raises CheckpointCorruptError if the daemon has found a file of the load to be damaged since it
        announced the segments that are here. To be called before a tensor is yielded."""
        self._session.handoff.check()

    def wrap(
        self, segment: pb.SegmentReady, *, copies: CopyPool | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a segment of this stream: views of the ring, or copies."""
        mapping = self._open_mapping()
        array = tensors.NO_BYTES if mapping is None else mapping.array
        return tensors.wrap_segment(
            array, segment.tensors, start=segment.ring_offset, size_bytes=segment.size_bytes, copies=copies
        )

    def release(self, segment: pb.SegmentReady, *, written: bool) -> None:
        """Lets the daemon reuse the space of `segment` and all before it.

        `written`: views of it may have been written to.
        """
        mapping = self._mapping
        if written and mapping is not None:
            mapping.discard(segment.ring_offset, segment.size_bytes)
        self._requests.send(pb.LoadRequest(release=pb.Release(segments=segment.index + 1)))

    def revoke(self) -> None:
        """Ends the lease although views may still live. They show zeros from now on."""
        mapping = self._mapping
        if mapping is not None:
            mapping.revoke()

    def close(self) -> None:
        """Ends the call, and the lease once the last view has died. May be called again, by any thread."""
        self.closed = True
        self._mapping = None
        if self._pid != os.getpid():
            self._forget()
            return
        self._requests.end()
        if not end(self._give_back) and self._connected is not None and not self._leased:
            self._connected.handoff.close()  # without it the daemon ends the load

    def _give_back(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()
            self._receiver.stop()
        if self._connected is not None:
            self._connected.close(keep_lease=self._leased)

    def _forget(self) -> None:
        """For a forked child. gRPC's threads do not exist there, and its locks may be held for ever. Its
        sockets are the parent's too, and anything sent on them would end the parent's load. So objects of
        gRPC are neither closed nor collected."""
        for inherited in (self._call, self._connected):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
        if self._connected is not None and not self._leased:
            self._connected.handoff.close()

    @property
    def _session(self) -> Session:
        """Raises LoadClosedError if it was closed before it was connected."""
        if self._connected is None:
            raise errors.closed(self.manifest.load_id)
        return self._connected

    def _begin(self, socket_dir: Path, request: pb.OpenLoad) -> Iterator[pb.LoadResponse]:
        """Connects, and begins the call."""
        try:
            self._connected = session = Session(socket_dir)
            self._send_opening(request)
            self._call = call = session.service.Load(self._requests, metadata=session.metadata)
            return iter(call)
        finally:
            if self.closed:  # meanwhile, so that `close` may have missed something
                self._give_back()

    def _await_manifest(self, request: pb.OpenLoad, choose: Choose | None) -> pb.Manifest:
        listed: list[pb.Tensor] = []
        while True:
            response = self._receive()
            if response is None:
                raise self._broken("the end of the call before a manifest")
            kind = response.WhichOneof("response")
            if kind == "manifest":
                return response.manifest
            if kind == "listing" and choose is not None:
                listed.extend(response.listing.tensors)
                if response.listing.last:
                    request.list_tensors = False
                    request.tensors.CopyFrom(pb.SelectTensors(names=choose(listed)))
                    self._send_names(request.tensors.names)
                    choose = None
            elif kind == "queued":
                tell_queued(response.queued)
            else:
                raise self._broken(f"{kind} where the manifest should come")

    def _send_opening(self, request: pb.OpenLoad) -> None:
        """Sends several messages, if the request names more tensors than fit into one."""
        limit_bytes = self._session.handoff.max_request_bytes
        if not limit_bytes or request.ByteSize() < limit_bytes - 64:
            self._requests.send(pb.LoadRequest(open=request))
            return
        first = pb.OpenLoad()
        first.CopyFrom(request)
        del first.tensors.names[:]
        if request.HasField("tensors"):
            first.tensors.more = True
        self._requests.send(pb.LoadRequest(open=first))
        if request.HasField("tensors"):
            self._send_names(request.tensors.names)

    def _send_names(self, names: Sequence[str]) -> None:
        waiting: list[str] | None = None
        for part in parts(names, self._session.handoff.max_request_bytes):
            if waiting is not None:
                self._requests.send(pb.LoadRequest(select=pb.SelectTensors(names=waiting, more=True)))
            waiting = part
        self._requests.send(pb.LoadRequest(select=pb.SelectTensors(names=waiting)))

    def _map_slabs(self) -> None:
        manifest, handoff = self.manifest, self._session.handoff
        self._leased = True  # from here on the mapping closes the connection
        self._mapping = Mapping(
            handoff.receive_slabs(manifest.slab_count),
            slab_count=manifest.slab_count,
            slab_bytes=manifest.slab_bytes,
            mirrored=not manifest.full,
            release=handoff.close if manifest.full else handoff.end,
        )
        if self.closed:  # meanwhile, and nobody else drops it
            self._mapping = None

    def _check(self, segment: pb.SegmentReady) -> None:
        mapping = self._open_mapping()
        capacity = mapping.capacity_bytes if mapping else 0
        mapped = mapping.mapped_bytes if mapping else 0
        if (
            segment.index != self._segments
            or segment.index >= self.manifest.segment_count
            or segment.ring_offset >= max(capacity, 1)
            or segment.size_bytes > capacity
            or segment.ring_offset + segment.size_bytes > mapped
        ):
            raise self._broken(
                f"segment {segment.index} of {segment.size_bytes} bytes at {segment.ring_offset}, which does "
                f"not fit segment {self._segments} of {self.manifest.segment_count}, ring of {capacity} bytes"
            )

    def _open_mapping(self) -> Mapping | None:
        """None if the checkpoint has only zero-size tensors. Raises LoadClosedError."""
        mapping = self._mapping
        if self.closed:  # by another thread, perhaps before the mapping was looked at
            raise errors.closed(self.manifest.load_id)
        return mapping

    def _receive(self) -> pb.LoadResponse | None:
        """The next message of a kind that this version knows; a newer daemon may send others between."""
        try:
            response = self._receiver.next()
            while response is not None and response.WhichOneof("response") is None:
                response = self._receiver.next()
        except Exception as error:
            if self.closed:
                raise errors.closed(self.manifest.load_id) from None
            if not isinstance(error, grpc.RpcError):
                raise
            raise self._session.error(error, load_id=self.manifest.load_id, begun=self._begun) from error
        self._begun = True
        return response

    def _broken(self, what: str) -> errors.ProtocolError:
        return errors.broken(
            f"{what} was sent by the other side ({self._session.versions})", load_id=self.manifest.load_id
        )


class _Requests:
    """The request side of the call, read by gRPC's thread until `end()`. Keeps no Stream alive."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[pb.LoadRequest | None] = queue.SimpleQueue()

    def send(self, request: pb.LoadRequest) -> None:
        self._queue.put(request)

    def end(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> _Requests:
        return self

    def __next__(self) -> pb.LoadRequest:
        request = self._queue.get()
        if request is None:
            raise StopIteration
        return request
