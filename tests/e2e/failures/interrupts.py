"""A client that is interrupted again and again, as by Ctrl-C, wherever it happens to be."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from penstock.client import StreamerClient
from penstock.client.ring.mapping import leased_bytes

from ..programs import digests, say
from ..support import DEADLINE_SECONDS


class Interruption(BaseException):
    """What the signal handler raises, as the interpreter's own raises KeyboardInterrupt."""


class Alarm:
    """Raises an exception on the main thread, wherever it is in a `with` block of this."""

    def __init__(self) -> None:
        self._armed = False
        signal.signal(signal.SIGALRM, self._ring)

    @contextlib.contextmanager
    def after(self, seconds: float) -> Iterator[None]:
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            self._armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, *_: object) -> None:
        if self._armed:  # the handler may run some time after the signal was sent
            raise Interruption


def be_interrupted(socket_dir: str, source: str, directory: str, calls: int, seed: int) -> None:
    """Makes so many calls of each kind, each with an interruption at a random moment, and says how many came
    through. A call that leaves a lease or a descriptor behind, or hangs, ends the process with an error."""
    faulthandler.enable()
    client = StreamerClient(socket_dir, reconnect_timeout=0)

    def load(**options: Any) -> None:
        with client.load(source, **options) as loading:
            for _ in loading:
                pass

    kinds: dict[str, Callable[[], object]] = {
        "load": load,
        "load through a window": lambda: load(memory_limit="6MiB", owned=False),
        "prefetch": lambda: client.prefetch(source),
        "fetch": lambda: client.fetch(directory),
        "status": client.status,
    }
    usual_seconds = {}
    for kind, call in kinds.items():
        tries = []
        for _ in range(4):  # at first, modules are imported
            began = time.monotonic()
            call()
            tries.append(time.monotonic() - began)
        usual_seconds[kind] = min(tries)
    alarm, moments = Alarm(), random.Random(seed)
    gc.collect()
    gc.freeze()  # or each collection below would look at all of torch
    files = len(os.listdir("/proc/self/fd"))
    through = dict.fromkeys(kinds, 0)
    for _ in range(calls):
        for kind, call in kinds.items():
            faulthandler.dump_traceback_later(DEADLINE_SECONDS / 2, exit=True)
            with contextlib.suppress(Interruption), alarm.after(moments.uniform(1e-5, usual_seconds[kind])):
                call()
                through[kind] += 1
            _await_nothing_left(kind, files)
    faulthandler.cancel_dump_traceback_later()
    say("over", through=through, found=digests(client.load(source)))


def _await_nothing_left(kind: str, files: int) -> None:
    """Threads may still be giving things back."""
    deadline = time.monotonic() + DEADLINE_SECONDS / 4
    while True:
        gc.collect()
        now_open = os.listdir("/proc/self/fd")
        if not leased_bytes() and len(now_open) <= files:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"{kind} left {leased_bytes()} bytes leased, and {now_open} open of {files}")
        time.sleep(0.001)
