"""The gRPC server: the service, health and reflection, on a socket of its own behind the gate."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc.aio
from grpc_health.v1 import health as health_service
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from penstock.v1 import streamer_pb2 as pb
from penstock.v1 import streamer_pb2_grpc

from .gate import Gate
from .health import Health
from .service import StreamerService

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["StreamerService"].full_name
LIVENESS_NAME = "live"
"""The service of grpc.health.v1 that says whether the daemon hangs; the others say whether it is ready."""
REASON_KEY = "penstock-reason"
"""In the trailing metadata of an answer that it is not: why, in words."""
MAX_CALLS_PER_CONNECTION = 16


class RpcServer:
    """Answers calls that come to `penstock.sock`. Lives on the event loop."""

    def __init__(self, socket_dir: Path, *, health: Health, allows: Callable[[int], bool]) -> None:
        """`allows` says whether a uid may connect at all."""
        self._path = socket_dir / "grpc.sock"
        self._gate = Gate(socket_dir / "penstock.sock", self._path, allows=allows)
        self._health = health
        self._health_service = _HealthService(health)
        self._publishing: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None

    async def start(self, service: StreamerService) -> None:
        """Binds. The caller holds the directory's lock."""
        self._path.unlink(missing_ok=True)
        self._server = server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", 64 << 20),
                ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
            )
        )
        streamer_pb2_grpc.add_StreamerServiceServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health_service, server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health_service.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        umask = os.umask(0o177)  # the way in is the gate
        try:
            # gRPC takes its addresses apart as URIs, percent signs and all.
            server.add_insecure_port("unix:" + quote(os.fsencode(self._path)))
        finally:
            os.umask(umask)
        await server.start()
        await self._gate.start()

    async def stop(self) -> None:
        """Cuts off what still runs."""
        if self._server is not None:
            await self._server.stop(None)
        await self._gate.stop()
        self._path.unlink(missing_ok=True)

    def publish_health_soon(self) -> None:
        task = asyncio.create_task(self.publish_health())
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def publish_health(self) -> None:
        """Tells whoever watches grpc.health.v1 how it is now."""
        answer = health_pb2.HealthCheckResponse
        ready, live = self._health.ready, self._health.live
        for name, good in (("", ready), (SERVICE_NAME, ready), (LIVENESS_NAME, live)):
            await self._health_service.set(name, answer.SERVING if good else answer.NOT_SERVING)


class _HealthService(health_service.aio.HealthServicer):  # type: ignore[misc]
    """Says why, too, for which grpc.health.v1 has no field. Clients that do not know of it pass over it."""

    def __init__(self, health: Health) -> None:
        super().__init__()
        self._health = health

    async def Check(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> Any:
        reason = self._health.hang if request.service == LIVENESS_NAME else self._health.reason
        if reason:
            context.set_trailing_metadata(((REASON_KEY, reason),))
        return await super().Check(request, context)
