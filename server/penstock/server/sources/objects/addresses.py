"""Looks up host names, and connects to public addresses alone.

A URL from a stranger, or a redirect, may name a service that only this machine or its network should reach:
one on the loopback, or the metadata of a cloud's instance. A name is looked up once, and the connection goes
to the address that was checked. So a name server gains nothing if it answers otherwise the next time. An
address is public if it is routed on the internet.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import Any
from urllib.parse import SplitResult

from ...errors import AccessDeniedError, PenstockError

_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",  # Azure's metadata: in a public range, but answered by the machine's host
            "192.0.0.0/24",  # for protocols, such as Oracle's metadata; older Pythons know only a part of it
            "192.88.99.0/24",  # the nearest relay to IPv6, which may be in the local network
            "3fff::/20",  # for documentation; older Pythons do not know it
        ),
    )
)
_UNICAST = ipaddress.ip_network("2000::/3")
"""All of IPv6 that was ever given to anybody. What lies elsewhere is local, of an old kind or of a kind that
Python does not know yet, such as `fec0::/10`, `5f00::/16` and `64:ff9b:1::/48`."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_IPV4_MASK = 0xFFFFFFFF


def is_public(text: str) -> bool:
    """Whether an address, as getaddrinfo writes it, is on the internet. An address that carries an IPv4
    address counts as that one."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        carried = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            carried = ipaddress.IPv4Address(int(address) & _IPV4_MASK)
        if address.teredo is not None:
            return False
        if carried is not None:
            return is_public(str(carried))
        if address not in _UNICAST:
            return False
    listed = any(address in network for network in _NOT_PUBLIC)
    return address.is_global and not address.is_multicast and not listed


def create_connection(
    address: tuple[str, int], timeout: float | None = None, source_address: Any = None
) -> socket.socket:
    """As `socket.create_connection`, for hosts whose addresses are all public. Raises AccessDeniedError for
    any other host, before anything is sent, and OSError."""
    host, port = address
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    _check(host, found)
    checked = [str(place[0]) for *_, place in found]
    for one in checked[:-1]:
        with contextlib.suppress(OSError):
            return socket.create_connection((one, port), timeout)
    return socket.create_connection((checked[-1], port), timeout)


def check_name(parts: SplitResult) -> None:
    """Checks the host of a URL that a proxy will be asked for. A name that cannot be looked up here is left
    to the proxy. Raises AccessDeniedError."""
    host = parts.hostname or ""
    try:
        found = socket.getaddrinfo(host, parts.port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return
    _check(host, found)


def _check(host: str, found: list[Any]) -> None:
    if not all(is_public(str(place[0])) for *_, place in found):
        raise not_public(host)


def not_public(host: str) -> PenstockError:
    return AccessDeniedError(
        f"{host[:200]} has an address that is not public (loopback, link-local, private), which only root "
        "and penstockd's own user may load from; start penstockd with an --allow prefix that names this host"
    )
