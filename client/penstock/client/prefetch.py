"""One prefetch: follows the daemon's reports until the checkpoint is staged."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from penstock.v1 import streamer_pb2 as pb

from . import errors
from .ring.progress import Bar, tell_queued
from .ring.rpc import Session


@dataclass(frozen=True, slots=True)
class Prefetched:
    """The checkpoint that `prefetch()` staged."""

    # Of the checkpoint, all of which is in the staging buffer now.
    total_bytes: int
    # Of these, in the staging buffer before.
    warm_bytes: int


def follow(session: Session, request: pb.PrefetchRequest, bar: Bar | None) -> Prefetched:
    """Returns when the checkpoint is staged, and the call has ended: until then the daemon counts it among
    those that run, and a call that is left before its status counts as cancelled. Raises the error that the
    daemon answers instead."""
    warm_bytes: int | None = None
    staged: Prefetched | None = None
    begun = False
    try:
        for response in session.service.Prefetch(iter([request]), metadata=session.metadata):
            begun = True
            if response.HasField("queued"):
                tell_queued(response.queued)
                continue
            if warm_bytes is None:
                warm_bytes = response.ready_bytes
            if bar is not None:
                bar.show(response.ready_bytes, response.total_bytes)
            if response.done:
                staged = Prefetched(total_bytes=response.total_bytes, warm_bytes=warm_bytes)
    except grpc.RpcError as error:
        raise session.error(error, begun=begun) from error
    if staged is None:
        raise errors.broken("Prefetch ended before it was done")
    return staged
