"""The segments of one load, from the daemon that it began at or, if that one ends, from the next one.

If the daemon ends: wait for the next one (ring/reconnect.py), check that it has the same version, skip the
tensors that were delivered, and go on.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from penstock.v1 import streamer_pb2 as pb

from . import errors
from .account import Account
from .ring.reconnect import persist
from .ring.stream import Choose, Stream
from .system.latch import Latch

_log = logging.getLogger("penstock.client")


class Segments:
    """`stream` belongs to the present daemon, `manifest` is the one that the load began with."""

    def __init__(
        self,
        socket_dir: Path,
        request: pb.OpenLoad,
        choose: Choose | None,
        account: Account,
        *,
        reconnect_timeout: float,
    ) -> None:
        """Opens the load. Raises the error with which the daemon refuses it."""
        self.closed = Latch()
        self.account = account
        self.pid = os.getpid()
        """The process that opened the load."""
        self._socket_dir = socket_dir
        self._request = request
        self._reconnect_timeout = reconnect_timeout
        self._group_progress: pb.GroupProgress | None = None
        self.stream = self._open(choose)
        self.manifest = self.stream.manifest
        account.total_bytes = self.manifest.total_bytes

    @property
    def load_id(self) -> str:
        return self.manifest.load_id

    def check_process(self) -> None:
        """Raises ForkedProcessError in a process that was forked from the load's own."""
        if self.pid != os.getpid():
            raise errors.forked("this load", self.pid, load_id=self.load_id)

    def next(self, *, ahead: bool = False) -> pb.SegmentReady | None:
        """The next segment, None after the last. With `ahead`, some tensors are not delivered yet, so a new
        daemon cannot be told what is left: raises DaemonUnavailableError then."""
        while True:
            try:
                segment = self.stream.next_segment()
            except errors.DaemonUnavailableError as lost:
                if ahead:
                    raise
                if self.account.tensors != self.manifest.tensor_count:
                    self._resume(lost)
                    continue
                segment = None  # only the last message is missing
            if segment is not None and segment.HasField("group"):
                self._group_progress = segment.group
            finished = self.stream.finished
            if segment is None and finished is not None:
                self.account.finish(
                    finished.waited_seconds,
                    finished.read_bytes,
                    tier_bytes=finished.tier_bytes,
                    verified_bytes=finished.verified_bytes,
                    stale_seconds=finished.stale_seconds if finished.HasField("stale_seconds") else None,
                )
            return segment

    def close(self) -> None:
        """Ends the call. May be called again, by any thread."""
        self.closed.set()
        self.stream.close()

    def _open(
        self, choose: Choose | None = None, lost: errors.DaemonUnavailableError | None = None
    ) -> Stream:
        """Opens the load, or the rest of it: at the daemon that runs, or at the next one if that daemon is
        `lost`, or goes away while the load waits for memory."""

        def attempt() -> Stream:
            request = pb.OpenLoad()
            request.CopyFrom(self._request)
            stream = Stream(self._socket_dir, request, choose)
            self._request = request  # with the chosen names
            return stream

        return persist(attempt, timeout_seconds=self._reconnect_timeout, sleep=self._sleep, lost=lost)

    def _sleep(self, seconds: float) -> None:
        if self.closed.wait(seconds):
            raise errors.closed(self.load_id)

    def _resume(self, lost: errors.DaemonUnavailableError) -> None:
        """Opens the rest of the load at the next daemon."""
        delivered, manifest = self.account.tensors, self.manifest
        self.stream.close()
        self._request.skip_tensors = delivered
        self._request.expect_version = manifest.version
        if self._group_progress is not None:  # from this the daemon puts the members into one window again
            self._request.group.progress.CopyFrom(self._group_progress)
        self.stream = stream = self._open(lost=lost)
        _log.warning("load %s goes on as load %s", self.load_id, stream.manifest.load_id)
        if self.closed.is_set():
            stream.close()
        if stream.manifest.version != manifest.version:
            sources = ", ".join(self._request.sources[:3])
            raise errors.CheckpointChangedError(f"{sources} changed while the daemon was away; load it again")
        if stream.manifest.tensor_count != manifest.tensor_count - delivered:
            raise errors.broken(
                f"{stream.manifest.tensor_count} tensors left after {delivered} of {manifest.tensor_count}"
            )
