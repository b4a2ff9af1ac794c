"""Health by HTTP and by `penstock health`: while starting, prefetching, serving, draining, hung."""

from __future__ import annotations

import contextlib
import gc
import http.client
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.client import StreamerClient

from ...attacks.http2 import Connection, Flag, Kind, call_fields, frame
from ...ports import free_port
from ..conftest import StartDaemon
from ..support import DaemonProcess, random_tensors, run_python, same, wait_until, write_checkpoint

MIB = 1 << 20
STALL = ("--stall-timeout", "0.5", "--memory-limit", "16MiB")
"""On a busy machine the event loop may not get to run for so long: what is good has to become so, and need
not be so at once."""


def probe(daemon: DaemonProcess, *flags: str, says: str = "") -> int:
    """The exit code of `penstock health`, which has these words in its one line."""
    command = "import sys; from penstock.client.cli.commands import main; sys.exit(main(sys.argv[1:]))"
    done = run_python("-c", command, "health", "--socket-dir", daemon.socket_dir, *flags)
    assert bool(done.stdout) == (done.returncode == 0)
    assert len((done.stdout + done.stderr).splitlines()) == 1
    assert says in done.stdout + done.stderr
    return done.returncode


def codes(daemon: DaemonProcess) -> tuple[int, int]:
    """What /healthz and /readyz answer."""
    return daemon.http("/healthz")[0], daemon.http("/readyz")[0]


def stalled(daemon: DaemonProcess) -> dict[str, int]:
    lines = daemon.http("/metrics")[1].decode().splitlines()
    values = dict(line.split() for line in lines if line.startswith("penstock_stalled{"))
    return {part: int(float(values[f'penstock_stalled{{part="{part}"}}'])) for part in ("loop", "readers")}


class Pipe:
    """What a part of the daemon hangs on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    def program(self, part: str) -> tuple[str, ...]:
        return str(Path(__file__).with_name("hanging.py")), str(self.path), part

    def let_go(self) -> None:
        """Whoever hangs now goes on."""
        os.close(os.open(self.path, os.O_WRONLY))

    def stay_open(self) -> int:
        """From now on nobody hangs, until the descriptor is closed."""
        return os.open(self.path, os.O_RDWR)


@pytest.fixture
def pipe(tmp_path: Path) -> Pipe:
    return Pipe(tmp_path / "pipe")


def test_a_daemon_that_serves_is_live_and_ready(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--memory-limit", "16MiB")
    assert codes(daemon) == (200, 200)
    assert (probe(daemon), probe(daemon, "--live")) == (0, 0)
    assert stalled(daemon) == {"loop": 0, "readers": 0}
    assert daemon.status()["health"] == {"live": True, "ready": True, "reason": ""}
    assert daemon.http("/healthz") == daemon.http("/readyz") == (200, b"ok\n")


def test_no_daemon_is_not_healthy(socket_dir: Path) -> None:
    socket_dir.mkdir()
    daemon = DaemonProcess(socket_dir, "--nonsense")
    daemon.process.wait()
    assert (probe(daemon), probe(daemon, "--live")) == (1, 1)


def test_a_daemon_that_starts_is_live_and_not_ready(pipe: Pipe, socket_dir: Path, tmp_path: Path) -> None:
    port = free_port()
    daemon = DaemonProcess(socket_dir, "--http-address", f"127.0.0.1:{port}", program=pipe.program("start"))
    try:
        wait_until(lambda: answers(port, "/readyz") == (503, b"penstockd is starting\n"), "HTTP to be served")
        assert answers(port, "/healthz") == (200, b"ok\n")
        pipe.let_go()
        daemon.wait_ready()
        wait_until(lambda: codes(daemon) == (200, 200), "the daemon to be ready")
        daemon.end()
    finally:
        daemon.kill()


def answers(port: int, path: str) -> tuple[int, bytes] | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        try:
            connection.request("GET", path)
        except ConnectionRefusedError:
            return None
        response = connection.getresponse()
        return response.status, response.read()


def test_a_daemon_that_prefetches_first_is_live_and_then_ready(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    flags = ("--memory-limit", "16MiB", "--prefetch", str(path), "--ready-after-prefetch")
    daemon = start_daemon(*flags)
    assert codes(daemon) == (200, 503)
    assert b"--prefetch" in daemon.http("/readyz")[1]
    why = (
        f"penstock: the daemon in {daemon.socket_dir} is not ready: what --prefetch names is not staged yet; "
        "see `penstock status` and its log\n"
    )
    assert (probe(daemon, says=why), probe(daemon, "--live", says="live\n")) == (1, 0)
    tensors = random_tensors(2, 1000)
    other = write_checkpoint(tmp_path / "other.safetensors", tensors)
    same(daemon.client().load(other), tensors)  # loads are taken all the same
    gc.collect()
    write_checkpoint(path, tensors)
    wait_until(lambda: codes(daemon) == (200, 200), "the prefetch to be staged")
    assert probe(daemon) == 0


def test_a_daemon_that_drains_is_live_and_not_ready(start_daemon: StartDaemon, tmp_path: Path) -> None:
    tensors = random_tensors(8, MIB // 2)
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    daemon = start_daemon("--memory-limit", "4MiB")
    with daemon.client() as client, client.load(path) as load:
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: codes(daemon) == (200, 503), "the daemon to drain")
        assert b"drains" in daemon.http("/readyz")[1]
        assert (probe(daemon, says="is not ready: penstockd drains"), probe(daemon, "--live")) == (1, 0)
        same(load, tensors)
        del load
    gc.collect()
    assert daemon.process.wait(60) == 0


def test_an_event_loop_that_hangs_is_noticed_and_so_is_its_recovery(
    pipe: Pipe, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    tensors = random_tensors(2, 1000)
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    daemon = start_daemon(*STALL, program=pipe.program("loop"))
    wait_until(lambda: codes(daemon) == (200, 200), "the daemon to be ready")
    daemon.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: codes(daemon) == (503, 503), "the hang to be noticed")
    # Each is waited for: the watchdog excuses a loop that hangs for a moment when it did not run itself.
    words = b"the event loop has made no progress"
    wait_until(lambda: words in daemon.http("/healthz")[1], "HTTP to say why")
    wait_until(lambda: stalled(daemon) == {"loop": 1, "readers": 0}, "the metrics to tell of it")
    wait_until(lambda: words in daemon.http("/status")[1], "status to tell of it")
    assert daemon.http("/status")[0] == 503
    wait_until(lambda: "hang (hanging.py:" in daemon.log(), "the log to say where it hangs")
    assert (probe(daemon, "--timeout=0.5"), probe(daemon, "--live", "--timeout=0.5")) == (1, 1)
    pipe.let_go()
    wait_until(lambda: codes(daemon) == (200, 200), "the recovery to be noticed")
    wait_until(lambda: (probe(daemon), probe(daemon, "--live")) == (0, 0), "gRPC to tell of it")
    wait_until(lambda: stalled(daemon) == {"loop": 0, "readers": 0}, "the metrics to tell of it")
    same(daemon.client().load(path), tensors)
    told = [line for line in daemon.log().splitlines() if " stalled " in line]
    assert all("part=loop" in line for line in told)
    wait_until(lambda: " recovered part=loop" in daemon.log(), "the log to tell of the recovery")


@contextlib.contextmanager
def in_shm(tensors: dict[str, torch.Tensor]) -> Iterator[Path]:
    """A directory of another mount, with a checkpoint."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="penstock-") as directory:
        write_checkpoint(Path(directory) / "m.safetensors", tensors)
        yield Path(directory)


