"""A penstockd to attack: in a known state, in a container of the documented size, watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from penstock.v1 import streamer_pb2 as pb

from ..e2e.containers import MemoryCgroup
from ..e2e.forked import ForkedProcess, fork_daemon_by
from ..e2e.support import (
    DEADLINE_SECONDS,
    MIB,
    Checkpoint,
    DaemonProcess,
    descendants,
    process_figure,
    process_figures,
    same,
    wait_until,
)
from .http2 import Connection

LAUNCH = Path(__file__).with_name("launch.py")
UMASK = 0o022
OPEN_FILES = 8192
"""Descriptors that a daemon may have, so that its own bounds on connections and sessions apply."""
CONTAINER_SPARE_BYTES = 256 * MIB
"""What docs/design.md and the manifests give a container besides the limit and a 256th of it."""
MEMORY_BOUND_BYTES = 200_000_000
"""What the daemon may have besides slabs, always: invariant 2 of docs/design.md."""
SAMPLE_SECONDS = 0.02
MEMORY_SLACK_BYTES = 64 * MIB
"""What a daemon may keep of the memory it had under attack, as allocators keep freed memory for a while."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the kernel says that a daemon has, with its children."""

    anonymous_bytes: int
    """All memory besides slabs and mapped files."""
    own_bytes: int
    """The same of the daemon itself."""
    threads: int
    descriptors: int
    """Of the daemon itself, sockets included."""
    children: int
    cpu_seconds: float
    """Of the daemon itself."""
    sessions: int
    """Handoff connections that it has accepted."""
    connections: int
    """gRPC connections that it has accepted."""


