"""From how many bytes of a body on the kernel wakes the thread that waits for them."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from tests.s3.authority import Authority

from penstock.server.sources.objects import exchange
from penstock.server.sources.objects.connection import Connections
from penstock.server.sources.objects.exchange import LOW_WATER_BYTES, Watermarked

BODY = bytes(range(251)) * ((4 << 20) // 251)
PATIENCE_SECONDS = 60


Send = Callable[[socket.socket, bytes], None]
Serving = Callable[[Send], contextlib.AbstractContextManager[str]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def connections(authority: Authority) -> Iterator[Connections]:
    tls = ssl.create_default_context(cafile=str(authority.bundle))
    found = Connections(timeout_seconds=PATIENCE_SECONDS, idle=1, tls=tls)
    yield found
    found.close()


@pytest.fixture(params=["http", "https"])
def serving(request: pytest.FixtureRequest, authority: Authority) -> Serving:
    """A server of one connection, as a context that gives its URL. `send` is called with the whole answer to
    each request."""
    scheme: str = request.param
    tls = authority.server("127.0.0.1") if scheme == "https" else None
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY

    @contextlib.contextmanager
    def serving(send: Send) -> Iterator[str]:
        def serve() -> None:
            connection, _ = listener.accept()
            if tls is not None:
                connection = tls.wrap_socket(connection, server_side=True)
            with connection:
                while connection.recv(65536):
                    send(connection, answer)

        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/x"
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()

    return serving


def test_a_thread_sleeps_until_many_bytes_are_there_and_at_the_end_of_the_body_no_longer(
    connections: Connections, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the sender is slow, as on a busy machine, the thread would be woken for less from then on.
    monkeypatch.setattr(exchange, "TURN_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(exchange, "_TURN", struct.pack("ll", PATIENCE_SECONDS, 0))
    with serving(lambda connection, answer: connection.sendall(answer)) as url:
        for _ in range(2):
            found, marks = bytearray(len(BODY)), []
            with connections.exchange("x", "GET", url, {}) as answer:
                view = memoryview(found)
                while view:
                    view = view[answer.read_into(view[: 1 << 20]) :]
                    sock = answer.connection.sock
                    assert sock is not None
                    marks.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT))
            assert found == BODY
            assert LOW_WATER_BYTES in marks
            assert marks[-1] == 1
        connections.close()


def test_bytes_of_a_sender_that_waits_are_read_as_far_as_they_came(
    connections: Connections, serving: Serving
) -> None:
    """It would wait for ever if they were only read once there are enough."""
    some = 100 << 10
    assert some < LOW_WATER_BYTES
    reached = [threading.Event(), threading.Event()]
    """The first time the parser of the head reads from the socket, the second time the reader of the body."""

    def send(connection: socket.socket, answer: bytes) -> None:
        head = answer.index(b"\r\n\r\n") + 4
        connection.sendall(answer[: head + some])
        assert reached[0].wait(PATIENCE_SECONDS)
        connection.sendall(answer[head + some : head + 2 * some])
        assert reached[1].wait(PATIENCE_SECONDS)
        connection.sendall(answer[head + 2 * some :])

    found = bytearray(len(BODY))
    with serving(send) as url, connections.exchange("x", "GET", url, {}) as answer:
        view = memoryview(found)
        while view:
            view = view[answer.read_into(view) :]
            for number, event in enumerate(reached, 1):
                if len(BODY) - len(view) >= number * some:
                    event.set()
        assert isinstance(answer.connection, Watermarked)
        assert answer.connection.low_water_bytes == 1, "it would wait so long each time"
        connections.close()
    assert found == BODY
