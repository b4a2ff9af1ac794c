"""Short calls for operators: what the daemon holds, and evicting it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.v1 import streamer_pb2 as pb
from penstock.v1.plain import to_plain

from .ring.handoff import TIMEOUT_SECONDS
from .ring.rpc import Session


@dataclass(frozen=True, slots=True)
class Evicted:
    """The result of `evict()`."""

    # Freed at once.
    freed_bytes: int
    # Still in use. Freed when the last client releases them.
    leased_bytes: int


def evict(session: Session, request: pb.EvictRequest) -> Evicted:
    """See `StreamerClient.evict`."""
    response = session.service.Evict(request, metadata=session.metadata)
    return Evicted(freed_bytes=response.freed_bytes, leased_bytes=response.leased_bytes)


def status(session: Session) -> dict[str, Any]:
    """See `StreamerClient.status`."""
    response = session.service.GetStatus(
        pb.GetStatusRequest(), metadata=session.metadata, timeout=TIMEOUT_SECONDS
    )
    return to_plain(response)
