"""Health by HTTP and by `penstock health`: while starting, prefetching, serving, draining, hung."""

from __future__ import annotations

import contextlib
import gc
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from penstock.client import errors

from .conftest import StartDaemon
from .support import HERE, DaemonProcess, random_tensors, same, wait_until, write_checkpoint

MIB = 1 << 20
STALL = ("--stall-timeout", "0.5", "--memory-limit", "16MiB")
"""On a busy machine the event loop may not get to run for so long: what is good has to become so, and need
not be so at once."""


def probe(daemon: DaemonProcess, *flags: str, says: str = "") -> int:
    """The exit code of `penstock health`, which has these words in its one line."""
    command = "import sys; from penstock.client.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", command, "health", "--socket-dir", str(daemon.socket_dir), *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
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
        return str(HERE / "hanging.py"), str(self.path), part

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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
    assert b"event loop" in daemon.http("/healthz")[1]
    assert stalled(daemon) == {"loop": 1, "readers": 0}
    code, body = daemon.http("/status")
    assert (code, b"event loop" in body) == (503, True)
    assert (probe(daemon, "--timeout=0.5"), probe(daemon, "--live", "--timeout=0.5")) == (1, 1)
    pipe.let_go()
    wait_until(lambda: codes(daemon) == (200, 200), "the recovery to be noticed")
    wait_until(lambda: (probe(daemon), probe(daemon, "--live")) == (0, 0), "gRPC to tell of it")
    wait_until(lambda: stalled(daemon) == {"loop": 0, "readers": 0}, "the metrics to tell of it")
    same(daemon.client().load(path), tensors)
    told = [line for line in daemon.log().splitlines() if " stalled " in line]
    assert all("part=loop" in line for line in told)
    assert any("hang (hanging.py:" in line for line in told)
    wait_until(lambda: " recovered part=loop" in daemon.log(), "the log to tell of the recovery")


def test_readers_that_all_hang_are_noticed_and_so_is_their_recovery(
    pipe: Pipe, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    tensors = random_tensors(4, MIB // 2)
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    flags = (*STALL, "--concurrency", "2", "--block-size", "1MiB")
    daemon = start_daemon(*flags, program=pipe.program("readers"))
    results: list[dict[str, torch.Tensor]] = []

    def load() -> None:
        results.append(client.load_state_dict(path))

    with daemon.client() as client:
        loading = threading.Thread(target=load)
        loading.start()
        wait_until(lambda: b"storage does not answer" in daemon.http("/healthz")[1], "the hang to be noticed")
        assert codes(daemon) == (503, 503)
        wait_until(lambda: stalled(daemon) == {"loop": 0, "readers": 1}, "the metrics to tell of it")
        wait_until(lambda: probe(daemon, "--live") == 1, "gRPC to tell of it")
        assert probe(daemon, "--live", says="hangs: every reader has been in one read for 0.5 s") == 1
        assert probe(daemon, says="is not ready: every reader") == 1
        status = daemon.status()
        assert (status["readers"]["stalled"], status["health"]["live"]) == (2, False)
        assert [load["waits_for"] for load in status["loads"]] == ["storage"]
        keep = pipe.stay_open()
        loading.join()
        wait_until(lambda: codes(daemon) == (200, 200), "the recovery to be noticed")
        wait_until(lambda: probe(daemon) == 0, "gRPC to tell of it")
        os.close(keep)
        same(results.pop().items(), tensors)
    gc.collect()
    assert " stalled part=readers" in daemon.log()


def test_one_reader_that_hangs_is_told_but_the_daemon_lives(
    pipe: Pipe, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    tensors = random_tensors(1, 1000)
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    daemon = start_daemon(*STALL, "--concurrency", "2", program=pipe.program("readers"))
    with daemon.client() as client:
        loading = threading.Thread(target=client.load_state_dict, args=(path,))
        loading.start()
        wait_until(lambda: stalled(daemon)["readers"], "the hang to be noticed")
        wait_until(lambda: codes(daemon) == (200, 200), "HTTP to say that the daemon lives")
        wait_until(lambda: probe(daemon) == 0, "gRPC to say that the daemon lives")
        pipe.let_go()
        loading.join()
    gc.collect()


def test_a_mount_that_hangs_holds_up_only_loads_from_it(
    pipe: Pipe, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    tensors = random_tensors(4, 1000)
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    daemon = start_daemon("--memory-limit", "16MiB", program=pipe.program("shm"))
    failures: list[Exception] = []

    def load_from_the_other_mount() -> None:
        try:
            client.load_state_dict("/dev/shm/penstock-not-there.safetensors")
        except errors.CheckpointNotFoundError as error:
            failures.append(error)

    with daemon.client() as client:
        loading = [threading.Thread(target=load_from_the_other_mount) for _ in range(24)]
        for thread in loading:
            thread.start()
        wait_until(lambda: len(daemon.status()["loads"]) == 24, "all to be under way")
        same(client.load_state_dict(path).items(), tensors)
        assert len(daemon.status()["loads"]) == 24
        keep = pipe.stay_open()
        for thread in loading:
            thread.join()
        os.close(keep)
    assert len(failures) == 24
    gc.collect()


def test_the_probe_imports_neither_torch_nor_protobuf(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--memory-limit", "16MiB")
    program = (
        "import sys; from penstock.client.cli import main\n"
        f"code = main(['health', '--socket-dir', {str(daemon.socket_dir)!r}])\n"
        "print([name for name in ('torch', 'numpy', 'google.protobuf') if name in sys.modules])\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["ready", "[]"]
