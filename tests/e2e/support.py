"""A real penstockd as a process, checkpoints on disk, and the questions that tests ask of both."""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import json
import os
import queue
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import grpc
import safetensors.torch
import torch

from penstock.client import StreamerClient
from penstock.v1 import streamer_pb2 as pb
from penstock.v1 import streamer_pb2_grpc

from .forked import ForkedProcess, Forker, fork_daemon, fork_daemon_by
from .programs import digests

DEADLINE_SECONDS = 120.0
"""A machine may be several times slower than another, and busy with other tests."""
PROGRAM_SECONDS = 150.0
"""For a whole program, which may import what takes ten seconds on an idle machine."""
HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PENSTOCKD = ("-m", "penstock.server")
PYTHON = "tests.e2e.interpreter:run"


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of `condition`; fails when it takes absurdly long."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {DEADLINE_SECONDS:.0f} s for: {what}")
        time.sleep(0.01)
    return value


class DaemonProcess:
    """penstockd with the given flags in `socket_dir`, started and ready.

    A process forked from one that has imported penstock.server. With a wrapper it is executed, and with a
    HOME of its own, which botocore reads when it is imported."""

    def __init__(
        self,
        socket_dir: Path,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        wrapper: tuple[str, ...] = (),
        program: tuple[str, ...] = (),
        log_path: Path | None = None,
    ) -> None:
        """`wrapper` is put before the command, to run it in namespaces or as another user; `program` is what
        Python runs instead of penstockd."""
        self.socket_dir = socket_dir
        self.log_path = log_path or socket_dir.parent / f"{socket_dir.name}.log"
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        flags = ("--socket-dir", str(socket_dir), *flags)
        executed = bool(wrapper) or "HOME" in (environment or {})
        environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[bytes] | ForkedProcess
        with self.log_path.open("ab") as log:
            if executed:
                command = [*wrapper, sys.executable, *(program or PENSTOCKD), *flags]
                self.process = subprocess.Popen(
                    command, stderr=log, stdin=subprocess.DEVNULL, env=environment
                )
            elif program:
                arguments = {"command": [*program, *flags], "directory": os.getcwd()}
                self.process = fork_daemon_by(PYTHON, arguments, environment, log)
            else:
                self.process = self._fork(flags, environment, log)

    def _fork(self, flags: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> ForkedProcess:
        return fork_daemon(flags, environment, log)

    def wait_ready(self, *, populated: bool = True) -> DaemonProcess:
        """Until it serves and, unless `populated` is false, has made the buffer that it is to make: before, a
        load gets less memory than there will be, and may be told to wait for it."""

        def logged(word: str) -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"penstockd ended with {self.process.returncode}:\n{self.log()}")
            return f" {word} " in self.log()

        wait_until(lambda: logged("serving"), "penstockd to serve")
        if populated and " populate=true " in self.log():
            wait_until(lambda: logged("populated"), "the staging buffer to be populated")
        return self

    def log(self) -> str:
        """What it wrote, without what earlier daemons of the directory did."""
        return self.log_path.read_bytes()[self._log_start :].decode()

    def http(self, path: str, *, method: str = "GET", accept: str = "*/*") -> tuple[int, bytes]:
        """Status and body of an answer of its HTTP port."""
        host, _, port = self.http_address.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE_SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, headers={"Accept": accept})
            response = connection.getresponse()
            return response.status, response.read()

    def http_status(self) -> dict[str, Any]:
        """What /status tells, once the event loop is not too busy to be asked."""
        told: dict[str, Any] = json.loads(wait_until(lambda: self._found("/status"), "/status to be told"))
        return told

    def _found(self, path: str) -> bytes | None:
        code, body = self.http(path)
        return body if code == 200 else None

    @property
    def http_address(self) -> str:
        """HOST:PORT where it serves HTTP, by its log."""
        match = re.search(r" http=(\S+) ", self.log())
        assert match, self.log()
        return match[1]

    def client(self) -> StreamerClient:
        return StreamerClient(self.socket_dir)

    def status(self) -> dict[str, Any]:
        with self.client() as client:
            return client.status()

    def read_bytes(self) -> int:
        """All that it has read from storage, by its own count."""
        total: int = self.status()["totals"]["read_bytes"]
        return total

    def leased_bytes(self) -> int:
        count: int = self.status()["staging"]["leased_bytes"]
        return count

    def wait_idle(self) -> dict[str, Any]:
        """Until nobody holds or reads anything: what invariant 3 promises once the last client is gone."""

        def idle() -> dict[str, Any] | None:
            status = self.status()
            staging = status["staging"]
            busy = staging["leased_bytes"] or staging["reading_bytes"] or staging["waiting"]
            return None if busy or status["loads"] else status

        result: dict[str, Any] = wait_until(idle, "every lease and load to be gone")
        return result

    def assert_log_clean(self) -> None:
        """Fails when anything went wrong that nobody expected."""
        for sign in ("Traceback", "never retrieved", "never awaited", "Error in", "was destroyed"):
            assert sign not in self.log(), self.log()

    def fds(self) -> list[str]:
        """What every open descriptor of the daemon is."""
        return open_fds(self.process.pid)

    def memory_kib(self, field: str) -> int:
        """A field such as RssAnon of /proc/PID/status."""
        return process_figure(self.process.pid, field)

    def end(self) -> None:
        """Unless it ended before, it has to be idle and to stop cleanly."""
        if self.process.poll() is None:
            self.wait_idle()
            assert self.terminate() == 0, self.log()
        self.assert_log_clean()

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_SECONDS)