class Loads:
    """Loads on threads, of which each may hang."""

    def __init__(self, client: StreamerClient, source: Path, count: int) -> None:
        self.found: list[dict[str, torch.Tensor]] = []
        self._threads = [threading.Thread(target=self._load, args=(client, source)) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _load(self, client: StreamerClient, source: Path) -> None:
        self.found.append(client.load_state_dict(source))

    def wait(self) -> None:
        for thread in self._threads:
            thread.join()


def test_readers_that_all_hang_on_one_mount_are_told_and_the_daemon_lives(
    pipe: Pipe, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    tensors = random_tensors(4, MIB // 2)
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    flags = (*STALL, "--concurrency", "2", "--block-size", "1MiB")
    daemon = start_daemon(*flags, program=pipe.program("readers"))
    with daemon.client() as client:
        loads = Loads(client, path, 1)

        def both_hang() -> dict[str, Any] | None:
            """One may have begun later than the other."""
            (hung,) = daemon.status().get("hung_mounts") or [{}]
            return hung if hung.get("threads") == 2 else None

        hung = wait_until(both_hang, "both hangs to be told")
        assert Path(hung["mount_point"]).is_mount()
        assert hung["seconds"] > 0.5
        wait_until(lambda: codes(daemon) == (200, 200), "HTTP to say that the daemon lives")
        wait_until(lambda: probe(daemon) == 0, "gRPC to say that the daemon lives")
        status = daemon.status()
        assert (status["readers"]["stalled"], status["health"]["live"]) == (2, True)
        assert [load["waits_for"] for load in status["loads"]] == ["storage"]
        # Status asks at once, while the log is written by a thread that looks now and then.
        wait_until(lambda: " mount hangs mount=" in daemon.log(), "the log to tell of the hang")
        keep = pipe.stay_open()
        loads.wait()
        wait_until(lambda: not daemon.status().get("hung_mounts"), "the recovery to be noticed")
        os.close(keep)
        same(loads.found.pop().items(), tensors)
    gc.collect()
    wait_until(lambda: " mount answers again mount=" in daemon.log(), "the log to tell of the recovery")


def test_without_a_thread_for_what_can_be_read_the_daemon_hangs(
    pipe: Pipe, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """All readers hang on one mount, the pids limit lets no other take their place, and a load comes from
    elsewhere."""
    tensors = random_tensors(12, MIB // 4)
    small = random_tensors(2, MIB // 4, seed=1)
    path = write_checkpoint(tmp_path / "m.safetensors", small)
    flags = (*STALL, "--concurrency", "2", "--block-size", "1MiB")
    daemon = start_daemon(*flags, program=pipe.program("no-spares"))
    keep = pipe.stay_open()
    with in_shm(tensors) as directory, daemon.client() as client:
        source = directory / "m.safetensors"
        with client.load(source, memory_limit="6MiB") as load:
            iterator = iter(load)
            found = [next(iterator)]
            os.close(keep)
            hung = threading.Thread(target=lambda: found.extend(iterator))
            hung.start()
            wait_until(lambda: daemon.status().get("hung_mounts"), "the hang to be told")
            wait_until(lambda: codes(daemon) == (200, 200), "the daemon to live while nothing else waits")
            loads = Loads(client, path, 1)
            wait_until(lambda: codes(daemon) == (503, 503), "the daemon to be known to hang")
            why = b"no reader thread is left"
            wait_until(lambda: why in daemon.http("/healthz")[1], "HTTP to say why")
            wait_until(lambda: stalled(daemon) == {"loop": 0, "readers": 1}, "the metrics to tell of it")
            wait_until(lambda: probe(daemon, "--live") == 1, "gRPC to tell of it")
            wait_until(lambda: " stalled part=readers" in daemon.log(), "the log to tell of it")
            keep = pipe.stay_open()
            hung.join()
            loads.wait()
            wait_until(lambda: codes(daemon) == (200, 200), "the recovery to be noticed")
            os.close(keep)
        same(loads.found.pop().items(), small)
        same(found, tensors)
        found.clear()
    gc.collect()


@pytest.mark.parametrize("part", ["open", "list", "stat", "read"])
def test_a_mount_that_hangs_holds_up_only_loads_from_it(
    part: str, pipe: Pipe, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """`tests/attacks/test_mounts_hang.py` does it with a real file system, which needs root."""
    tensors = random_tensors(4, 1000)
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    daemon = start_daemon("--memory-limit", "16MiB", program=pipe.program(part))
    with in_shm(tensors) as directory, daemon.client() as client:
        loads = Loads(client, directory, 24)
        wait_until(lambda: len(daemon.status()["loads"]) == 24, "all to be under way")
        same(client.load_state_dict(path).items(), tensors)
        assert len(daemon.status()["loads"]) == 24
        keep = pipe.stay_open()
        loads.wait()
        os.close(keep)
        for found in loads.found:
            same(found.items(), tensors)
        loads.found.clear()
    gc.collect()


def test_a_daemon_whose_grpc_server_ends_by_itself_says_why_and_ends(socket_dir: Path) -> None:
    """The gate keeps out what would end it: this call goes past the gate, which only the daemon's own user
    and root can, by a descriptor of the daemon's."""
    daemon = DaemonProcess(socket_dir, "--memory-limit", "16MiB").wait_ready()
    try:
        with Connection(inner_socket(daemon)) as connection:
            path = b"/\xff"  # no UTF-8, for which gRPC 1.85 has no handling
            connection.send(frame(Kind.HEADERS, Flag.END_HEADERS, 1, call_fields(path)))
            assert daemon.process.wait(60) == 1, daemon.log()
        assert " error grpc ended why=" in daemon.log()
        assert "UnicodeDecodeError" in daemon.log()
        assert " stopped " in daemon.log()
        assert not any(path.suffix == ".sock" for path in socket_dir.iterdir())
    finally:
        daemon.kill()


def inner_socket(daemon: DaemonProcess) -> str:
    """Where gRPC listens, behind the gate: no path leads there but a descriptor's."""
    directory = Path(f"/proc/{daemon.process.pid}/fd")
    (found,) = [fd for fd in directory.iterdir() if os.readlink(fd).endswith(" (deleted)") and fd.is_socket()]
    return str(found)


def test_the_probe_imports_neither_torch_nor_protobuf(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--memory-limit", "16MiB")
    program = (
        "import sys; from penstock.client.cli.commands import main\n"
        f"code = main(['health', '--socket-dir', {str(daemon.socket_dir)!r}])\n"
        "print([name for name in ('torch', 'numpy', 'google.protobuf') if name in sys.modules])\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["ready", "[]"]
