"""The HTTP port: what it answers, and what hostile clients of it cannot do."""

from __future__ import annotations

import contextlib
import gc
import http.client
import socket
import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from penstock.server.watch.http import HEADER_SECONDS, MAX_CONNECTIONS, MAX_HEADER_BYTES

from ..conftest import StartDaemon
from ..support import (
    DEADLINE_SECONDS,
    DaemonProcess,
    random_tensors,
    running_daemon,
    same,
    wait_until,
    write_checkpoint,
)

MIB = 1 << 20
GARBAGE = [
    b"\x00" * 100,
    b"\r\n\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nBad Header: y\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1e3\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"A: " + b"b" * (2 * MAX_HEADER_BYTES) + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * MAX_HEADER_BYTES + b"\r\n",
    b"GET /" + b"a" * (2 * MAX_HEADER_BYTES) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
]


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "16MiB") as one:
        yield one


@contextlib.contextmanager
def connected(daemon: DaemonProcess) -> Iterator[socket.socket]:
    host, _, port = daemon.http_address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        yield connection


def exchange(daemon: DaemonProcess, request: bytes) -> bytes:
    """Everything that is answered until the daemon closes the connection."""
    with connected(daemon) as connection:
        with contextlib.suppress(OSError):  # closed before it took all
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 16):
                answer += data
    return answer


