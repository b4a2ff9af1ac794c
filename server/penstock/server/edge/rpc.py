"""The gRPC server: the service, health and reflection, on a socket of its own behind the gate.

gRPC's own bounds are set here. The gate has all others (`gate.py`).
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc.aio
from grpc_health.v1 import health as health_service
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import _async as reflection_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

from penstock.v1 import streamer_pb2 as pb

from ..errors import InvalidRequestError, PenstockError
from ..system.quota import Quota
from ..watch.health import Health
from .answers import Answers
from .calls import Call, Context
from .frame_filter import MAX_HEADER_BLOCK_BYTES, STREAM_HEADER
from .gate import Gate
from .service import StreamerService
from .statuses import abort
from .streams import MAX_MESSAGE_BYTES

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["StreamerService"].full_name
LIVENESS_NAME = "live"
"""The service of grpc.health.v1 that says whether the daemon hangs; the others say whether it is ready."""
REASON_KEY = "penstock-reason"
"""The trailing metadata that says why the daemon is not live, or not ready."""
MAX_CALLS_PER_CONNECTION = 16
REQUEST_BYTES = 48 << 20
"""Memory that the requests of all users may hold, from an incomplete frame to names that wait to be looked
up. An eighth is kept for privileged users."""
REQUEST_BYTES_PER_USER = 32 << 20
METADATA_BYTES = 8 << 10
"""The largest headers of a request, uncompressed."""
IDLE_SECONDS = 600
"""gRPC closes a connection that had no call for so long. The next call of its client connects again."""
LOOK_SECONDS = 1.0
"""How often gRPC's server is checked: it does not report that a fault ended it."""
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
    ("grpc.max_metadata_size", METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_HEADER_BLOCK_BYTES),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none but identity
    # Clients send little: a window that does not grow with their speed is enough.
    ("grpc.http2.lookahead_bytes", 65_535),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
)

_STREAM_KEY = STREAM_HEADER.decode()
_Methods = Mapping[str, tuple[Callable[[Call], Awaitable[None]], Callable[[Any], bytes] | None]]
"""By method: its handler, and the serializer of messages that it writes without `Call.send`."""


class RpcServer:
    """Answers calls that come to `penstock.sock`. Lives on the event loop."""

    def __init__(
        self,
        socket_dir: Path,
        *,
        health: Health,
        allows: Callable[[int], bool],
        on_closed: Callable[[str], None],
    ) -> None:
        """`allows` says whether a uid may connect at all; `on_closed` is told why the gate closed a
        connection."""
        self._directory = socket_dir
        memory = Quota(REQUEST_BYTES, most_per_user=REQUEST_BYTES_PER_USER)
        self._gate = Gate(socket_dir / "penstock.sock", memory=memory, allows=allows, on_closed=on_closed)
        self._answers = Answers()
        self._health = health
        self._health_service = _HealthService(health)
        self._publishing: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None
        self._inner_fd = -1

    async def start(self, service: StreamerService) -> None:
        """Binds. The caller holds the directory's lock."""
        self._server = server = grpc.aio.server(options=_OPTIONS)
        self._add(server, SERVICE_NAME, {name: (handle, None) for name, handle in service.methods.items()})
        self._add(server, health_service.SERVICE_NAME, self._health_methods())
        self._add(server, reflection.SERVICE_NAME, {"ServerReflectionInfo": (_reflect, None)})
        await self._listen(server)
        await self._gate.start(f"/proc/self/fd/{self._inner_fd}")

    async def stop(self) -> None:
        """Ends all calls."""
        if self._server is not None:
            await self._server.stop(None)
        await self._gate.stop()
        if self._inner_fd >= 0:
            os.close(self._inner_fd)
            self._inner_fd = -1

    async def ended(self) -> str:
        """Waits until gRPC's server has ended, and says why. It may end by itself: headers of one call
        that it cannot handle end it for all."""
        assert self._server is not None
        try:
            while await self._server.wait_for_termination(LOOK_SECONDS):
                pass
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "it was stopped"

    async def _listen(self, server: grpc.aio.Server) -> None:
        """gRPC listens on a path. When it stops it removes the file at this path, even another daemon's.
        So the path is removed as soon as gRPC listens. From then on only this process's descriptor leads
        there."""
        path = self._directory / f".{secrets.token_hex(4)}"
        umask = os.umask(0o177)
        try:
            # gRPC takes its addresses apart as URIs, percent signs and all.
            server.add_insecure_port("unix:" + quote(os.fsencode(path)))
        finally:
            os.umask(umask)
        self._inner_fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        path.unlink()
        await server.start()

    def _add(self, server: grpc.aio.Server, service: str, methods: _Methods) -> None:
        handlers: dict[str, Any] = {
            name: grpc.stream_stream_rpc_method_handler(self._handler(handle), None, serialize)
            for name, (handle, serialize) in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    def _handler(self, handle: Callable[[Call], Awaitable[None]]) -> Any:
        async def answer(_: object, context: Context) -> None:
            keys = [value for key, value in context.invocation_metadata() or () if key == _STREAM_KEY]
            # The gate's own is the last; a client may send others, but cannot know this one.
            stream = self._gate.claim(keys[-1]) if keys and isinstance(keys[-1], str) else None
            if stream is None:
                error = InvalidRequestError("the headers of the call are not complete; call again")
                await abort(context, error, "")
            try:
                await handle(Call(context, stream, self._answers))
            except PenstockError as error:
                await abort(context, error, "")

        return answer

    def _health_methods(self) -> _Methods:
        async def check(call: Call) -> None:
            call.stream.stay_small()
            request = await call.only(health_pb2.HealthCheckRequest)
            answer = await self._health_service.Check(request, call.context)
            await call.send(answer.SerializeToString)

        async def watch(call: Call) -> None:
            call.stream.stay_small()
            request = await call.only(health_pb2.HealthCheckRequest)
            await self._health_service.Watch(request, call.context)

        answer = health_pb2.HealthCheckResponse.SerializeToString
        return {"Check": (check, None), "Watch": (watch, answer)}

    def publish_health_soon(self) -> None:
        task = asyncio.create_task(self.publish_health())
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def publish_health(self) -> None:
        """Sends the present state to the watchers of grpc.health.v1."""
        answer = health_pb2.HealthCheckResponse
        ready, live = self._health.ready, self._health.live
        for name, good in (("", ready), (SERVICE_NAME, ready), (LIVENESS_NAME, live)):
            await self._health_service.set(name, answer.SERVING if good else answer.NOT_SERVING)


class _HealthService(health_service.aio.HealthServicer):  # type: ignore[misc]
    """Adds the reason as trailing metadata, since grpc.health.v1 has no field for it. Clients that do not
    know it ignore it."""

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


async def _reflect(call: Call) -> None:
    call.stream.stay_small()

    async def requests() -> AsyncIterator[Any]:
        while (request := await call.next(reflection_pb2.ServerReflectionRequest)) is not None:
            yield request

    names = (SERVICE_NAME, health_service.SERVICE_NAME, reflection.SERVICE_NAME)
    servicer = reflection_aio.ReflectionServicer(names)
    async for answer in servicer.ServerReflectionInfo(requests(), call.context):
        await call.send(answer.SerializeToString)