@contextlib.contextmanager
def running_daemon(*flags: str, environment: Mapping[str, str] | None = None) -> Iterator[DaemonProcess]:
    """A daemon for several tests, checked as `start_daemon` does."""
    top = Path(tempfile.mkdtemp(prefix="pst-"))
    top.chmod(0o755)
    daemon = DaemonProcess(top / "s", *flags, environment=environment)
    try:
        yield daemon.wait_ready()
        daemon.end()
    finally:
        daemon.kill()
        shutil.rmtree(top)


def open_fds(pid: int) -> list[str]:
    """What every open descriptor of a process is."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.append(str(entry.readlink()))
    return found


def process_figure(pid: int, field: str) -> int:
    """A number of /proc/PID/status, such as RssAnon (in KiB) or Threads."""
    return process_figures(pid, field)[0]


def process_figures(pid: int, *fields: str) -> list[int]:
    """Of one moment. Raises AssertionError where there is none, as of a process that ends."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = [re.search(rf"^{field}:\s*(\d+)", text, re.MULTILINE) for field in fields]
    assert all(found), f"no {', '.join(fields)}"
    return [int(match[1]) for match in found if match]


def descendants(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                found += [child, *descendants(child)]
    return found


SHARED_MEMORY = "/dev/shm/"


def shared_memory() -> set[str]:
    """The names of shared memory that this machine has. Directories beside them are other tests'."""
    return {entry.name for entry in os.scandir(SHARED_MEMORY) if entry.is_file(follow_symlinks=False)}


def assert_no_shared_memory_but(before: set[str]) -> None:
    """Nothing was left since then. What processes have mapped that are none of this test's is theirs."""

    def left() -> set[str]:
        new = shared_memory() - before
        return new and new - _shared_memory_of_others()

    wait_until(lambda: not left(), f"these names in {SHARED_MEMORY} to go: {left()}")


def _shared_memory_of_others() -> set[str]:
    own = {os.getpid(), *descendants(os.getpid())}
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) not in own:
            with contextlib.suppress(OSError):  # it ended, or may not be looked at
                for line in (entry / "maps").read_text(errors="replace").splitlines():
                    found.add(line.partition(SHARED_MEMORY)[2])
    return found


