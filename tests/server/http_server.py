"""An HTTP server in threads of the test's process."""

from __future__ import annotations

import socket
import sys
from http.server import ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Says nothing of clients that go before they have read an answer."""

    daemon_threads = True

    def get_request(self) -> tuple[socket.socket, object]:
        """A connection whose answers leave at once. A body otherwise waits 40 ms until the client has
        acknowledged the header, which is sent by itself."""
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection, address

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]
