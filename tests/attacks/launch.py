"""Starts a command in a known state, whatever this process was handed down by the shell that runs the tests.

    launch.py JSON COMMAND [ARGUMENT...]

The JSON object has the keys `environment` (all of it), `umask`, `open_files` (the limit, soft and hard),
`uid` (null: unchanged) and `cgroup` (the path of a `cgroup.procs` to join, or null). Signals get their
default dispositions and are unblocked; descriptors above standard error are closed. The command replaces
this process, and so has its id. Nothing but the standard library is imported.

`serve` runs penstockd in the same state, in a process that was forked for it (`e2e/forked.py`).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

UNCHANGEABLE = {signal.SIGKILL, signal.SIGSTOP}


def main() -> None:
    wanted = json.loads(sys.argv[1])
    command = sys.argv[2:]
    enter(wanted)
    os.execve(command[0], command, wanted["environment"])


def serve(wanted: dict[str, Any], flags: list[str]) -> int:
    """The exit code. The environment is there already."""
    from tests.e2e import penstockd  # as long as this process may read it

    enter(wanted)
    # As an interpreter that starts has them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    return penstockd.serve(flags, os.getcwd())


def enter(wanted: dict[str, Any]) -> None:
    """The state, but for the environment."""
    for number in signal.valid_signals() - UNCHANGEABLE:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(wanted["umask"])
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted["open_files"], wanted["open_files"]))
    if wanted["cgroup"] is not None:
        Path(wanted["cgroup"]).write_text(str(os.getpid()))
    if (uid := wanted["uid"]) is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


if __name__ == "__main__":
    main()
