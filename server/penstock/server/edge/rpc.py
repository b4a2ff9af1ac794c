"""The gRPC server: the service, health and reflection, on a socket of its own behind the gate.

gRPC's own bounds are set here. The gate has all others (`gate.py`).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc.aio
from grpc_reflection.v1alpha import _async as reflection_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

from ..errors import InvalidRequestError, PenstockError
from ..system.quota import Quota
from ..watch.health import Health
from .answers import Answers
from .calls import Call, Context
from .frame_filter import MAX_HEADER_BLOCK_BYTES, STREAM_HEADER
from .gate import Gate
from .health import HEALTH_NAME, SERVICE_NAME, HealthService
from .service import StreamerService
from .statuses import abort
from .streams import MAX_MESSAGE_BYTES

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
_Handlers = Mapping[str, Callable[[Call], Awaitable[None]]]
"""By method."""


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
        self._health = HealthService(health)
        self._server: grpc.aio.Server | None = None
        self._inner_fd = -1

    async def start(self, service: StreamerService) -> None:
        """Binds. The caller holds the directory's lock."""
        self._server = server = grpc.aio.server(options=_OPTIONS)
        self._add(server, SERVICE_NAME, service.methods)
        self._add(server, HEALTH_NAME, {"Check": self._health.check, "Watch": self._health.watch})
        self._add(server, reflection.SERVICE_NAME, {"ServerReflectionInfo": _reflect})
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

    def _add(self, server: grpc.aio.Server, service: str, methods: _Handlers) -> None:
        handlers: dict[str, Any] = {
            name: grpc.stream_stream_rpc_method_handler(self._handler(handle))
            for name, handle in methods.items()
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

    def health_changed(self) -> None:
        """Tells the watchers of grpc.health.v1."""
        self._health.changed()


async def _reflect(call: Call) -> None:
    call.stream.stay_small()

    async def requests() -> AsyncIterator[Any]:
        while (request := await call.next(reflection_pb2.ServerReflectionRequest)) is not None:
            yield request

    names = (SERVICE_NAME, HEALTH_NAME, reflection.SERVICE_NAME)
    servicer = reflection_aio.ReflectionServicer(names)
    async for answer in servicer.ServerReflectionInfo(requests(), call.context):
        await call.send(answer.SerializeToString)
