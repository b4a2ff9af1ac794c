"""Delays a Python process at the places where threads, tasks and processes hand over.

`__main__.py` puts this into a virtual environment, where every interpreter imports it before anything else.
Mostly there is no delay, sometimes one of 1 to 20 ms, seldom one of 0.3 to 1.5 s. Each process draws from
JITTER and its pid at which places it is often late, and at which never: two processes, and two runs, are
late at different ones. All delays of a process together have at most 3 s, and a quarter of its age.

JITTER_LOG, a path: a line for each long delay, with the time of day, the process, the place and its callers.
"""

from __future__ import annotations

import asyncio.base_events
import asyncio.events
import concurrent.futures
import contextlib
import logging
import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
from typing import Any

FREE_SECONDS = 3.0
SHARE = 0.25
LONG = 0.15
"""Of the delays, those that are long ones."""
PLACES = {
    "thread": 0.12,
    "future": 0.06,
    "log": 0.06,
    "file": 0.12,
    "wake": 0.03,
    "wait": 0.02,
    "sleep": 0.02,
    "socket": 0.01,
    "loop": 0.003,
}
"""How likely a delay is, before a process draws its factor."""
_VARIABLES = {name: value for name, value in os.environ.items() if name.startswith("JITTER")}
"""As they were at the start: processes that fork others give these an environment of their own."""
_sleep = time.sleep


class _Process:
    """What this process drew; drawn anew after a fork."""

    def __init__(self) -> None:
        self._random = random.Random(f"{_VARIABLES['JITTER']}/{os.getpid()}")
        self._chances = {
            place: chance * self._random.choice((0, 1, 1, 5)) for place, chance in PLACES.items()
        }
        self._began = time.monotonic()
        self._spent_seconds = 0.0
        sys.setswitchinterval(10 ** self._random.uniform(-4, -1.3))

    def pause(self, place: str) -> None:
        if self._random.random() >= self._chances[place]:
            return
        is_long = self._random.random() < LONG
        seconds = self._random.uniform(0.3, 1.5) if is_long else self._random.uniform(0.001, 0.02)
        if self._spent_seconds + seconds > FREE_SECONDS + SHARE * (time.monotonic() - self._began):
            return
        self._spent_seconds += seconds
        if is_long and "JITTER_LOG" in _VARIABLES:
            _record(f"{place} {seconds:.2f} s")
        _sleep(seconds)


def _record(what: str) -> None:
    frame = sys._getframe(2)
    callers: list[str] = []
    while frame.f_back is not None and len(callers) < 4:
        frame = frame.f_back
        name = frame.f_code.co_filename.rpartition("/")[2]
        callers.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
    moment = f"{time.strftime('%H:%M:%S', time.gmtime())}.{time.time_ns() // 10**6 % 1000:03d}"
    # Opened each time, as tests count descriptors; and processes of other users may not be able to.
    with contextlib.suppress(OSError), open(_VARIABLES["JITTER_LOG"], "a") as log:
        log.write(f"{moment} {os.getpid()} {what} in {' < '.join(callers)}\n")


def _delay(owner: Any, names: str, place: str, *, after: bool = False) -> None:
    """From now on these functions pause before what they do, or after it."""

    def delayed(original: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            if not after:
                _process.pause(place)
            result = original(*arguments, **named)
            if after:
                _process.pause(place)
            return result

        return run

    for name in names.split():
        original = getattr(owner, name)
        setattr(owner, name, delayed(original))
        for known in (os.supports_dir_fd, os.supports_follow_symlinks):  # libraries look there
            if owner is os and original in known:
                known.add(getattr(owner, name))


class _SimpleQueue(queue.SimpleQueue):  # type: ignore[type-arg]
    """One whose methods can be replaced."""


def _start_late(thread: threading.Thread) -> None:
    run = thread.run

    def run_late() -> None:
        del thread.run  # or it would keep itself
        _process.pause("thread")
        run()

    thread.run = run_late  # type: ignore[method-assign]
    _start(thread)


def _create_with_variables(process: Any, *arguments: Any, **named: Any) -> None:
    if named.get("env") is not None:  # else it has them
        named["env"] = {**named["env"], **_VARIABLES}
    _create(process, *arguments, **named)


def _draw() -> None:
    global _process
    _process = _Process()


_process = _Process()
_start: Any = threading.Thread.start
_create: Any = subprocess.Popen.__init__
threading.Thread.start = _start_late  # type: ignore[assignment, method-assign]
subprocess.Popen.__init__ = _create_with_variables  # type: ignore[assignment, method-assign]
queue.SimpleQueue = _SimpleQueue  # type: ignore[misc]
os.register_at_fork(after_in_child=_draw)
_delay(_SimpleQueue, "get", "wait", after=True)
_delay(threading.Condition, "wait", "wait", after=True)  # events and queues wait by it
_delay(time, "sleep", "sleep", after=True)
_delay(concurrent.futures.Future, "set_running_or_notify_cancel set_result set_exception", "future")
_delay(asyncio.base_events.BaseEventLoop, "call_soon_threadsafe", "wake")
_delay(asyncio.events.Handle, "_run", "loop")
_delay(logging.Handler, "handle", "log")
_delay(socket.socket, "send sendall sendmsg accept connect close", "socket")
_delay(socket.socket, "recv recv_into recvmsg", "socket", after=True)
_delay(os, "unlink remove replace rename link rmdir", "file")
