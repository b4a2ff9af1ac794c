"""Read-only HTTP in a thread and an event loop of its own.

So it answers even if the daemon's event loop hangs, and a slow or hostile client takes nothing from loads.
Connections are bounded: when there are too many, the one that has waited longest is closed in favour of the
newest, so that probes get through. Headers are bounded in bytes. A request must be complete, and its answer
received, within some seconds. Requests with a body are refused. h11 reads the protocol, this file moves the
bytes, `endpoints.py` answers.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

import h11

from ..config.values import HttpAddress
from ..errors import ConfigError

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 128
MAX_HEADER_BYTES = 16 << 10
IDLE_SECONDS = 90.0
"""Prometheus keeps its connection from one scrape to the next."""
HEADER_SECONDS = 5.0
WRITE_SECONDS = 10.0
STOP_SECONDS = 5.0
ACCEPT_PAUSE_SECONDS = 1.0

_ALWAYS = (
    ("Cache-Control", "no-store"),
    (
        "Content-Security-Policy",
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One response."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


Respond = Callable[[str, str], Awaitable[Answer]]
"""Answers for a path and the header Accept. Must not raise, and must be quick."""


class HttpServer:
    """Listens as soon as it is made. Answers from `start` to `stop`."""

    def __init__(self, address: HttpAddress) -> None:
        """Raises ConfigError when the address cannot be bound."""
        self._listener = _bind(address)
        host, port = self._listener.getsockname()[:2]
        self.address = HttpAddress(host, port)
        self._any_host = not ipaddress.ip_address(host.partition("%")[0]).is_loopback
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connections: dict[asyncio.Task[None], None] = {}
        """The connection that has waited longest comes first."""
        self._thread: threading.Thread | None = None

    def start(self, respond: Respond) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._run, args=(self._loop, respond), name="http", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Ends every connection."""
        if self._loop is None or self._thread is None:
            self._listener.close()
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_SECONDS)

    def _run(self, loop: asyncio.AbstractEventLoop, respond: Respond) -> None:
        accepting = loop.create_task(self._accept(respond))
        loop.run_forever()
        tasks = [accepting, *self._connections]
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()
        self._listener.close()

    async def _accept(self, respond: Respond) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # out of descriptors: clients wait in the backlog
                logger.warning("an HTTP connection could not be accepted: %s", error)
                await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            connection.setblocking(False)
            if len(self._connections) >= MAX_CONNECTIONS:
                oldest = next(iter(self._connections))
                del self._connections[oldest]
                oldest.cancel()
            task = loop.create_task(self._converse(connection, respond))
            self._connections[task] = None
            task.add_done_callback(lambda task: self._connections.pop(task, None))
            await asyncio.sleep(0)  # or a crowd that connects would keep open connections from their turn

    async def _converse(self, connection: socket.socket, respond: Respond) -> None:
        """One connection, request after request."""
        protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        with connection:
            try:
                while (request := await _next_request(connection, protocol)) is not None:
                    if self._any_host or _names_no_site(request):
                        answer = await _answer(request, respond)
                    else:
                        answer = Answer(403, b"this port answers to IP addresses and localhost only\n")
                    await _send(connection, protocol, request, answer)
                    if protocol.our_state is not h11.DONE or protocol.their_state is not h11.DONE:
                        return
                    protocol.start_next_cycle()
                    self._renew()
                    await asyncio.sleep(0)  # a client that pipelines takes turns with the others
            except h11.RemoteProtocolError as error:
                answer = Answer(error.error_status_hint, b"this is not a request that penstockd answers\n")
                await _refuse(connection, protocol, answer)
            except (OSError, asyncio.TimeoutError) as error:
                logger.debug("HTTP connection: %r", error)

    def _renew(self) -> None:
        """The current connection made progress, so others are closed before it."""
        task = asyncio.current_task()
        if task in self._connections:
            del self._connections[task]
            self._connections[task] = None


async def _next_request(connection: socket.socket, protocol: h11.Connection) -> h11.Request | None:
    """The next request, complete. None: the client is done."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + (HEADER_SECONDS if protocol.trailing_data[0] else IDLE_SECONDS)
    request, begun = None, False
    while True:
        event = protocol.next_event()
        if isinstance(event, h11.Request):
            request = event
            if _has_body(event):
                return event
        elif isinstance(event, h11.EndOfMessage):
            return request
        elif isinstance(event, h11.ConnectionClosed):
            return None
        elif event is h11.NEED_DATA:
            waiting = loop.sock_recv(connection, MAX_HEADER_BYTES)
            data = await asyncio.wait_for(waiting, deadline - loop.time())
            if not begun:
                begun, deadline = True, loop.time() + HEADER_SECONDS
            protocol.receive_data(data)


def _has_body(request: h11.Request) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and int(value))
        for name, value in request.headers
    )


def _names_no_site(request: h11.Request) -> bool:
    """Whether the request names no host of the web. A web site could have its own name resolved to the
    loopback, to read this port through a browser."""
    for name, value in request.headers:
        if name == b"host" and value:
            host = ""
            try:
                host = urlsplit(f"//{value.decode('latin-1')}").hostname or ""
                ipaddress.ip_address(host)
            except ValueError:
                return host == "localhost"
    return True


async def _answer(request: h11.Request, respond: Respond) -> Answer:
    if request.method not in (b"GET", b"HEAD"):
        return Answer(405, b"only GET and HEAD are answered here\n", headers=(("Allow", "GET, HEAD"),))
    if _has_body(request):
        return Answer(413, b"a request here has no body\n")
    accept = b",".join(value for name, value in request.headers if name == b"accept")
    path = request.target.partition(b"?")[0]
    return await respond(path.decode("latin-1"), accept.decode("latin-1"))


async def _send(
    connection: socket.socket, protocol: h11.Connection, request: h11.Request | None, answer: Answer
) -> None:
    headers = [
        *_ALWAYS,
        *answer.headers,
        ("Content-Type", answer.content_type),
        ("Content-Length", str(len(answer.body))),
    ]
    if request is None or _has_body(request):
        headers.append(("Connection", "close"))
    reason = HTTPStatus(answer.status).phrase
    data = protocol.send(h11.Response(status_code=answer.status, headers=headers, reason=reason)) or b""
    if request is None or request.method != b"HEAD":
        data += protocol.send(h11.Data(data=answer.body)) or b""
    data += protocol.send(h11.EndOfMessage()) or b""
    sending = asyncio.get_running_loop().sock_sendall(connection, data)
    await asyncio.wait_for(sending, WRITE_SECONDS)


async def _refuse(connection: socket.socket, protocol: h11.Connection, answer: Answer) -> None:
    if protocol.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    try:
        await _send(connection, protocol, None, answer)
    except (OSError, asyncio.TimeoutError) as error:
        logger.debug("HTTP connection: %r", error)


def _bind(address: HttpAddress) -> socket.socket:
    try:
        family, kind, protocol, _, bound = socket.getaddrinfo(
            address.host,
            address.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV,
        )[0]
        listener = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(bound)
            listener.listen(MAX_CONNECTIONS)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"--http-address: {address} cannot be bound ({error.strerror}); choose another, port 0 for any "
            "that is free, or none"
        ) from error
    return listener
