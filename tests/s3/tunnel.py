"""An HTTP proxy as enterprises have them: CONNECT for https, whole URLs for http. Keeps what it was asked."""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit

from ..e2e.support import DEADLINE_SECONDS


class Tunnel:
    """Listens on the loopback until `close`. Whatever name it is asked for, it connects to `target_port`."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self.asked: list[str] = []
        """First lines of what came: `CONNECT host:port HTTP/1.1`, `GET http://… HTTP/1.1`."""
        self.credentials: set[str] = set()
        """Values of Proxy-Authorization."""
        self.refuses: int | None = None
        """The status of every answer, if the proxy lets nothing through."""
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        for each in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(DEADLINE_SECONDS)
        self._sockets.add(connection)
        with contextlib.suppress(OSError), connection, self._connect() as target:
            buffered = b""
            while (head := _head(connection, buffered)) is not None:
                lines, buffered = head
                self.asked.append(lines[0])
                for line in lines[1:]:
                    name, _, value = line.partition(": ")
                    if name.lower() == "proxy-authorization":
                        self.credentials.add(value)
                if self.refuses is not None:
                    said = f"HTTP/1.1 {self.refuses} Refused by policy\r\nContent-Length: 0\r\n\r\n"
                    connection.sendall(said.encode())
                    continue
                if lines[0].startswith("CONNECT "):
                    connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    self._copy_both_ways(connection, target)
                    return
                self._pass_on(lines, connection, target)

    def _connect(self) -> socket.socket:
        target = socket.create_connection(("127.0.0.1", self._target_port), timeout=DEADLINE_SECONDS)
        self._sockets.add(target)
        return target

    def _pass_on(self, lines: list[str], connection: socket.socket, target: socket.socket) -> None:
        """One request in the form that servers take, and its answer; then the connection ends."""
        method, url, version = lines[0].split()
        path = url[len(f"{urlsplit(url).scheme}://{urlsplit(url).netloc}") :]
        kept = [line for line in lines[1:] if not line.lower().startswith(("connection:", "proxy-"))]
        text = "\r\n".join([f"{method} {path} {version}", *kept, "Connection: close", "", ""])
        target.sendall(text.encode("latin-1"))
        while data := target.recv(1 << 16):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_RDWR)

    def _copy_both_ways(self, one: socket.socket, other: socket.socket) -> None:
        back = threading.Thread(target=_copy, args=(other, one), daemon=True)
        back.start()
        _copy(one, other)
        back.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def _head(connection: socket.socket, buffered: bytes) -> tuple[list[str], bytes] | None:
    """The lines of a request, and what came after them."""
    while b"\r\n\r\n" not in buffered:
        data = connection.recv(1 << 16)
        if not data:
            return None
        buffered += data
    head, _, rest = buffered.partition(b"\r\n\r\n")
    return head.decode("latin-1").split("\r\n"), rest
