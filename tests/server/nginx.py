"""nginx on the loopback, which serves the files of a directory."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ..ports import free_port
from .support import until_true

_CONFIGURATION = """
daemon off;
master_process off;
pid {state}/pid;
error_log {state}/error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {state};
    proxy_temp_path {state};
    fastcgi_temp_path {state};
    uwsgi_temp_path {state};
    scgi_temp_path {state};
    gzip on;
    gzip_types *;
    gzip_min_length 1;
    server {{
        listen 127.0.0.1:{port};
        absolute_redirect off;
        location / {{ root {files}; }}
        {locations}
    }}
}}
"""


@contextlib.contextmanager
def nginx(program: str, files: Path, state: Path, locations: str = "") -> Iterator[int]:
    """Serves until the context ends; gives its port. `locations` are more of its configuration."""
    port = free_port()
    configuration = state / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(state=state, files=files, port=port, locations=locations))
    with (state / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [program, "-c", str(configuration), "-p", str(state), "-e", "stderr"],
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            env={"PATH": os.environ["PATH"]},
        )
    try:
        until_true(lambda: _listens(port) or process.poll() is not None)
        assert process.poll() is None, (state / "stderr").read_text()
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except OSError:
        return False
    return True
