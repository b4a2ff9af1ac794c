"""The id of this process without a system call: `os.getpid()` for each of 100,000 tensors took a fifteenth of
their load."""

from __future__ import annotations

import os

pid = os.getpid()
"""Read it as `process.pid`: a copy imported by name would keep the parent's id in a forked child."""


def _renew() -> None:
    global pid
    pid = os.getpid()


os.register_at_fork(after_in_child=_renew)
