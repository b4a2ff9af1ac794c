"""Forks processes that have imported a module already: starting one takes milliseconds, not seconds.

Run as a program with the number of a socket and the path of a module. For every packet (JSON, and three
descriptors that become standard input, output and error) it forks a child that runs a function of the module,
or `package.module:function` from the repository's root, and answers with its pid. A packet {"poll": pid} is
answered with the child's exit status, null while it runs.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import socket
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn


def main() -> None:
    path = Path(sys.argv[2])
    sys.path.insert(0, str(path.parent))  # what is beside it is not in a package here
    sys.path.append(str(Path(__file__).parents[2]))
    programs = importlib.import_module(path.stem)
    gc.collect()
    # Else a child that ends goes through all modules and copies their pages: half a second with torch.
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as parent:
        while True:
            data, fds, _, _ = socket.recv_fds(parent, 1 << 18, 3)
            if not data:
                return
            request = json.loads(data)
            if "poll" in request:
                pid, status = os.waitpid(request["poll"], os.WNOHANG)
                parent.send(json.dumps(os.waitstatus_to_exitcode(status) if pid else None).encode())
                continue
            pid = os.fork()
            if not pid:
                parent.close()
                _become(programs, request, fds)
            for fd in fds:
                os.close(fd)
            parent.send(json.dumps(pid).encode())


def _become(programs: ModuleType, request: dict[str, Any], fds: list[int]) -> NoReturn:
    """The child. A program that calls `sys.exit` ends as an interpreter does. After one that returns, perhaps
    its exit code, threads are waited for and exit handlers run, and no more: to take torch's modules apart
    costs six times what a small load does."""
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    if request["environment"] is not None:
        os.environ.clear()
        os.environ.update(request["environment"])
    try:
        module, _, name = request["program"].rpartition(":")
        # Before the uid is given up: another user may not be able to read the checkout.
        program = getattr(importlib.import_module(module) if module else programs, name)
        if (uid := request["uid"]) is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        code = program(**request["arguments"])
    except SystemExit:
        raise
    except BaseException as error:
        traceback.print_exc()
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main()
