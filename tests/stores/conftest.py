from __future__ import annotations

from ..e2e.conftest import nursery, nursery_process, socket_dir, start_daemon

__all__ = ["nursery", "nursery_process", "socket_dir", "start_daemon"]
