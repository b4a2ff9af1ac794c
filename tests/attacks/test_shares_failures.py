"""A daemon that is refused threads, address space or descriptors fails the loads that need them with a
reason, leaks nothing, and serves the next one.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.client import errors

from ..e2e.containers import cannot
from ..e2e.support import (
    MIB,
    Checkpoint,
    DaemonProcess,
    open_fds,
    process_figure,
    random_tensors,
    same,
    wait_until,
    write_checkpoint,
)
from .conftest import StartTarget
from .support import TargetDaemon

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture
def checkpoint(models: Path) -> Checkpoint:
    """40 MiB in 40 tensors."""
    tensors = random_tensors(40, MIB // 4, seed=9)
    path = write_checkpoint(models / "model.safetensors", tensors)
    path.chmod(0o644)
    return path, tensors


def limit(daemon: DaemonProcess, what: int, most: int) -> None:
    """Soft, so that it can be lifted."""
    _, hard = resource.prlimit(daemon.process.pid, what)
    resource.prlimit(daemon.process.pid, what, (most, hard))


def lift(daemon: DaemonProcess, what: int) -> None:
    _, hard = resource.prlimit(daemon.process.pid, what)
    resource.prlimit(daemon.process.pid, what, (hard, hard))


def settled_fds(daemon: DaemonProcess, at_most: int) -> bool:
    """Nothing of what failed is left; gRPC closes connections when it likes."""
    return len(open_fds(daemon.process.pid)) <= at_most


def attempt(daemon: TargetDaemon, path: Path) -> errors.PenstockError | None:
    with daemon.client() as client:
        try:
            client.load_state_dict(path)
        except errors.PenstockError as error:
            return error
    return None


@pytest.fixture
def pids_cgroup() -> Iterator[Path]:
    """A control group that bounds processes and threads, of either version."""
    top = Path("/sys/fs/cgroup/pids")
    top = top if top.is_dir() else Path("/sys/fs/cgroup")
    group = top / f"penstock-attack-{os.getpid()}"
    try:
        group.mkdir()
        (group / "pids.max").write_text("max")
    except OSError as error:
        cannot(f"pids control groups cannot be made here: {error}")
    yield group
    wait_until(lambda: not (group / "cgroup.procs").read_text(), "the control group to be empty")
    group.rmdir()


def test_loads_that_find_no_thread_say_so_until_there_is_one(
    pids_cgroup: Path, start_target: StartTarget, checkpoint: Checkpoint
) -> None:
    """One more is allowed after each failure, so that each step of a load is the one that finds none."""
    daemon = start_target()
    fds = len(daemon.fds())
    (pids_cgroup / "cgroup.procs").write_text(str(daemon.process.pid))
    threads = process_figure(daemon.process.pid, "Threads")
    told: list[str] = []
    for more in range(20):
        (pids_cgroup / "pids.max").write_text(str(threads + more))
        error = attempt(daemon, checkpoint[0])
        wait_until(lambda: settled_fds(daemon, fds), "descriptors to be given back")
        if error is None:
            break
        assert isinstance(error, errors.TooManyLoadsError), error
        assert "pids.max" in str(error)
        told.append(str(error))
    else:
        raise AssertionError(f"no load came through: {told}")
    assert len(told) >= 3, told
    (pids_cgroup / "pids.max").write_text("max")
    daemon.assert_serves(checkpoint)
    daemon.end()


def test_loads_that_find_no_address_space_fail_and_the_next_one_works(
    start_target: StartTarget, checkpoint: Checkpoint
) -> None:
    daemon = start_target("--no-populate", memory_limit_bytes=256 * MIB)
    tiny = write_checkpoint(checkpoint[0].parent / "tiny.safetensors", random_tensors(1, 100))
    assert attempt(daemon, tiny) is None  # all threads are there from now on
    fds = len(daemon.fds())
    size_bytes = process_figure(daemon.process.pid, "VmSize") * 1024
    for _ in range(5):
        limit(daemon, resource.RLIMIT_AS, size_bytes + 20 * MIB)
        error = attempt(daemon, checkpoint[0])
        assert isinstance(error, errors.StagingExhaustedError), error
        assert "ulimit -v" in str(error)
        assert attempt(daemon, tiny) is None
        wait_until(lambda: settled_fds(daemon, fds), "descriptors to be given back")
    lift(daemon, resource.RLIMIT_AS)
    daemon.assert_serves(checkpoint)


def test_loads_that_find_no_descriptor_for_slabs_fail_and_the_next_one_works(
    start_target: StartTarget, checkpoint: Checkpoint
) -> None:
    daemon = start_target("--no-populate", memory_limit_bytes=256 * MIB)
    fds = len(daemon.fds())
    for _ in range(5):
        limit(daemon, resource.RLIMIT_NOFILE, fds + 10)  # 10 slabs are needed, and some for the load itself
        error = attempt(daemon, checkpoint[0])
        lift(daemon, resource.RLIMIT_NOFILE)
        assert isinstance(error, errors.TooManyLoadsError), error
        assert re.search(r"descriptor.*LimitNOFILE", str(error))
        wait_until(lambda: settled_fds(daemon, fds), "descriptors to be given back")
    daemon.assert_serves(checkpoint)


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("lambda *_: 1 / 0", errors.PenstockError, r"ZeroDivisionError.*report"),
        ("lambda *_: bytearray(1 << 62)", errors.StagingExhaustedError, "memory"),
    ],
)
def test_a_fault_in_a_load_reaches_its_client_with_the_load_s_id_and_the_log_has_it(
    tmp_path: Path, checkpoint: Checkpoint, fault: str, kind: type[errors.PenstockError], says: str
) -> None:
    """The daemon serves on."""
    program = (
        "import penstock.server.loads.load as load; from penstock.server.__main__ import main; "
        f"right = load.selected_bytes; fault = {fault}; "
        "load.selected_bytes = lambda *a: (setattr(load, 'selected_bytes', right), fault())[1]; main()"
    )
    top = Path(tempfile.mkdtemp(prefix="pst-", dir="/tmp"))
    daemon = DaemonProcess(
        top / "s",
        "--memory-limit",
        "64MiB",
        environment={"PENSTOCK_HTTP_ADDRESS": "127.0.0.1:0"},
        program=("-c", program),
    )
    try:
        daemon.wait_ready()
        with pytest.raises(kind, match=says) as caught:
            daemon.client().load_state_dict(checkpoint[0])
        load_id = caught.value.load_id
        assert load_id
        assert load_id in str(caught.value)
        assert f"result={caught.value.reason} load={load_id}" in daemon.log()
        if kind is errors.PenstockError:
            assert "ZeroDivisionError" in daemon.log()
        same(daemon.client().load_state_dict(checkpoint[0]).items(), checkpoint[1])
        daemon.wait_idle()
    finally:
        daemon.kill()
        shutil.rmtree(top)
