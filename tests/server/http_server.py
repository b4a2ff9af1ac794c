"""An HTTP server in threads of the test's process."""

from __future__ import annotations

import sys
from http.server import ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Says nothing of clients that go before they have read an answer."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]
