"""The proxy that the environment names for an address, and the errors when it refuses.

URLs of proxies and endpoints may have a user and a password. So errors show hosts and ports only.
"""

from __future__ import annotations

import base64
import http.client
import re
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from ...errors import SourceUnavailableError
from .faults import Transient

_TUNNEL = re.compile(r"Tunnel connection failed: (\d{3})\b")
"""The text of http.client's error for a CONNECT that was refused. It has the status nowhere else."""
_TRANSIENT = {408: "timeout", 429: "throttled"}


class Forwarded(http.client.HTTPConnection):
    """A plain connection to a proxy. Requests on it name whole URLs."""

    def __init__(self, proxy: SplitResult, *, timeout: float) -> None:
        super().__init__(proxy.hostname or "", proxy.port or 80, timeout=timeout)
        self.proxy_headers = headers(proxy)


def find(parts: SplitResult) -> SplitResult | None:
    """The proxy for a URL, if there is one. Raises SourceUnavailableError."""
    named = {} if proxy_bypass(authority(parts)) else getproxies()
    proxy = named.get(parts.scheme) or named.get("all")
    if not proxy:
        return None
    try:
        split = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        # A '/' in a password ends what urlsplit takes for the host.
        usable = bool(split.hostname) and split.port != 0 and "@" not in split.path + split.query
    except ValueError:
        usable = False
    if not usable:
        raise SourceUnavailableError(
            f"{_variable(parts)} is no URL of a proxy; write http://HOST:PORT, or "
            "http://USER:PASSWORD@HOST:PORT with each '/', '?', '#', '@' and ':' of the two as %2F, %3F, "
            "%23, %40 and %3A"
        ) from None
    if split.scheme != "http":
        raise SourceUnavailableError(
            f"{_variable(parts)} names a proxy of the kind {split.scheme[:20]}://; penstockd "
            "can use http:// ones, for https too; set one"
        )
    return split


def headers(proxy: SplitResult) -> dict[str, str]:
    """The headers that log in at a proxy."""
    if proxy.username is None:
        return {}
    user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}


def authority(parts: SplitResult) -> str:
    """Host and port of a URL, as they are written."""
    return parts.netloc.rpartition("@")[2]


def way(parts: SplitResult, connection: http.client.HTTPConnection) -> str:
    """The way of a request, for errors: the host, and the proxy if there is one."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if (connection.host, connection.port) == (parts.hostname, port):
        return authority(parts)
    return f"{authority(parts)} through the proxy {connection.host}:{connection.port}"


def tunnel_status(error: OSError) -> int | None:
    """The status of a proxy's answer to CONNECT, if that is what failed."""
    match = _TUNNEL.match(str(error))
    return int(match[1]) if match else None


def refusal(
    status: int, what: str, parts: SplitResult, connection: http.client.HTTPConnection
) -> SourceUnavailableError | Transient:
    """The error for a status that came from the proxy itself, before the store was asked."""
    said = f"the proxy {connection.host}:{connection.port} answered {status}"
    if 400 <= status < 500 and status not in _TRANSIENT:
        remedy = "its user and password" if status == 407 else f"and that it lets {authority(parts)} through"
        return SourceUnavailableError(f"{what}: {said}; check {_variable(parts)}, {remedy}")
    reason = _TRANSIENT.get(status, "server_error" if status >= 500 else "bad_response")
    return Transient(reason, f"{said} when asked for {authority(parts)}")


def _variable(parts: SplitResult) -> str:
    return f"{parts.scheme.upper()}_PROXY"