class Nursery(Forker):
    """Starts client processes."""

    def __init__(self) -> None:
        super().__init__(HERE / "programs.py")
        self._clients: list[ClientProcess] = []

    def start(
        self, program: str | Callable[..., None], *, uid: int | None = None, **arguments: Any
    ) -> ClientProcess:
        """Runs a function of `programs.py`, by name, or of any other module of the tests, perhaps as another
        user; paths may be given as such."""
        if not isinstance(program, str):
            program = f"{program.__module__}:{program.__qualname__}"
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
        client = ClientProcess(self, program, uid, plain)
        self._clients.append(client)
        return client

    def hold(self, daemon: DaemonProcess, checkpoint: Checkpoint) -> ClientProcess:
        """A client that has loaded a checkpoint and keeps its tensors."""
        path, tensors = checkpoint
        client = self.start("hold", socket_dir=daemon.socket_dir, source=path)
        assert client.hear("holds")["found"] == expected(tensors)
        return client

    def pause(self, daemon: DaemonProcess, source: Path, *, after: int, **options: Any) -> ClientProcess:
        """A client whose load stands still after so many tensors; 0: after the manifest."""
        client = self.start("load", socket_dir=daemon.socket_dir, source=source, pause_after=after, **options)
        client.hear("paused")
        return client

    def stream_as_ranks(
        self, daemon: DaemonProcess, paths: list[str], store: Path, *options: dict[str, Any]
    ) -> list[ClientProcess]:
        """The ranks of a gloo job, one for each of the options, which stream the paths through the drop-in;
        `store` is the file by which they find each other."""
        return [
            self.start(
                "stream_as_rank",
                socket_dir=daemon.socket_dir,
                rank=rank,
                world_size=len(options),
                store=store,
                paths=paths,
                **own,
            )
            for rank, own in enumerate(options)
        ]

    def end_all(self) -> None:
        """Kills what still runs."""
        for client in self._clients:
            client.end()
        self._clients.clear()

    def close(self) -> None:
        self.end_all()
        super().close()


def the_nursery() -> Nursery:
    """One for all tests of this process; it ends with it. From any thread."""
    with _nursery_lock:
        return _nursery()


@functools.cache
def _nursery() -> Nursery:
    nursery = Nursery()
    atexit.register(nursery.close)
    return nursery


_nursery_lock = threading.Lock()


def run_python(
    *command: str | Path, environment: Mapping[str, str] | None = None, said: str = ""
) -> subprocess.CompletedProcess[str]:
    """What comes of `python COMMAND...`, which is told something by its standard input. It need not import
    torch and penstock.client: where that is to be seen, or an import is what is tested, execute Python."""
    arguments = {"command": [str(part) for part in command], "directory": os.getcwd()}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(said.encode())
        files[0].seek(0)
        fds = [file.fileno() for file in files]
        environment = {**os.environ, **(environment or {})}
        process = the_nursery().fork(PYTHON, arguments, fds, environment=environment)
        try:
            code = process.wait(PROGRAM_SECONDS)
        finally:
            process.kill()
        output, errors = (os.pread(file.fileno(), 1 << 24, 0).decode() for file in files[1:])
    return subprocess.CompletedProcess(arguments["command"], code, output, errors)


class ClientProcess:
    """A process that runs a program of `programs.py`."""

    def __init__(self, nursery: Nursery, program: str, uid: int | None, arguments: dict[str, Any]) -> None:
        self._buffer = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        their_input, self._input = os.pipe()
        self._output, their_output = os.pipe()
        try:
            fds = [their_input, their_output, self._errors.fileno()]
            self._process = nursery.fork(program, arguments, fds, uid=uid)
        finally:
            os.close(their_input)
            os.close(their_output)

    @property
    def pid(self) -> int:
        return self._process.pid

    def go(self, line: str = "go") -> None:
        """What `await_go` waits for."""
        os.write(self._input, f"{line}\n".encode())

    def hear(self, word: str, *, patience_seconds: float = DEADLINE_SECONDS) -> dict[str, Any]:
        """The next thing the process says, which has to be `word`."""
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._output], [], [], patience_seconds)
            assert ready, f"the client says nothing; so far: {self.errors()}"
            data = os.read(self._output, 1 << 20)
            assert data, f"the client ended instead of saying {word!r}: {self.errors()}"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        assert said["word"] == word, said
        return said

    def errors(self) -> str:
        """Its standard error."""
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode(errors="replace")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def exit_code(self) -> int | None:
        """None while it runs; -9 for SIGKILL."""
        return self._process.poll()

    def wait(self) -> int:
        return self._process.wait(DEADLINE_SECONDS)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self.wait()

    def end(self) -> None:
        if self._input >= 0:
            if self.exit_code() is None:
                self.kill()
            os.close(self._input)
            os.close(self._output)
            self._errors.close()
            self._input = self._output = -1


