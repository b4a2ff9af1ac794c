"""Which mount a path is of, against the kernel's own word, and that a mount which hangs holds up no other."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from penstock.server.sources.mounts import MountThreads, mount_point


@pytest.mark.parametrize("path", ["/", "/dev/shm", "/dev/shm/a/b", "/proc/self/status", "/not/there"])
def test_a_path_is_of_the_innermost_mount_that_holds_it(path: str) -> None:
    point = mount_point(path)
    assert os.path.ismount(point)
    assert Path(path).is_relative_to(point)
    inner = Path(path)
    while str(inner) != point:
        assert not os.path.ismount(inner)
        inner = inner.parent


def test_what_only_begins_like_a_mount_is_not_of_it() -> None:
    assert mount_point("/proc") == "/proc"
    assert mount_point("/processes/a") == "/"


def test_calls_that_hang_on_one_mount_hold_up_no_other() -> None:
    threads, hung = MountThreads(2, "test"), threading.Event()
    try:
        waiting = [threads.of("/proc/a").submit(0, hung.wait, 60) for _ in range(3)]
        assert threads.of("/dev/shm/b").submit(0, lambda: "done").result(timeout=60) == "done"
        assert threads.of("/proc/other") is threads.of("/proc/a")
        assert not any(one.done() for one in waiting)
    finally:
        hung.set()
        threads.shutdown()
    with pytest.raises(RuntimeError, match="stopped"):
        threads.of("/proc/a")
