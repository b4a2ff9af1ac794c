from __future__ import annotations

from ..e2e.conftest import socket_dir, start_daemon
from .interfaces import install

__all__ = ["socket_dir", "start_daemon"]

install()
