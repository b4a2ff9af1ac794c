"""Servers of objects for the benchmarks, on the loopback, with ranges, ETag and If-Match as in S3.

`Near` is nginx, as fast as a server can be. `Far` answers like distant storage: after a delay, and with a
limited rate on each connection. The kernel keeps the rate packet by packet (SO_MAX_PACING_RATE), as a network
would. The delay is a sleep before each answer. (Network emulation, `tc netem`, is not in every kernel, and
nginx's `limit_rate` waits in milliseconds, which is too coarse.)

Neither checks signatures. `Far` also answers lists; of `Near` a benchmark names the objects. As a program,
this file is `Far`.
"""

import argparse
import http.client
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.local_server import LocalServer, nginx_command
from benchmarks.make_checkpoint import DATA_DIR

BUCKET = "bench"
# In <asm/socket.h>; not in Python's socket module.
_SO_MAX_PACING_RATE = 47
# A whole number of TLS records of 16 KiB.
_PART_BYTES = 1 << 20


class ObjectServer(LocalServer):
    """A server over `benchmarks/.data`."""

    scheme = "http"

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """For every process that reads from it: daemons and contenders. The keys are made up."""
        environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "AKIABENCHMARKSONLY00",
            "AWS_SECRET_ACCESS_KEY": "benchmarks-only",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        }
        if self.scheme == "https":
            environment["AWS_CA_BUNDLE"] = str(self._directory / "certificate.pem")
        return environment

    def uri(self, path: Path | str) -> str:
        """Of a file in `benchmarks/.data`."""
        return f"s3://{BUCKET}/{Path(path).relative_to(DATA_DIR)}"

    def url(self, uri: str) -> str:
        """The address of the object with that URI."""
        return f"{self.endpoint}/{uri.removeprefix('s3://')}"

    def _make_certificate(self) -> None:
        """A certificate that is its own authority, for AWS_CA_BUNDLE."""
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-subj", "/CN=penstock benchmarks", "-addext", "subjectAltName=IP:127.0.0.1"]
        command += ["-keyout", "key.pem", "-out", "certificate.pem"]
        subprocess.run(command, cwd=self._directory, check=True, capture_output=True)


class Near(ObjectServer):
    def __init__(self, *, tls: bool = False) -> None:
        super().__init__()
        self.scheme = "https" if tls else "http"

    def _command(self) -> list[str]:
        tls = certificate = ""
        if self.scheme == "https":
            self._make_certificate()
            tls, certificate = "ssl", "ssl_certificate certificate.pem; ssl_certificate_key key.pem;"
        return nginx_command(
            self._directory,
            f"""
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    keepalive_timeout 3600;
    keepalive_requests 1000000000;
    {certificate}
    server {{
        listen 127.0.0.1:{self.port} {tls} backlog=1024;
        location /{BUCKET}/ {{ alias {DATA_DIR}/; }}
    }}
""",
        )


