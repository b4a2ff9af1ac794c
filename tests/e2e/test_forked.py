"""The harness itself: what a forked process has of the test, and how it ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .forked import Forker
from .support import HERE, run_python


def test_a_process_that_forks_others_has_nothing_that_the_test_changed_which_starts_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", "/nowhere")
    monkeypatch.chdir(tmp_path)
    forker = Forker(HERE / "interpreter.py")
    program = {"command": ["-c", "pass"], "directory": "/"}
    assert forker.fork("run", program, [0, 1, 2]).wait(45) == 0  # by then it is what it was started as
    process = Path(f"/proc/{forker._process.pid}")
    environment = process.joinpath("environ").read_text()
    directory = os.readlink(process / "cwd")
    forker.close()
    assert "LC_ALL=C.UTF-8" in environment
    assert "PENSTOCK_SOCKET_DIR" not in environment
    assert directory != str(tmp_path)


def test_what_runs_as_python_does_has_the_test_s_environment_directory_and_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", "/nowhere")
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, tempfile\n"
        "print(os.environ['PENSTOCK_SOCKET_DIR'], os.getcwd(), tempfile.gettempdir())\n"
        "print(__name__, sys.argv, sys.path[0], sys.stdin.read())\n"
    )
    done = run_python(script, "-x", environment={"TMPDIR": str(tmp_path)}, said="words")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"/nowhere {tmp_path} {tmp_path}",
        f"__main__ ['{script}', '-x'] {tmp_path} words",
    ]


@pytest.mark.parametrize(
    ("text", "code", "errors"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('a message')", 1, "a message\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import atexit, sys; atexit.register(sys.stderr.write, 'at the end')", 0, "at the end"),
        (
            "import sys, threading\n"
            "def outlive():\n"
            "    threading.main_thread().join()\n"
            "    sys.stderr.write('a thread')\n"
            "threading.Thread(target=outlive).start()",
            0,
            "a thread",
        ),
    ],
    ids=["returns", "exits", "code", "message", "raises", "exit handler", "thread"],
)
def test_it_ends_as_python_does(text: str, code: int, errors: str) -> None:
    done = run_python("-c", text)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.endswith(errors)
