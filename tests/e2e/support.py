"""A real penstockd as a process, checkpoints on disk, and the questions that tests ask of both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from penstock.client import StreamerClient

DEADLINE_SECONDS = 60.0


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of `condition`; fails when it takes absurdly long."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {DEADLINE_SECONDS:.0f} s for: {what}")
        time.sleep(0.01)
    return value


class DaemonProcess:
    """penstockd with the given flags in `socket_dir`, started and ready."""

    def __init__(
        self,
        socket_dir: Path,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        wrapper: tuple[str, ...] = (),
    ) -> None:
        """`wrapper` is put before the command, to run it in namespaces or as another user."""
        self.socket_dir = socket_dir
        self._log_path = socket_dir.parent / f"{socket_dir.name}.log"
        command = [*wrapper, sys.executable, "-m", "penstock.server", "--socket-dir", str(socket_dir), *flags]
        with self._log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **(environment or {})}
            )

    def wait_ready(self) -> DaemonProcess:
        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"penstockd ended with {self.process.returncode}:\n{self.log()}")
            return " serving " in self.log()

        wait_until(ready, "penstockd to serve")
        return self

    def log(self) -> str:
        return self._log_path.read_text()

    def client(self) -> StreamerClient:
        return StreamerClient(self.socket_dir)

    def status(self) -> dict[str, Any]:
        with self.client() as client:
            return client.status()

    def wait_populated(self) -> None:
        wait_until(lambda: " populated " in self.log(), "the staging buffer to be populated")

    def wait_idle(self) -> dict[str, Any]:
        """Until nobody holds or reads anything: what invariant 3 promises once the last client is gone."""

        def idle() -> dict[str, Any] | None:
            status = self.status()
            staging = status["staging"]
            busy = staging["leased_bytes"] or staging["reading_bytes"] or staging["waiting"]
            return None if busy or status["loads"] else status

        result: dict[str, Any] = wait_until(idle, "every lease and load to be gone")
        return result

    def fds(self) -> list[str]:
        """What every open descriptor of the daemon is."""
        found = []
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                found.append(str(entry.readlink()))
            except FileNotFoundError:  # closed meanwhile
                continue
        return found

    def memory_kib(self, field: str) -> int:
        """A field such as RssAnon of /proc/PID/status."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
        raise AssertionError(f"no {field}")

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_SECONDS)


def random_tensors(count: int, elements: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Finite float32 tensors of distinct contents."""
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{number}.weight": torch.rand(elements, generator=generator) for number in range(count)}


def write_checkpoint(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Path:
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def same(found: Iterator[tuple[str, torch.Tensor]] | Any, expected: dict[str, torch.Tensor]) -> None:
    """Fails unless both have the same names, dtypes, shapes and bytes; each name once."""
    names = []
    for name, tensor in found:
        names.append(name)
        want = expected[name]
        assert tensor.dtype == want.dtype, name
        assert tensor.shape == want.shape, name
        assert torch.equal(tensor.view(-1).view(torch.uint8), want.view(-1).view(torch.uint8)), name
    assert sorted(names) == sorted(expected)