def head(answer: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers."""
    first, *lines = answer.partition(b"\r\n\r\n")[0].decode().splitlines()
    return int(first.split()[1]), {
        name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
    }


def request(path: str, method: str = "GET", *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def holds_up_nobody(daemon: DaemonProcess) -> None:
    """Probes, scrapes and a connection of its own get their answers."""
    for path in ("/healthz", "/readyz", "/metrics"):
        assert daemon.http(path)[0] == 200
    daemon.http_status()  # of the event loop, which on a busy machine may not run for half a second


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html"),
        ("/status", "application/json"),
        ("/metrics", "text/plain"),
        ("/healthz", "text/plain"),
        ("/readyz", "text/plain"),
    ],
)
def test_every_path_is_answered_with_headers_that_keep_browsers_strict(
    path: str, content_type: str, daemon: DaemonProcess
) -> None:
    answer = exchange(daemon, request(path))
    status, headers = head(answer)
    assert status == 200
    assert headers["content-type"].startswith(content_type)
    assert headers["content-security-policy"].startswith("default-src 'self';")
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
    body = answer.partition(b"\r\n\r\n")[2]
    assert len(body) == int(headers["content-length"]) > 0
    only_head = exchange(daemon, request(path, "HEAD"))
    assert head(only_head)[0] == 200
    assert only_head.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("path", ["/nothing", "/../pyproject.toml", "/%2e%2e/x", "//", "/status/", "*"])
def test_there_is_nothing_else(path: str, daemon: DaemonProcess) -> None:
    assert head(exchange(daemon, request(path)))[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"])
def test_it_is_read_only(method: str, daemon: DaemonProcess) -> None:
    status, headers = head(exchange(daemon, request("/status", method)))
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_nobody_is_connected_through_it_or_switched_to_another_protocol(daemon: DaemonProcess) -> None:
    upgrade = request("/healthz", "GET", "Upgrade: websocket", "Connection: upgrade")
    answer = exchange(daemon, upgrade + request("/healthz"))
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2
    assert head(exchange(daemon, request("localhost:22", "CONNECT")))[0] == 405


@pytest.mark.parametrize("header", ["Content-Length: 5", "Transfer-Encoding: chunked"])
def test_a_body_is_refused_and_not_waited_for(header: str, daemon: DaemonProcess) -> None:
    with connected(daemon) as connection:
        connection.sendall(request("/status", "GET", header))
        status, headers = head(connection.recv(1 << 16))
        assert (status, headers["connection"]) == (413, "close")
        assert connection.recv(1) == b""


@pytest.mark.parametrize("host", ["localhost:9464", "127.0.0.1", "[::1]:80", "10.1.2.3:9464", ""])
def test_whoever_asks_for_this_machine_is_answered(host: str, daemon: DaemonProcess) -> None:
    asked = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    assert head(exchange(daemon, asked))[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:9464", "[::1", "127.0.0.1.nip.io", "@"]
)
def test_a_web_site_that_has_its_name_resolved_to_the_loopback_reads_nothing(
    host: str, daemon: DaemonProcess
) -> None:
    answer = exchange(daemon, f"GET /status HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert head(answer)[0] in (400, 403)
    assert b"socket_dir" not in answer


def test_the_page_and_all_that_it_needs_is_served(daemon: DaemonProcess) -> None:
    files = [Path(str(file)) for file in resources.files("penstock.server.watch").joinpath("page").iterdir()]
    assert len(files) > 1
    for file in files:
        path = "/" if file.name == "index.html" else f"/{file.name}"
        assert daemon.http(path) == (200, file.read_bytes())


def test_a_query_is_ignored(daemon: DaemonProcess) -> None:
    assert daemon.http("/healthz?verbose=1") == (200, b"ok\n")


def test_status_is_what_grpc_says(daemon: DaemonProcess) -> None:
    told, asked = daemon.http_status(), daemon.status()
    for changing in ("uptime_seconds", "unix_seconds", "throughput", "readers"):
        del told[changing], asked[changing]
    assert told == asked
    assert told["configuration"]["memory_limit"] == str(16 * MIB)


def test_metrics_come_in_the_format_that_is_asked_for(daemon: DaemonProcess) -> None:
    openmetrics = daemon.http("/metrics", accept="application/openmetrics-text; version=1.0.0")[1].decode()
    assert openmetrics.endswith("# EOF\n")
    families = {family.name for family in text_string_to_metric_families(openmetrics)}  # type: ignore[no-untyped-call]
    assert {"penstock_loads", "penstock_staging_bytes", "penstock_build"} <= families
    plain = daemon.http("/metrics", accept="text/plain")[1].decode()
    assert "# EOF" not in plain
    assert 'penstock_loads_total{result="ok",source="file"} ' in plain


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=9.9.9; escaping=dots",
        "application/openmetrics-text; version=no number",
        "text/plain; version=1.0.0, application/openmetrics-text; version=1." + "0" * 5000,
        "text/plain; version=\xb2",
        "text/plain; version=2.0.0; escaping=values",
    ],
    ids=lambda accept: accept[:60],
)
def test_a_format_that_a_client_makes_up_is_answered_in_one_of_two(
    accept: str, daemon: DaemonProcess
) -> None:
    """Answers are kept by their format: of one that a client may choose there would be no end."""
    host, _, port = daemon.http_address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics", headers={"Accept": accept})
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.headers["Content-Type"] in (
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            "text/plain; version=0.0.4; charset=utf-8",
        )
        assert b"penstock_loads_total" in answer.read()


def test_one_connection_serves_any_number_of_requests(daemon: DaemonProcess) -> None:
    count = 500
    closing = request("/healthz", "GET", "Connection: close")
    answers = exchange(daemon, request("/healthz") * count + closing)
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == count + 1


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: repr(garbage[:40]))
def test_garbage_is_refused_and_the_connection_closed(garbage: bytes, daemon: DaemonProcess) -> None:
    answer = exchange(daemon, garbage)
    assert answer == b"" or head(answer)[0] in (400, 403, 404, 405, 413, 431, 501)
    holds_up_nobody(daemon)
    daemon.assert_log_clean()


def test_a_crowd_of_slow_clients_gives_way_to_probes(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Each sends the beginning of a request and nothing more; there are many times as many as may be."""
    tensors = random_tensors(16, MIB // 4)
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    daemon = start_daemon("--memory-limit", "8MiB")
    before = len(daemon.fds())
    with contextlib.ExitStack() as crowd, daemon.client() as client:
        for number in range(10 * MAX_CONNECTIONS):
            slow = crowd.enter_context(connected(daemon))
            slow.sendall(b"GET /status HTTP/1.1\r\nX: ")
            if number % MAX_CONNECTIONS == 0:
                holds_up_nobody(daemon)
        assert len(daemon.fds()) <= before + MAX_CONNECTIONS + 20
        same(client.load(path), tensors)
        holds_up_nobody(daemon)
    gc.collect()
    wait_until(lambda: len(daemon.fds()) <= before + 5, "the crowd to be gone")


def test_clients_that_take_no_answer_hold_up_nobody(daemon: DaemonProcess) -> None:
    """They ask for very much and never read."""
    with contextlib.ExitStack() as crowd:
        for _ in range(20):
            deaf = crowd.enter_context(connected(daemon))
            deaf.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    deaf.send(request("/metrics") * 100)
        holds_up_nobody(daemon)
        growth = daemon.memory_kib("RssAnon")
        holds_up_nobody(daemon)
        assert daemon.memory_kib("RssAnon") < growth + 20 * 1024


def test_who_asks_without_end_holds_up_neither_probes_nor_loads(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    tensors = random_tensors(16, MIB // 4)
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    daemon = start_daemon("--memory-limit", "8MiB")
    done = threading.Event()

    def ask() -> None:
        with connected(daemon) as connection:
            while not done.is_set():
                connection.sendall(request("/status") * 20)
                connection.recv(1 << 16)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        with daemon.client() as client:
            for _ in range(5):
                same(client.load(path), tensors)
                holds_up_nobody(daemon)
    finally:
        done.set()
        for asker in askers:
            asker.join()
    gc.collect()


def test_a_request_that_is_not_complete_in_time_is_given_up(daemon: DaemonProcess) -> None:
    with connected(daemon) as connection:
        connection.settimeout(10 * HEADER_SECONDS)
        connection.sendall(b"GET /status HTTP/1.1\r\n")
        assert connection.recv(1) == b""


def test_the_port_is_closed_with_the_daemon(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--memory-limit", "16MiB")
    with connected(daemon) as idle:
        assert daemon.terminate() == 0
        assert idle.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        daemon.http("/healthz")
