"""Python in a process that was forked from one with the imports: what it runs, it runs as `python` would."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def run(command: list[str], directory: str) -> int:
    """`-c` and a text, or a file, and the arguments; what nurseries have imported is there. Returns the exit
    code."""
    os.chdir(directory)
    tempfile.tempdir = None  # TMPDIR may be another
    if command[0] == "-c":
        text, name, arguments = command[1], "<string>", ["-c", *command[2:]]
        sys.path[0] = ""
    else:
        text, name, arguments = Path(command[0]).read_text(), command[0], command
        sys.path[0] = str(Path(name).parent)
    sys.argv = arguments
    main = ModuleType("__main__")
    main.__file__ = name
    sys.modules["__main__"] = main
    try:
        exec(compile(text, name, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise  # a message
        return int(end.code or 0)
    return 0
