"""moto's server as a program that prints its port. `moto.server` logs each request. It also searches all
services of AWS for it, in the file system and with regular expressions, while other requests wait."""

from __future__ import annotations

import functools
import os

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server


class Handler(MotoRequestHandler):
    """Logs errors only."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing."""


def main() -> None:
    """Serves on a free port of the loopback until it is terminated."""
    application = DomainDispatcherApplication(create_backend_app)
    # The answer depends on the host's name alone.
    application.get_backend_for_host = functools.cache(  # type: ignore[method-assign]
        application.get_backend_for_host
    )
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
    os.environ["MOTO_PORT"] = str(server.port)
    print(f"port {server.port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