class RawLoad:
    """One Load call spoken by hand, with the handoff connection that its token came from."""

    def __init__(
        self, daemon: DaemonProcess, source: Path | str, *, token: str | None = None, **fields: Any
    ) -> None:
        """`token` instead of the one it got."""
        self.handoff = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.handoff.settimeout(DEADLINE_SECONDS)
        self.handoff.connect(str(daemon.socket_dir / "handoff.sock"))
        self.token = pb.HandoffFrame.FromString(self.handoff.recv(1 << 16)).hello.token
        self._channel = grpc.insecure_channel(
            f"unix:{daemon.socket_dir / 'penstock.sock'}", options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self._requests: queue.SimpleQueue[pb.LoadRequest | None] = queue.SimpleQueue()
        self._requests.put(pb.LoadRequest(open=pb.OpenLoad(sources=[str(source)], **fields)))
        service: Any = streamer_pb2_grpc.StreamerServiceStub(self._channel)
        self._call = service.Load(
            iter(self._requests.get, None),
            metadata=[("penstock-session", self.token if token is None else token)],
            timeout=DEADLINE_SECONDS,
        )

    def next(self, kind: str) -> Any:
        """The next message, which has to be of that kind."""
        response = next(self._call)
        assert response.WhichOneof("response") == kind, response
        return getattr(response, kind)

    def next_but(self, kind: str) -> Any:
        """The next message that is not of that kind."""
        return next(response for response in self._call if response.WhichOneof("response") != kind)

    def select(self, names: list[str]) -> None:
        self._requests.put(pb.LoadRequest(select=pb.SelectTensors(names=names)))

    def release(self, segments: int) -> None:
        self._requests.put(pb.LoadRequest(release=pb.Release(segments=segments)))

    def finish(self) -> None:
        """Takes what is left, releasing it; the lease stays."""
        for response in self._call:
            if response.WhichOneof("response") == "segment_ready":
                self.release(response.segment_ready.index + 1)

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()
        self._channel.close()
        self.handoff.close()

    def __enter__(self) -> RawLoad:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def expected(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    """What a client process says that it found when it found these, in the order of the file."""
    return [list(pair) for pair in digests(sorted(tensors.items()))]


def random_tensors(count: int, elements: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Finite float32 tensors of distinct contents."""
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{number}.weight": torch.rand(elements, generator=generator) for number in range(count)}


def write_checkpoint(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Path:
    safetensors.torch.save_file(tensors, path, metadata)
    return path


Checkpoint = tuple[Path, dict[str, torch.Tensor]]
MIB = 1 << 20


class Checkpoints:
    """Called with a name, a checkpoint of so many tensors of 1 MiB; written when first asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._made: dict[str, Checkpoint] = {}

    def __call__(self, name: str, count: int = 5, *, prefix: str = "") -> Checkpoint:
        """`prefix` is for names of its own, so that it can be loaded together with others."""
        if name not in self._made:
            made = random_tensors(count, MIB // 4, seed=len(self._made))
            tensors = {prefix + name: tensor for name, tensor in made.items()}
            path = write_checkpoint(self.directory / f"{name}.safetensors", tensors)
            self._made[name] = path, tensors
        return self._made[name]


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
