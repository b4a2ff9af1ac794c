"""Ports of the loopback for servers that cannot choose one themselves."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST, _HIGHEST = 10_000, 65_536
_chance = random.SystemRandom()  # tests seed the other one


def free_port(*, beside: int = 0) -> int:
    """One that nobody has; nor, if asked for, the one so far above. Until the server takes it nobody is given
    it: the kernel takes ports for connections, and for port 0, from a range above those that are tried."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    end = int(given[0]) - beside
    if end < _LOWEST + 1000:  # it takes them from nearly everywhere
        end = _HIGHEST - beside
    while True:
        port = _chance.randrange(_LOWEST, end)
        try:
            for number in {port, port + beside}:
                socket.create_server(("127.0.0.1", number)).close()
        except OSError:
            continue
        return port
