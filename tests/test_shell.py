"""Tests pass whatever the shell hands down to them: a handful of the suite is run from a hostile one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

HANDFUL = (
    "client/cli/test_cli.py::test_ctrl_c_is_130_and_silent",
    "client/test_embedded.py::test_it_serves_and_leaves_nothing_behind",
    "client/test_embedded.py::test_dropping_the_client_ends_the_daemon",
    "e2e/operation/test_daemon_flags.py::test_it_stops_with_0_when_signalled",
    "e2e/failures/test_deaths.py::test_a_signal_in_mid_load_gives_everything_back",
    "e2e/deployment/test_isolation.py::test_another_user_is_served_what_is_allowed",
    "server/edge/test_gate.py",
)
"""Those that signals, masks, descriptors, locales and directories could break."""

HOSTILE_SHELL = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGUSR1])
os.umask(0o077)
for _ in range(20):
    os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_what_a_hostile_shell_hands_down_changes_no_test(tmp_path: Path) -> None:
    directory = tmp_path / ("t" * max(1, 90 - len(str(tmp_path)) - 1))
    directory.mkdir()
    variables = {
        "TMPDIR": str(directory),
        "LC_ALL": "C",
        "PYTHONWARNINGS": "error",
        "PENSTOCK_MEMORY_LIMIT": "1",
        "RUNAI_STREAMER_MEMORY_LIMIT": "1",
        "AWS_PROFILE": "of-somebody-else",
        "PYTEST_ADDOPTS": "",
    }
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE_SHELL, *pytest_command, *(str(HERE / name) for name in HANDFUL)],
        cwd=HERE.parent,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert not list(directory.iterdir())
