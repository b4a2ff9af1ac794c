"""One load, from the request to the last tensor.

load()      connect, ask, wait for memory, get the manifest, map the slabs       (stream.py)
iterate     segment by segment: wait until its bytes are there,
            wrap its tensors                                                     (tensors.py)
                full ring            views, which keep the slabs leased
                window, owned        copies
                window, not owned    views, good until the next iteration
                cuda                 copies there, segments ahead                (transfer.py)
                other device         copies there
            yield them one by one,
            and from a window release the segment, so that its space is read into again
interrupted by the death of the daemon: wait for the next one                    (reconnect.py),
            check that it has the same version, skip what was yielded, go on
close       at the end, or wherever the caller stops: the call, the channel, the mapping
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch

from penstock.v1 import streamer_pb2 as pb

from . import errors
from .cuda import device as cuda
from .cuda.pinned import RingClosedError
from .cuda.transfer import Departures, Tensors, Transfer, run_ahead
from .ring.copies import CopyPool
from .ring.progress import Bar
from .ring.reconnect import persist
from .ring.stream import Choose, Stream
from .summary import LoadedFile, LoadStats
from .system.sizes import pinned_bytes, show_bytes

_log = logging.getLogger("penstock.client")


class Load:
    """Yields (name, tensor) once, in the order of the files. Made by `StreamerClient.load()`.

    Leaving it early by `close()`, by its `with` block, by an exception or by dropping it gives
    everything back that no living tensor needs. Not to be iterated by two threads; any may close it.
    """

    def __init__(
        self,
        socket_dir: Path,
        request: pb.OpenLoad,
        *,
        choose: Choose | None,
        device: torch.device,
        owned: bool,
        progress: bool,
        reconnect_timeout: float,
    ) -> None:
        """Opens the load; raises what the daemon refuses it with, ValueError for an absent device."""
        self._pid = os.getpid()
        self._started = time.monotonic()
        self._ended: float | None = None
        self._first_tensor: float | None = None
        self._bytes = self._tensors = self._read_bytes = 0
        self._waited_seconds = 0.0
        self._iterated = False
        self._closed = threading.Event()
        self._socket_dir = socket_dir
        self._request = request
        self._device = None if device.type in ("cpu", "cuda") else device
        self._transfer = _open_transfer(device)
        self._departures = Departures()
        self._group_progress: pb.GroupProgress | None = None
        self._owned = owned
        self._reconnect_timeout = reconnect_timeout
        self._bar = Bar("load") if progress else None
        # A cell, so that the finalizer closes the stream of the day without keeping this Load alive.
        self._streams = [self._open(choose)]
        self._copies = CopyPool()
        self._finalizer = weakref.finalize(self, _close_all, self._streams, self._copies, self._transfer)
        self._manifest = self._streams[0].manifest
        _log.info(
            "load %s of %s begins: %d tensors, %d bytes, of which %d are staged",
            self.load_id,
            ", ".join(request.sources[:3]),
            self.tensor_count,
            self.total_bytes,
            self._manifest.warm_bytes,
        )
        self._show_progress()
        self._warn()

    @property
    def load_id(self) -> str:
        """Names this load in the daemon's log."""
        return self._manifest.load_id

    @property
    def tensor_count(self) -> int:
        """Tensors that this load yields."""
        return self._manifest.tensor_count

    @property
    def total_bytes(self) -> int:
        """Bytes of these tensors."""
        return self._manifest.total_bytes

    @property
    def full(self) -> bool:
        """Whether the staging buffer holds all of it at once; otherwise it comes through a window."""
        return self._manifest.full

    @property
    def version(self) -> str:
        """Identifies the bytes: the same for the same versions of the same files."""
        return self._manifest.version

    @property
    def files(self) -> tuple[LoadedFile, ...]:
        """The checkpoint's files, in the order of the sources."""
        return tuple(
            LoadedFile(file.uri, file.size_bytes, dict(file.metadata), file.metadata_omitted)
            for file in self._manifest.files
        )

    @property
    def metadata(self) -> dict[str, str]:
        """The files' `__metadata__` in one; where they disagree, the last file's word."""
        return {key: value for file in self._manifest.files for key, value in file.metadata.items()}

    @property
    def stats(self) -> LoadStats:
        """A snapshot."""
        first = self._first_tensor
        return LoadStats(
            bytes=self._bytes,
            tensors=self._tensors,
            seconds=(self._ended or time.monotonic()) - self._started,
            waited_seconds=self._waited_seconds,
            first_tensor_seconds=None if first is None else first - self._started,
            cache_hit=self._manifest.warm_bytes == self._manifest.total_bytes,
            read_bytes=self._read_bytes,
        )

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Raises LoadClosedError the second time and after `close()`, and ForkedProcessError, from the
        iterator too, in a process that the load's own one has forked."""
        self._check_process()
        if self._iterated or self._closed.is_set():
            raise errors.LoadClosedError(
                "this load was iterated before; open another one"
                if self._iterated
                else "this load is closed; open another one",
                load_id=self.load_id,
            )
        self._iterated = True
        return self._run()

    def close(self) -> None:
        """Ends the load. Tensors already yielded stay valid as `owned` promises. May be called again.

        In a process that the load's own one has forked it only gives up what that process has of it.
        """
        self._closed.set()
        if self._ended is None:
            self._ended = time.monotonic()
        if self._bar is not None and self._pid == os.getpid():  # its lock may be held for ever elsewhere
            self._bar.close()
        if self._owned and not self._streams[0].manifest.full:  # not the manifest it began with
            self._streams[0].revoke()  # a suspended iterator may refer to the window, no tensor does
        self._finalizer()
        if self._transfer is not None:
            self._transfer.join()

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"load {self.load_id} cannot be pickled, as its memory and its connection are this process's: "
            "send the client and the source to the other process, and load there"
        )

    def __repr__(self) -> str:
        state = "closed" if self._closed.is_set() else "open"
        kind = "all at once" if self._manifest.full else "through a window"
        return (
            f"<Load {self.load_id} {state}: {self._tensors} of {self.tensor_count} tensors, "
            f"{show_bytes(self._bytes)} of {show_bytes(self.total_bytes)}, {kind}>"
        )

    def _run(self) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            if self._transfer is not None:
                yield from self._deliver_ahead(self._transfer)
            else:
                while (segment := self._next_segment()) is not None:
                    yield from self._deliver(segment)
            if self._tensors != self.tensor_count:
                raise errors.broken(
                    f"{self._tensors} of {self.tensor_count} tensors came", load_id=self.load_id
                )
            if not self._owned:
                # The caller's loop variable still holds the last view. Its lease would make this
                # process wait for itself when it loads the next checkpoint.
                self._streams[0].revoke()
            _log.info("load %s is done: %.3f s", self.load_id, time.monotonic() - self._started)
        except errors.PenstockError as error:
            error.load_id = error.load_id or self.load_id
            if not isinstance(error, errors.LoadClosedError):
                # As text: a handler that keeps the record must not keep what the traceback refers to.
                _log.warning("load %s failed: %s", error.load_id, str(error))
            raise
        finally:
            self.close()

    def _next_segment(self, *, ahead: bool = False) -> pb.SegmentReady | None:
        """`ahead` of tensors that were not yielded yet, it is too early to tell a new daemon what is left."""
        while True:
            try:
                segment = self._streams[0].next_segment()
            except errors.DaemonUnavailableError as lost:
                if ahead:
                    raise
                if self._tensors != self.tensor_count:
                    self._resume(lost)
                    continue
                segment = None  # only the farewell is missing
            if segment is not None and segment.HasField("group"):
                self._group_progress = segment.group
            finished = self._streams[0].finished
            if segment is None and finished is not None:
                self._waited_seconds += finished.waited_seconds
                self._read_bytes += finished.read_bytes
            return segment

    def _deliver(self, segment: pb.SegmentReady) -> Iterator[tuple[str, torch.Tensor]]:
        stream, device = self._streams[0], self._device
        window = not stream.manifest.full
        copy = window and self._owned and device is None
        # Nothing that is yielded refers to the ring: its space can go before the last tensor does.
        detached = copy or device is not None
        if self._first_tensor is None:
            self._first_tensor = time.monotonic()
        count, done = len(segment.tensors), 0
        try:
            for name, tensor in stream.wrap(segment, copies=self._copies if copy else None):
                if device is not None:
                    tensor = tensor.to(device)
                # By another thread: the daemon may have reused the space while it was copied.
                if stream.closed or self._closed.is_set():
                    raise errors.closed(self.load_id)
                done += 1
                if window and detached and done == count:
                    stream.release(segment, written=False)
                yield name, tensor
                del tensor  # or it would live on while the next one is made
                self._check_process()
        finally:
            self._tensors += done
            self._bytes += sum(entry.size_bytes for entry in islice(segment.tensors, done))
            self._show_progress()
        if window and not (detached and count):
            stream.release(segment, written=True)

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise errors.forked("this load", self._pid, load_id=self.load_id)

    def _warn(self) -> None:
        """Passes on what the daemon finds odd about the files."""
        try:
            for text in self._manifest.warnings:
                warnings.warn(f"{text} (load {self.load_id})", errors.CheckpointWarning, stacklevel=4)
        except BaseException:  # where warnings are errors
            self.close()
            raise

    def _show_progress(self) -> None:
        if self._bar is not None and self._pid == os.getpid():
            self._bar.show(self._bytes, self.total_bytes)

    def _open(
        self, choose: Choose | None = None, lost: errors.DaemonUnavailableError | None = None
    ) -> Stream:
        """The load, or what is left of it: at the daemon that is there, or at the next one when that one is
        `lost` or goes away while the load waits for memory."""

        def attempt() -> Stream:
            request = pb.OpenLoad()
            request.CopyFrom(self._request)
            stream = Stream(self._socket_dir, request, choose)
            self._request = request  # with what was chosen
            return stream

        return persist(attempt, timeout_seconds=self._reconnect_timeout, sleep=self._sleep, lost=lost)

    def _sleep(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise errors.closed(self.load_id)

    def _deliver_ahead(self, transfer: Transfer) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            for name, tensor in run_ahead(transfer, self._next_tensors):
                # By another thread: the window may have been given up while it was copied.
                if self._closed.is_set():
                    raise RingClosedError
                if self._first_tensor is None:
                    self._first_tensor = time.monotonic()
                self._tensors += 1
                self._bytes += tensor.nbytes
                self._show_progress()
                yield name, tensor
                del tensor  # or it would live on while the next one is made
                self._check_process()
        except Exception as error:
            if isinstance(error, RingClosedError) or self._closed.is_set():
                raise errors.closed(self.load_id) from None
            raise

    def _next_tensors(self, ahead: bool) -> tuple[Tensors, Callable[[], None]] | None:
        segment = self._next_segment(ahead=ahead)
        if segment is None:
            return None
        stream = self._streams[0]
        departed = self._departures.expect(partial(_release, stream, segment))
        return list(stream.wrap(segment, copies=None)), departed

    def _resume(self, lost: errors.DaemonUnavailableError) -> None:
        """Opens the rest of the load at the next daemon."""
        self._streams[0].close()
        self._request.skip_tensors = self._tensors
        self._request.expect_version = self._manifest.version
        if self._group_progress is not None:  # with it the daemon brings the members together again
            self._request.group.progress.CopyFrom(self._group_progress)
        self._streams[0] = stream = self._open(lost=lost)
        _log.warning("load %s goes on as load %s", self.load_id, stream.manifest.load_id)
        if self._closed.is_set():
            stream.close()
        if stream.manifest.version != self._manifest.version:
            sources = ", ".join(self._request.sources[:3])
            raise errors.CheckpointChangedError(f"{sources} changed while the daemon was away; load it again")
        if stream.manifest.tensor_count != self.tensor_count - self._tensors:
            raise errors.broken(
                f"{stream.manifest.tensor_count} tensors left after {self._tensors} of {self.tensor_count}"
            )


def _open_transfer(device: torch.device) -> Transfer | None:
    if device.type != "cuda":
        return None
    return Transfer(cuda.open_device(device), pinned_bytes=pinned_bytes())


def _release(stream: Stream, segment: pb.SegmentReady) -> None:
    if not stream.manifest.full:
        stream.release(segment, written=False)


def _close_all(streams: list[Stream], copies: CopyPool, transfer: Transfer | None) -> None:
    with contextlib.ExitStack() as stack:  # a device that failed keeps nothing else from being given back
        for stream in streams:
            stack.callback(stream.close)
        stack.callback(copies.close)
        if transfer is not None:
            stack.callback(transfer.close)
