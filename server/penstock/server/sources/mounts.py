"""Threads for each mounted file system, so that one that does not answer holds up only itself."""

from __future__ import annotations

import re
import threading

from ..fair import FairExecutor

_ESCAPE = re.compile(r"\\([0-7]{3})")


class MountThreads:
    """`count` threads for each mount that is asked for, which serve users in turn."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._lock = threading.Lock()
        self._executors: dict[str, FairExecutor] = {}
        self._stopped = False

    def of(self, path: str) -> FairExecutor:
        """Raises RuntimeError after `shutdown`, as executors do."""
        mount = mount_point(path)
        with self._lock:
            if self._stopped:
                raise RuntimeError("the threads have been stopped")
            if mount not in self._executors:
                self._executors[mount] = FairExecutor(self._count, f"{self._name}:{mount}")
            return self._executors[mount]

    def shutdown(self) -> None:
        """Begins nothing more. Does not wait: a call may hang in the kernel."""
        with self._lock:
            self._stopped = True
            executors = list(self._executors.values())
        for executor in executors:
            executor.shutdown()


def mount_point(path: str) -> str:
    """Where the file system is mounted that holds `path`, going by names alone: asking the file system might
    hang, and so a symbolic link counts as where it lies. "/" where /proc does not say."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            points = [_ESCAPE.sub(_unescape, line.split(" ", 5)[4]) for line in lines]
    except OSError:
        return "/"
    around = [point for point in points if path == point or path.startswith(point.rstrip("/") + "/")]
    return max(around, key=len, default="/")


def _unescape(match: re.Match[str]) -> str:
    return chr(int(match[1], 8))
