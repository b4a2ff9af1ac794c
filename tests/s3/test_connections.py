"""Connections by themselves: which are kept, what of a body is told when, and how exchanges end with them."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from penstock.server.sources.objects import response
from penstock.server.sources.objects.connection import Connections
from penstock.server.sources.objects.exchange import Exchange
from penstock.server.sources.objects.faults import Transient

from ..e2e.support import DEADLINE_SECONDS, wait_until
from ..server.objects import ObjectServer
from .authority import Authority

PART = 64 << 10


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def connect(authority: Authority) -> Iterator[Callable[..., Connections]]:
    made: list[Connections] = []

    def make(*, idle: int = 2) -> Connections:
        tls = ssl.create_default_context(cafile=authority.bundle)
        made.append(Connections(timeout_seconds=DEADLINE_SECONDS, idle=idle, tls=tls))
        return made[-1]

    yield make
    for connections in made:
        connections.close()


@contextlib.contextmanager
def serving(serve: Callable[[socket.socket], object], *, scheme: str = "http") -> Iterator[str]:
    """The URL of a server whose only connection `serve` gets, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as thread:

        def run() -> None:
            connection, _ = listener.accept()
            connection.settimeout(DEADLINE_SECONDS)
            with connection:
                serve(connection)

        done = thread.submit(run)
        yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/b/k"
        done.result(DEADLINE_SECONDS)


@pytest.fixture
def two_servers() -> Iterator[list[ObjectServer]]:
    servers = [ObjectServer(), ObjectServer()]
    yield servers
    for server in servers:
        server.close()


def ask(connections: Connections, server: ObjectServer, *, at_once: int = 1) -> None:
    """So many requests, each on a connection of its own."""
    with contextlib.ExitStack() as stack:
        for _ in range(at_once):
            url = f"{server.url}/b/k"
            exchange = stack.enter_context(connections.exchange("s3://b/k", "GET", url, {}))
            exchange.text()


def addresses(server: ObjectServer) -> list[tuple[str, int]]:
    """Of the clients' ends, in the order in which requests came."""
    return [asked.handler.client_address for asked in server.asked]


def test_idle_connections_to_one_host_keep_none_to_another_from_being_kept(
    connect: Callable[..., Connections], two_servers: list[ObjectServer]
) -> None:
    """As a bucket each has its own, by virtual addressing."""
    one, other = two_servers
    connections = connect(idle=2)
    ask(connections, one, at_once=2)
    for _ in range(3):
        ask(connections, other)
    assert len(set(addresses(other))) == 1
    ask(connections, one)
    assert addresses(one)[-1] in addresses(one)[:2], "no more than the oldest one had to go"


@pytest.mark.parametrize("frame", ["chunked", "until it closes"])
def test_what_has_come_of_a_body_of_unknown_length_is_given_at_once(
    frame: str, connect: Callable[..., Connections]
) -> None:
    seen = threading.Event()
    chunked = frame == "chunked"

    def serve(connection: socket.socket) -> None:
        assert connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + (b"Transfer-Encoding: chunked\r\n" if chunked else b""))
        connection.sendall(b"\r\n" + (b"4\r\nsome\r\n" if chunked else b"some"))
        assert seen.wait(DEADLINE_SECONDS)
        connection.sendall(b"5\r\n more\r\n0\r\n\r\n" if chunked else b" more")

    with (
        serving(serve) as url,
        connect().exchange("s3://b/k", "GET", url, {}) as exchange,
    ):
        view = memoryview(bytearray(1 << 20))
        with releasing(seen):
            assert exchange.read_into(view) == 4
        assert exchange.read_into(view[4:]) == 5
        assert exchange.read_into(view[9:]) == 0
        assert bytes(view[:9]) == b"some more"
        exchange.finish()


@contextlib.contextmanager
def releasing(event: threading.Event) -> Iterator[None]:
    """Also when what is inside fails, for those who wait."""
    try:
        yield
    finally:
        event.set()


@pytest.mark.parametrize("where", ["size", "trailer"])
def test_what_frames_a_chunked_body_may_not_trickle_for_ever(
    where: str, connect: Callable[..., Connections], monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    # Five seconds pass at every look, whenever the server's thread gets its turn.
    clock = itertools.count(step=5)
    monkeypatch.setattr(response, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def serve(connection: socket.socket) -> None:
        assert connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n")
        connection.sendall(b"5;" if where == "size" else b"0\r\n")
        with contextlib.suppress(OSError):
            while not over.wait(0.01):
                connection.sendall(b"x" if where == "size" else b"X: y\r\n")

    def read(connections: Connections, url: str) -> None:
        with connections.exchange("s3://b/k", "GET", url, {}) as exchange:
            view = memoryview(bytearray(1 << 20))
            while exchange.read_into(view):
                pass

    with serving(serve) as url, releasing(over), pytest.raises(Transient) as caught:
        read(connect(), url)
    assert (caught.value.reason, "too slowly" in caught.value.text) == ("timeout", True)


def test_no_ciphertext_comes_when_connections_are_closed_in_mid_body(
    connect: Callable[..., Connections], authority: Authority
) -> None:
    context = authority.server("127.0.0.1")
    over = threading.Event()

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as encrypted:
            assert encrypted.recv(1 << 16)
            encrypted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"a" * 3 * PART)
            assert over.wait(DEADLINE_SECONDS)

    connections = connect()
    found = bytearray()

    def read(exchange: Exchange) -> None:
        view = memoryview(bytearray(PART))
        while count := exchange.read_into(view):
            found.extend(view[:count])
            if len(found) == count:  # the first
                wait_until(lambda: waiting_bytes(exchange) > PART, "more to lie in the kernel")
                connections.close()

    with (
        serving(serve, scheme="https") as url,
        releasing(over),
        contextlib.suppress(Transient),
        connections.exchange("s3://b/k", "GET", url, {}) as exchange,
    ):
        read(exchange)
    assert set(found) == set(b"a")


def waiting_bytes(exchange: Exchange) -> int:
    """Received and not read, as they are on the wire."""
    with socket.socket(fileno=socket.dup(exchange.connection.sock.fileno())) as raw:
        try:
            return len(raw.recv(1 << 20, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return 0


def test_a_connection_that_is_made_while_connections_are_closed_asks_nothing(
    connect: Callable[..., Connections], authority: Authority
) -> None:
    """In the middle of the handshake there is no socket yet that could be shut down."""
    context = authority.server("127.0.0.1")
    began, closed = threading.Event(), threading.Event()
    asked: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        assert connection.recv(1, socket.MSG_PEEK)
        began.set()
        assert closed.wait(DEADLINE_SECONDS)
        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as encrypted:
            asked.append(encrypted.recv(1 << 16))

    connections = connect()

    def request(url: str) -> None:
        with connections.exchange("s3://b/k", "GET", url, {}):
            pass

    with serving(serve, scheme="https") as url, ThreadPoolExecutor(1) as thread:
        asking = thread.submit(request, url)
        with releasing(closed):
            assert began.wait(DEADLINE_SECONDS)
            connections.close()
        with pytest.raises(Transient):
            asking.result(DEADLINE_SECONDS)
    assert asked in ([], [b""])
