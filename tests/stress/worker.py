"""Client processes of the stress tests: each does what it is told, a line of JSON at a time, and says what
it saw. What it saw it judges itself, bit for bit, by `checkpoints.py`.

Runs in a process that `nursery.py` forks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from penstock.client import StreamerClient, errors
from penstock.client.load import Load

if TYPE_CHECKING:
    from . import checkpoints
else:
    checkpoints = importlib.import_module("checkpoints")  # beside this file, which is in no package here

DTYPES = {"U8": torch.uint8, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}


class Wrong(Exception):
    """What a correct daemon and client never let happen."""


class Seen:
    """The tensors of one load, judged one by one and together."""

    def __init__(self, files: Sequence[str], selection: str | None) -> None:
        self._files = files
        self._selection = selection
        self._names: list[str] = []
        self._undecided: list[tuple[str, int, bytes]] = []
        self.versions: dict[str, int] = {}
        self.held: list[tuple[str, torch.Tensor]] = []

    @property
    def count(self) -> int:
        return len(self._names)

    def add(self, name: str, tensor: torch.Tensor, *, hold: bool, scribble: bool) -> None:
        self._names.append(name)
        self._judge(name, tensor)
        if scribble and tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(0xA5)  # nobody else may see this
        elif hold:
            self.held.append((name, tensor))

    def judge_held(self) -> None:
        """Once more, long after the load: an owned tensor stays right for as long as it is held."""
        for name, tensor in self.held:
            self._judge(name, tensor)

    def finish(self, *, whole: bool) -> None:
        expected = [
            spec.name
            for file in self._files
            for spec in checkpoints.layout(file, self.versions.get(file, 1))
            if checkpoints.wanted(spec, self._selection)
        ]
        if self._names != (expected if whole else expected[: self.count]):
            raise Wrong(f"tensors {self._names[:4]}... ({self.count}) of {expected[:4]}... ({len(expected)})")
        for name, number, data in self._undecided:
            file = name.split("/")[0]
            if file in self.versions:
                expect = checkpoints.content(file, self.versions[file], number, len(data)).tobytes()
                if data != expect:
                    raise Wrong(f"{name}: {data!r} instead of {expect!r}")

    def _judge(self, name: str, tensor: torch.Tensor) -> None:
        file, _, digits = name.partition("/")
        number = int(digits)
        data = np.zeros(0, np.uint8)
        if tensor.numel():
            data = tensor.view(-1).view(torch.uint8).numpy()
        if len(data) >= 8:
            try:
                version = checkpoints.claimed_version(file, number, data)
            except ValueError as error:
                raise Wrong(f"{name}: {error}") from None
            if self.versions.setdefault(file, version) != version:
                raise Wrong(f"{name} is of version {version}, others are of {self.versions[file]}")
            expect = checkpoints.content(file, version, number, len(data))
            if not np.array_equal(data, expect):
                at = int(np.flatnonzero(data != expect)[0])
                raise Wrong(f"{name} of version {version} is wrong from byte {at} of {len(data)} on")
        elif len(data):
            self._undecided.append((name, number, data.tobytes()))
        spec = checkpoints.layout(file, self.versions.get(file, 1))[number]
        if file in self.versions and (
            (tuple(tensor.shape), tensor.dtype, len(data))
            != (spec.shape, DTYPES[spec.dtype], spec.size_bytes)
        ):
            raise Wrong(f"{name} is {tensor.dtype} {tuple(tensor.shape)} instead of {spec}")


class Worker:
    """What one process can do; every method is an operation, named in the line that asks for it."""

    def __init__(self, socket_dir: str, reconnect_timeout: float) -> None:
        self._client = StreamerClient(socket_dir, reconnect_timeout=reconnect_timeout)
        self._held: list[Seen] = []

    def load(self, **wish: Any) -> dict[str, Any]:
        return self._one(wish)

    def together(self, *, loads: list[dict[str, Any]]) -> dict[str, Any]:
        """Several loads at the same time, each in a thread."""
        answers: list[dict[str, Any]] = [{} for _ in loads]

        def run(index: int) -> None:
            answers[index] = self._one(loads[index])

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(loads))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"parts": answers}

    def nested(self, *, outer: dict[str, Any], inner: dict[str, Any]) -> dict[str, Any]:
        """A whole load between two tensors of another."""
        inside: list[dict[str, Any]] = []
        outside = self._one(outer, lambda: inside.append(self._one(inner)))
        return {"parts": [outside, *inside]}

    def prefetch(self, *, sources: list[str], pin: bool) -> dict[str, Any]:
        return _told(lambda: {"bytes": self._client.prefetch(sources, pin=pin).total_bytes})

    def evict(self, *, sources: list[str] | None) -> dict[str, Any]:
        return _told(lambda: {"freed_bytes": self._client.evict(sources).freed_bytes})

    def let_go(self) -> dict[str, Any]:
        """Of all tensors held; then nothing of the daemon's may be left in this process."""
        try:
            while self._held:
                self._held.pop().judge_held()
        except Wrong as error:
            return {"wrong": f"held tensor {error}"}
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("memfd:penstock")
        fds = _fds()
        slabs = sum("memfd:penstock" in fd for fd in fds)
        if maps or slabs:
            return {"wrong": f"{maps} mappings and {slabs} descriptors of slabs after the last tensor died"}
        return {"fds": len(fds), "threads": threading.active_count()}

    def _one(self, wish: dict[str, Any], between: Any = None) -> dict[str, Any]:
        """Opens, iterates and leaves one load as wished; `between` runs when it is asked to pause."""
        seen = Seen(wish["files"], wish["selection"])
        stopped = False

        def run() -> dict[str, Any]:
            nonlocal stopped
            tensors = wish["names"]
            if tensors is None and wish["selection"] is not None:
                tensors = lambda name: checkpoints.wanted(  # noqa: E731
                    checkpoints.Spec(name, "", (), 0, 0), wish["selection"]
                )
            load = self._client.load(
                wish["sources"],
                tensors=tensors,
                memory_limit=wish["memory_limit"],
                owned=wish["owned"],
                group=tuple(wish["group"]) if wish["group"] else None,
            )
            with _leaving(wish["leave"], load):
                for name, tensor in _iterated(load, wish["leave"]):
                    seen.add(name, tensor, hold=wish["hold"], scribble=wish["scribble"])
                    del tensor
                    if seen.count == wish["pause_after"]:
                        time.sleep(wish["pause_seconds"])
                        if between is not None:
                            between()
                    if seen.count == wish["leave_after"]:
                        stopped = True
                        if wish["leave"] == "raise":
                            raise ZeroDivisionError
                        if wish["leave"] == "close":
                            load.close()
                        else:
                            break
            return {"waited": load.stats.waited_seconds, "hit": load.stats.cache_hit}

        try:
            answer = _told(run)
            stopped = stopped or "error" in answer
            answer["versions"], answer["count"] = seen.versions, seen.count
            seen.finish(whole=not stopped)
        except Wrong as error:
            answer = {"wrong": str(error)}
        if seen.held:
            self._held.append(seen)
        return answer


@contextlib.contextmanager
def _leaving(how: str, load: Load) -> Iterator[None]:
    """How the caller leaves the load: by its `with` block, or by letting go of it."""
    if how == "drop":
        yield
        return
    with contextlib.suppress(ZeroDivisionError), load:
        yield


def _iterated(load: Load, how: str) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        yield from load
    except errors.LoadClosedError:
        if how != "close":
            raise


def _told(call: Any) -> dict[str, Any]:
    """Its result, or the error that the daemon or the client gave a name to."""
    began = time.monotonic()
    try:
        answer: dict[str, Any] = call()
    except errors.PenstockError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    return {**answer, "began": began, "ended": time.monotonic()}


def _fds() -> list[str]:
    """What the open descriptors are of."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread closed it, or it was that of the list
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def work(socket_dir: str, reconnect_timeout: float) -> None:
    """Until standard input ends."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    worker = Worker(socket_dir, reconnect_timeout)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(worker, order["do"])(**order["with"])
        except BaseException:
            answer = {"wrong": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
