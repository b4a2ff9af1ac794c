"""grpc.health.v1, answered from `watch/health.py`.

Not by the servicer of grpcio-health-checking. That one writes to each watcher while it holds the lock by
which a new state is set, so one watcher that does not read would keep the state from all. And when one
watcher goes, the others are told nothing any more.
"""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from penstock.v1 import streamer_pb2 as pb

from ..watch.health import Health
from .calls import Call

HEALTH_NAME: str = health.SERVICE_NAME
SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["StreamerService"].full_name
LIVENESS_NAME = "live"
"""The service that says whether the daemon hangs; the others say whether it is ready."""
REASON_KEY = "penstock-reason"
"""The trailing metadata that says why the daemon is not live, or not ready. grpc.health.v1 has no field for
it, and clients that do not know it ignore it."""
_LARGEST_BYTES = 64
"""Of an answer, which is one number."""


class HealthService:
    """Lives on the event loop. Calls need no token."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._changed = asyncio.Event()
        """Set once, when the state may have changed; then another takes its place."""

    def changed(self) -> None:
        """To be called when the state may have changed: watchers look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def check(self, call: Call) -> None:
        call.stream.stay_small()
        service = (await call.only(HealthCheckRequest)).service
        status = self._status(service)
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            await call.context.abort(grpc.StatusCode.NOT_FOUND)
        reason = self._health.hang if service == LIVENESS_NAME else self._health.reason
        if reason:
            call.context.set_trailing_metadata(((REASON_KEY, reason),))
        await _send(call, status)

    async def watch(self, call: Call) -> None:
        """Tells the state now, and each time it is another, until the client ends the call."""
        call.stream.stay_small()
        service = (await call.only(HealthCheckRequest)).service
        told = None
        while True:
            changed, status = self._changed, self._status(service)
            if status == told:
                await changed.wait()
            else:
                told = status
                await _send(call, status)

    def _status(self, service: str) -> HealthCheckResponse.ServingStatus:
        if service not in ("", SERVICE_NAME, LIVENESS_NAME):
            return HealthCheckResponse.SERVICE_UNKNOWN
        good = self._health.live if service == LIVENESS_NAME else self._health.ready
        return HealthCheckResponse.SERVING if good else HealthCheckResponse.NOT_SERVING


async def _send(call: Call, status: HealthCheckResponse.ServingStatus) -> None:
    await call.send(HealthCheckResponse(status=status).SerializeToString, most_bytes=_LARGEST_BYTES)
