"""Keep-alive HTTP/1.1 connections, through a proxy if the environment names one, and requests on them.

Connections do not belong to threads. A thread takes an idle one, or makes one, and puts it back when it has
read the answer to its end.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from urllib.parse import SplitResult, urlsplit

from ...errors import SourceUnavailableError
from ...system.progress import beat
from . import addresses, proxies
from .exchange import Encrypted, Exchange, Plain, wait_readable
from .faults import Transient
from .response import Response, TooSlow

_Origin = tuple[str, bool]
"""Scheme, host and port, and whether connections go to public addresses only."""


class Connections:
    """Idle connections by origin. Thread-safe."""

    def __init__(self, *, timeout_seconds: float, idle: int, tls: ssl.SSLContext) -> None:
        """At most `idle` connections are kept open while nothing is requested."""
        self._timeout_seconds = timeout_seconds
        self._max_idle = idle
        self._tls = tls
        self._lock = threading.Lock()
        self._idle: list[tuple[_Origin, http.client.HTTPConnection]] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._closed = False

    @contextlib.contextmanager
    def exchange(
        self, what: str, method: str, url: str, headers: Mapping[str, str], *, public_only: bool = False
    ) -> Iterator[Exchange]:
        """Sends a request and gives its answer. The body must be read within the context. Raises Transient,
        also from within the context, and SourceUnavailableError, which names `what`. With `public_only` it
        raises AccessDeniedError for a host that has an address that is not public."""
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{proxies.authority(parts)}", public_only
        connection = self._take(origin) or self._new(parts, public_only)
        exchange, reusable = None, False
        try:
            with _network_errors(what, parts, connection):
                self._connect(connection)
                exchange = _send(connection, method, parts, headers)
                if exchange.status == 407:  # a status of proxies alone
                    raise proxies.refusal(407, what, parts, connection)
                yield exchange
            reusable = exchange.complete
        except Transient:
            self._forget(origin)
            raise
        finally:
            if exchange is not None and not reusable:
                exchange.abandon()
            self._put(origin, connection, reusable=reusable)

    def close(self) -> None:
        """Ends every exchange that is under way, with an error."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for connection in self._busy:
                sock = connection.sock  # its thread may close it meanwhile
                if sock is not None:
                    # Not SSLSocket's own method, which ends the encryption under a read: the caller would get
                    # ciphertext after that.
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for _, connection in idle:
            connection.close()

    def _take(self, origin: _Origin) -> http.client.HTTPConnection | None:
        while True:
            with self._lock:
                position = next((at for at, idle in enumerate(self._idle) if idle[0] == origin), None)
                if position is None:
                    return None
                connection = self._idle.pop(position)[1]
                self._busy.add(connection)
            if not _readable(connection):
                return connection
            self._put(origin, connection, reusable=False)

    def _forget(self, origin: _Origin) -> None:
        """Closes idle connections of an origin. They may be as broken as the one that just failed, so the
        next attempt gets a new one."""
        with self._lock:
            forgotten = [connection for at, connection in self._idle if at == origin]
            self._idle = [idle for idle in self._idle if idle[0] != origin]
        for connection in forgotten:
            connection.close()

    def _put(self, origin: _Origin, connection: http.client.HTTPConnection, *, reusable: bool) -> None:
        surplus: http.client.HTTPConnection | None = connection
        with self._lock:
            self._busy.discard(connection)
            if reusable and not self._closed:
                self._idle.insert(0, (origin, connection))
                # The oldest one goes, whatever its origin. Connections of a bucket that is no longer used
                # would otherwise keep the place of useful ones.
                surplus = self._idle.pop()[1] if len(self._idle) > self._max_idle else None
        if surplus is not None:
            surplus.close()

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        if connection.sock is None and not self._closed:
            connection.connect()
        if self._closed:  # possibly before there was a socket to shut down
            raise Transient("connection", "penstockd stops")

    def _new(self, parts: SplitResult, public_only: bool) -> http.client.HTTPConnection:
        proxy = proxies.find(parts)
        connection = self._of_kind(parts, proxy)
        if public_only and proxy is None:
            connection._create_connection = addresses.create_connection  # type: ignore[attr-defined]
        elif public_only:
            addresses.check_name(parts)
        connection.response_class = Response
        with self._lock:
            self._busy.add(connection)
        return connection

    def _of_kind(self, parts: SplitResult, proxy: SplitResult | None) -> http.client.HTTPConnection:
        host, port = parts.hostname or "", parts.port
        if proxy is None:
            if parts.scheme == "https":
                return self._https(host, port)
            return Plain(host, port, timeout=self._timeout_seconds)
        if parts.scheme == "https":
            connection = self._https(proxy.hostname or "", proxy.port or 80)
            connection.set_tunnel(host, port, proxies.headers(proxy))
            return connection
        return proxies.Forwarded(proxy, timeout=self._timeout_seconds)

    def _https(self, host: str, port: int | None) -> http.client.HTTPSConnection:
        return Encrypted(host, port, timeout=self._timeout_seconds, context=self._tls)


def _send(
    connection: http.client.HTTPConnection, method: str, parts: SplitResult, headers: Mapping[str, str]
) -> Exchange:
    target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
    sent = dict(headers)
    if isinstance(connection, proxies.Forwarded):
        target = f"{parts.scheme}://{proxies.authority(parts)}{target}"
        sent.update(connection.proxy_headers)
    try:
        connection.request(method, target, headers=sent)
    except OSError:  # some of these are a ValueError too, such as those of certificates
        raise
    except ValueError as error:  # an ETag that cannot be sent in a header
        raise Transient("bad_response", "what the store said of the object is no valid header") from error
    beat()
    response = connection.getresponse()
    assert isinstance(response, Response)
    beat()
    return Exchange(connection, response)


def _readable(connection: http.client.HTTPConnection) -> bool:
    """Whether an idle connection has something to be read. Then the server closed it, or it is out of
    step."""
    if connection.sock is None:
        return True
    return wait_readable(connection.sock, 0)


@contextlib.contextmanager
def _network_errors(what: str, parts: SplitResult, connection: http.client.HTTPConnection) -> Iterator[None]:
    """Turns errors of sockets, TLS and the HTTP parser into errors for clients. Texts that a server may have
    written are left out."""
    where = proxies.way(parts, connection)
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise SourceUnavailableError(
            f"{what}: the certificate of {where} is not trusted: {error.verify_message}; if its authority is "
            "private, name its bundle in AWS_CA_BUNDLE (S3) or REQUESTS_CA_BUNDLE"
        ) from error
    except TooSlow as error:
        raise Transient("timeout", f"the answer of {where} comes too slowly for --object-timeout") from error
    except TimeoutError as error:
        raise Transient("timeout", f"no byte from {where} for as long as --object-timeout") from error
    except socket.gaierror as error:
        raise Transient("connection", f"a host name does not resolve, {where}: {error.strerror}") from error
    except OSError as error:
        if (status := proxies.tunnel_status(error)) is not None:
            raise proxies.refusal(status, what, parts, connection) from None
        text = error.strerror or type(error).__name__
        raise Transient("connection", f"the connection to {where} failed: {text}") from error
    except http.client.IncompleteRead as error:
        raise Transient("short_body", "the answer ended early") from error
    except http.client.HTTPException as error:
        raise Transient("bad_response", f"{where} answered no valid HTTP ({type(error).__name__})") from error
