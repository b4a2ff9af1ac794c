"""Which process this is, without a system call: `os.getpid()` for each of 100,000 tensors took a fifteenth of
their load."""

from __future__ import annotations

import os

pid = os.getpid()
"""Of this process. Read it as `process.pid`: an imported copy would stay that of the parent in a child."""


def _renew() -> None:
    global pid
    pid = os.getpid()


os.register_at_fork(after_in_child=_renew)
