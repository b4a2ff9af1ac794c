"""The proxy that the environment names for an address, and what it means when it refuses.

Proxies and endpoints may have a user and a password in their URLs: errors tell hosts and ports only.
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
"""http.client's words for a CONNECT that was refused; it tells in no other way."""
_TRANSIENT = {408: "timeout", 429: "throttled"}


class Forwarded(http.client.HTTPConnection):
    """A plain connection to a proxy, which is asked for whole URLs."""

    def __init__(self, proxy: SplitResult, *, timeout: float) -> None:
        super().__init__(proxy.hostname or "", proxy.port or 80, timeout=timeout)
        self.proxy_headers = headers(proxy)


def find(parts: SplitResult) -> SplitResult | None:
    """The one for a URL. Raises SourceUnavailableError."""
    named = {} if proxy_bypass(authority(parts)) else getproxies()
    proxy = named.get(parts.scheme) or named.get("all")
    if not proxy:
        return None
    try:
        split = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        # A password that holds a '/' ends what is taken for the host.
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
    """What tells a proxy who asks."""
    if proxy.username is None:
        return {}
    user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}


def authority(parts: SplitResult) -> str:
    """Host and port of a URL, as it says them."""
    return parts.netloc.rpartition("@")[2]


def way(parts: SplitResult, connection: http.client.HTTPConnection) -> str:
    """Where a request goes, for errors."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if (connection.host, connection.port) == (parts.hostname, port):
        return authority(parts)
    return f"{authority(parts)} through the proxy {connection.host}:{connection.port}"


def tunnel_status(error: OSError) -> int | None:
    """What a proxy answered to CONNECT, where it is that which failed."""
    match = _TUNNEL.match(str(error))
    return int(match[1]) if match else None


def refusal(
    status: int, what: str, parts: SplitResult, connection: http.client.HTTPConnection
) -> SourceUnavailableError | Transient:
    """A proxy answered that itself, before the store was asked."""
    said = f"the proxy {connection.host}:{connection.port} answered {status}"
    if 400 <= status < 500 and status not in _TRANSIENT:
        remedy = "its user and password" if status == 407 else f"and that it lets {authority(parts)} through"
        return SourceUnavailableError(f"{what}: {said}; check {_variable(parts)}, {remedy}")
    reason = _TRANSIENT.get(status, "server_error" if status >= 500 else "bad_response")
    return Transient(reason, f"{said} when asked for {authority(parts)}")


def _variable(parts: SplitResult) -> str:
    return f"{parts.scheme.upper()}_PROXY"