class Far(ObjectServer):
    """Each answer is `delay_seconds` late, and each connection carries `rate_bytes` a second."""

    def __init__(self, *, delay_seconds: float, rate_bytes: int, tls: bool = False) -> None:
        super().__init__()
        self.scheme = "https" if tls else "http"
        self._delay_seconds = delay_seconds
        self._rate_bytes = rate_bytes

    def _command(self) -> list[str]:
        command = [sys.executable, __file__, str(self.port), str(self._delay_seconds), str(self._rate_bytes)]
        if self.scheme == "https":
            self._make_certificate()
            command += ["--certificate", "certificate.pem", "--key", "key.pem"]
        return command


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request for an object: its head, and the range of the object that follows it."""

    head: bytes
    status: int
    start: int
    end: int
    """The first byte that does not follow; equal to `start` if no byte does."""


def answer(method: str, headers: Mapping[str, str], size_bytes: int, etag: str) -> Answer:
    """The answer for an object of that size and ETag. Names of `headers` are in lower case."""
    start, end = 0, size_bytes
    status, lines = "200 OK", [f"ETag: {etag}", "Accept-Ranges: bytes"]
    if found := re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", "")):
        start, end = int(found[1]), min(int(found[2]) + 1, size_bytes)
        status = "206 Partial Content"
        lines.append(f"Content-Range: bytes {start}-{end - 1}/{size_bytes}")
    if headers.get("if-match", etag) != etag:
        status, end = "412 Precondition Failed", start
    head = "\r\n".join([f"HTTP/1.1 {status}", *lines, f"Content-Length: {end - start}", "", ""])
    return Answer(head.encode(), int(status[:3]), start, start if method == "HEAD" else end)


def page(prefix: str, etag: Callable[[os.stat_result], str]) -> bytes:
    """The answer to a request for a list: one page. A page of S3 has up to 1000 keys."""
    files = sorted(path for path in (DATA_DIR / prefix).rglob("*") if path.is_file())
    contents = "".join(
        f"<Contents><Key>{path.relative_to(DATA_DIR)}</Key><Size>{path.stat().st_size}</Size>"
        f"<ETag>{escape(etag(path.stat()))}</ETag></Contents>"
        for path in files
    )
    body = (
        f"<ListBucketResult><Name>{BUCKET}</Name><IsTruncated>false</IsTruncated>{contents}"
        "</ListBucketResult>"
    ).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def etag_of(stat: os.stat_result) -> str:
    return f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'


def read_request(requests: BinaryIO) -> tuple[str, str, dict[str, str]] | None:
    """Method, target, and headers by their names in lower case. None at the end of the connection."""
    line = requests.readline()
    if not line:
        return None
    method, target, _ = line.decode().split()
    parsed = http.client.parse_headers(requests)
    return method, target, {name.lower(): value for name, value in parsed.items()}


def listed_prefix(target: str) -> str | None:
    """The prefix that a request for a list names. None for other requests."""
    query = parse_qs(urlsplit(target).query)
    return query.get("prefix", [""])[0] if "list-type" in query else None


def file_of(target: str) -> Path:
    return DATA_DIR / target.partition("?")[0].removeprefix(f"/{BUCKET}/")


def _serve(
    connection: socket.socket, delay_seconds: float, rate_bytes: int, tls: ssl.SSLContext | None
) -> None:
    connection.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate_bytes)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Where BBR is the default, it takes a late answer on the loopback for congestion, for seconds.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    if tls is not None:
        try:
            connection = tls.wrap_socket(connection, server_side=True)
        except OSError:  # whoever only looked whether the port is open
            connection.close()
            return
    with connection, connection.makefile("rb") as requests:
        while request := read_request(requests):
            method, target, headers = request
            time.sleep(delay_seconds)
            prefix = listed_prefix(target)
            if prefix is not None:
                connection.sendall(page(prefix, etag_of))
                continue
            with open(file_of(target), "rb") as file:
                stat = os.fstat(file.fileno())
                answered = answer(method, headers, stat.st_size, etag_of(stat))
                connection.sendall(answered.head)
                at = answered.start
                while at < answered.end:
                    at += _send(connection, file.fileno(), at, answered.end - at)


def _send(connection: socket.socket, fd: int, start: int, count: int) -> int:
    """Sends some bytes of the file. Returns how many."""
    if not isinstance(connection, ssl.SSLSocket):
        return os.sendfile(connection.fileno(), fd, start, count)
    part = os.pread(fd, min(count, _PART_BYTES), start)
    connection.sendall(part)
    return len(part)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Serves benchmarks/.data slowly.")
    parser.add_argument("port", type=int)
    parser.add_argument("delay_seconds", type=float)
    parser.add_argument("rate_bytes", type=int)
    parser.add_argument("--certificate")
    parser.add_argument("--key")
    options = parser.parse_args(arguments)
    tls = None
    if options.certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(options.certificate, options.key)
    with socket.create_server(("127.0.0.1", options.port), backlog=1024) as listener:
        while True:
            connection, _ = listener.accept()
            figures = (connection, options.delay_seconds, options.rate_bytes, tls)
            threading.Thread(target=_serve, args=figures, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