class TargetDaemon(DaemonProcess):
    """penstockd with default signals, a known umask, an environment and TMPDIR of its own, and no inherited
    descriptors. In a control group it is executed: what a parent has touched would not be charged to that."""

    def __init__(
        self,
        top: Path,
        *flags: str,
        memory_limit_bytes: int = 64 * MIB,
        contained: bool = False,
        executed: bool = False,
        uid: int | None = None,
        open_files: int = OPEN_FILES,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """In `top`, a directory with a short path. With `contained`, in a memory control group of the
        documented size; where none can be made, the test is skipped. With `executed` it is not forked from a
        process that has gRPC: that would print what the daemon silences before it imports gRPC."""
        self.memory_limit_bytes = memory_limit_bytes
        self._cgroup: MemoryCgroup | None = None
        self.temporary = temporary = top / "tmp"
        temporary.mkdir(exist_ok=True)
        temporary.chmod(0o1777)
        if contained:
            size_bytes = memory_limit_bytes + memory_limit_bytes // 256 + CONTAINER_SPARE_BYTES
            self._cgroup = MemoryCgroup(f"penstock-attack-{top.name}", size_bytes)
        self._state: dict[str, Any] = {
            "environment": {
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": str(temporary),
                "TMPDIR": str(temporary),
                "LC_ALL": "C.UTF-8",
                "PENSTOCK_HTTP_ADDRESS": "127.0.0.1:0",
                **(environment or {}),
            },
            "umask": UMASK,
            "open_files": min(open_files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
            "uid": uid,
            "cgroup": self._cgroup and str(self._cgroup.directory / "cgroup.procs"),
        }
        super().__init__(
            top / "s",
            "--memory-limit",
            str(memory_limit_bytes),
            *flags,
            wrapper=(sys.executable, "-I", "-S", str(LAUNCH), json.dumps(self._state))
            if contained or executed
            else (),
        )

    def _fork(self, flags: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> ForkedProcess:
        arguments = {"wanted": self._state, "flags": list(flags)}
        return fork_daemon_by("tests.attacks.launch:serve", arguments, self._state["environment"], log)

    # ---- doors

    def connect(self, **options: Any) -> Connection:
        """HTTP/2 to the gRPC socket, by hand."""
        return Connection(self.socket_dir / "penstock.sock", **options)

    def handoff(self) -> RawHandoff:
        return RawHandoff(self.socket_dir)

    def http_socket(self) -> socket.socket:
        """A connection to its HTTP port, for bytes of any kind."""
        host, _, port = self.http_address.rpartition(":")
        return socket.create_connection((host, int(port)), DEADLINE_SECONDS)

    # ---- what it has

    def usage(self) -> Usage:
        pid = self.process.pid
        own_kib, threads = process_figures(pid, "RssAnon", "Threads")
        children = descendants(pid)
        anonymous_kib = own_kib
        for child in children:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, AssertionError):  # it ended
                anonymous_kib += process_figure(child, "RssAnon")
        sessions, connections = accepted(self.socket_dir, "handoff.sock", "penstock.sock")
        return Usage(
            anonymous_bytes=anonymous_kib * 1024,
            own_bytes=own_kib * 1024,
            threads=threads,
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            children=len(children),
            cpu_seconds=cpu_seconds(pid),
            sessions=sessions,
            connections=connections,
        )

    def contained_bytes(self) -> int:
        """The most that its control group ever had, slabs included."""
        assert self._cgroup is not None, "it runs in no control group"
        return self._cgroup.figure("peak")

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watch]:
        """Looks at its usage all the time, for the highest figures."""
        watch = Watch(self)
        watch.start()
        try:
            yield watch
        finally:
            watch.stop()

    # ---- what has to hold after an attack

    def assert_alive(self) -> None:
        code = self.process.poll()
        assert code is None, f"penstockd ended with {code}:\n{self.log()[-5000:]}"

    def assert_serves(self, checkpoint: Checkpoint) -> None:
        """It is alive, and an honest client gets the right bytes."""
        self.assert_alive()
        path, tensors = checkpoint
        with self.client() as client:
            same(client.load_state_dict(path).items(), tensors)

    def assert_comes_back(self, before: Usage, *, memory_slack_bytes: int = MEMORY_SLACK_BYTES) -> None:
        """After a while, without clients: no load, lease, session, connection or child is left, no more
        descriptors than before are open, and memory is near what it was. Threads may stay for later work."""
        allowed = {
            "anonymous_bytes": before.anonymous_bytes + memory_slack_bytes,
            "descriptors": before.descriptors,
            "children": before.children,
            "sessions": before.sessions,
            "connections": before.connections,
        }

        def left() -> list[str]:
            self.assert_alive()
            now = self.usage()
            found = [
                f"{name}: {getattr(now, name)}, allowed {most}"
                for name, most in allowed.items()
                if getattr(now, name) > most
            ]
            status = self.http_status()
            found += [f"{len(status['loads'])} loads"] if status["loads"] else []
            for name in ("leased_bytes", "reading_bytes", "waiting"):
                if status["staging"][name]:
                    found.append(f"staging.{name}: {status['staging'][name]}")
            return found

        try:
            wait_until(lambda: not left(), "all to come back")
        except AssertionError as error:
            raise AssertionError(f"{error}; left: {', '.join(left())}") from None

    def assert_log_clean(self) -> None:
        super().assert_log_clean()
        assert "unexpected" not in self.log(), self.log()

    def end(self) -> None:
        """As its parent's, and nothing that it made is left."""
        super().end()
        assert not list(self.socket_dir.glob("*.sock")), "sockets are left"

    def kill(self) -> None:
        super().kill()
        if self._cgroup is not None:
            self._cgroup.remove()
            self._cgroup = None


class Watch(threading.Thread):
    """The highest of each figure of a daemon's usage, seen from a thread."""

    def __init__(self, daemon: TargetDaemon) -> None:
        super().__init__(daemon=True)
        self._target = daemon
        self._stop_asked = threading.Event()
        self.peak = daemon.usage()

    def run(self) -> None:
        while not self._stop_asked.wait(SAMPLE_SECONDS):
            try:
                now = self._target.usage()
            except (OSError, AssertionError):  # it ended, which is for others to judge
                return
            self.peak = Usage(
                **{
                    field.name: max(getattr(now, field.name), getattr(self.peak, field.name))
                    for field in fields(Usage)
                }
            )

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def assert_bounded(self, memory_bound_bytes: int = MEMORY_BOUND_BYTES) -> None:
        """The daemon never had more memory besides slabs than it may."""
        had = self.peak.own_bytes
        assert had < memory_bound_bytes, (
            f"{had / 1e6:.0f} MB besides slabs, where {memory_bound_bytes / 1e6:.0f} are allowed"
        )


class RawHandoff:
    """One handoff connection, by hand."""

    def __init__(self, socket_dir: Path | str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(DEADLINE_SECONDS)
        try:
            self.socket.connect(f"{socket_dir}/handoff.sock")
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> RawHandoff:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def receive(self) -> pb.HandoffFrame | None:
        """The next frame; None: the daemon closed. Descriptors that came along are closed."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 16, 253)
        except ConnectionError:
            return None
        for descriptor in descriptors:
            os.close(descriptor)
        return pb.HandoffFrame.FromString(data) if data else None

    def token(self) -> str:
        """Of the first frame, which has to be a hello."""
        came = self.receive()
        assert came is not None, "the daemon closed the connection"
        assert came.HasField("hello"), came
        return came.hello.token

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> bool:
        """Whether the daemon still was there to take it."""
        try:
            socket.send_fds(self.socket, [data], descriptors)
        except ConnectionError:
            return False
        return True

    def wait_closed(self) -> None:
        """Until the daemon has closed it."""
        while self.receive() is not None:
            pass


def cpu_seconds(pid: int) -> float:
    """What a process has used, in user and in system mode, of all its threads."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")


def accepted(directory: Path, *names: str) -> list[int]:
    """Connections to listening Unix sockets that their daemon has, as the kernel lists them."""
    table = Path("/proc/net/unix").read_bytes()
    # Of a line: the state, which is 03 for one that is connected, the inode, and the path.
    return [
        len(re.findall(rb" 03 +\d+ " + re.escape(os.fsencode(directory / name)) + rb"$", table, re.MULTILINE))
        for name in names
    ]
