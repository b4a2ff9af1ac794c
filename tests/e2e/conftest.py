from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .containers import cannot
from .support import Checkpoints, DaemonProcess, Nursery, running_daemon, the_nursery

StartDaemon = Callable[..., DaemonProcess]


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """Not tmp_path: the path of a socket has to be short."""
    top = Path(tempfile.mkdtemp(prefix="pst-"))
    top.chmod(0o755)
    yield top / "s"
    shutil.rmtree(top)


@pytest.fixture
def start_daemon(socket_dir: Path) -> Iterator[StartDaemon]:
    """Starts daemons; at the end each that still runs has to be idle and to stop cleanly."""
    daemons: list[DaemonProcess] = []

    def start(*flags: str, populated: bool = True, **options: object) -> DaemonProcess:
        daemon = DaemonProcess(socket_dir, *flags, **options)  # type: ignore[arg-type]
        daemons.append(daemon)
        return daemon.wait_ready(populated=populated)

    yield start
    try:
        for daemon in daemons:
            daemon.end()
    finally:
        for daemon in daemons:
            daemon.kill()


@pytest.fixture(scope="module")
def module_daemon() -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "16MiB") as daemon:
        yield daemon


@pytest.fixture
def daemon(module_daemon: DaemonProcess) -> Iterator[DaemonProcess]:
    """16 MiB of memory in 8 slabs; nothing staged before the test, idle after it."""
    with module_daemon.client() as client:
        client.evict()
        yield module_daemon
        module_daemon.wait_idle()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Checkpoints that several tests load and none changes."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def write(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path)


@pytest.fixture(scope="session")
def nursery_process() -> Nursery:
    """The same in every conftest that imports this fixture, which pytest takes for as many fixtures."""
    return the_nursery()


@pytest.fixture
def nursery(nursery_process: Nursery, start_daemon: StartDaemon) -> Iterator[Nursery]:
    """Starts client processes. Those that still run at the end are killed, before daemons have to be idle."""
    yield nursery_process
    nursery_process.end_all()


@pytest.fixture(scope="session")
def root() -> None:
    if os.geteuid() != 0:
        cannot("needs root, to become other users and to make namespaces")


@pytest.fixture
def unshare(root: None, require_tool: Callable[[str], str]) -> tuple[str, ...]:
    """Runs a command as the first process of namespaces of its own."""
    flags = ("--mount", "--ipc", "--pid", "--net", "--uts", "--fork", "--kill-child", "--propagation=private")
    command = (require_tool("unshare"), *flags)
    if subprocess.run([*command, "true"], check=False).returncode != 0:
        cannot("namespaces cannot be made here")
    return command
