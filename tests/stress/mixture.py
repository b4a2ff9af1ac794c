"""Runs a plan against a real daemon and real client processes, and judges everything that it sees.

steps in order --> the next idle worker of the step's user --> its answer --> model.Situation
meanwhile: kills, stops, and a look at the daemon's memory every 50 ms
at the end: nobody left, nothing left
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from penstock.client.ring.rpc import Session
from penstock.v1 import streamer_pb2 as pb

from ..e2e.support import DaemonProcess, assert_no_shared_memory_but, shared_memory, wait_until
from . import checkpoints, plans
from .fleet import Fleet, WorkerProcess
from .model import File, Limits, Situation, Span
from .plans import Change, Order, Plan, Restart

SAMPLE_SECONDS = 0.05
HANG_SECONDS = 45.0
OWN_BYTES = 200 << 20
"""Most that the daemon may have beyond its slabs."""
SLACK_BYTES = 1 << 20
RECONNECT_SECONDS = 20.0
HELD_MOST = 2
"""Loads whose tensors one worker keeps."""


class Mixture:
    """One plan, run once by `run`. `results` counts how orders ended."""

    def __init__(self, plan: Plan, fleet: Fleet, top: Path, daemons: list[DaemonProcess]) -> None:
        """Whoever calls ends what is in `daemons` whatever happens."""
        self.results: Counter[str] = Counter()
        self.peak_bytes = 0
        self._plan = plan
        self._fleet = fleet
        self._top = top
        self._daemons = daemons
        self._files: dict[str, File] = {}
        self._write_files()
        self._shared_memory = shared_memory()
        self._daemon = self._start_daemon()
        self._session: Session | None = None
        staging = self._daemon.status()["staging"]
        slab_bytes = staging["slab_bytes"]
        limit = -1 if staging["limit_bytes"] is None else staging["limit_bytes"]
        self._limits = Limits(limit, slab_bytes, limit // slab_bytes if limit > 0 else 1 << 20)
        self._situation = Situation(self._limits, memory_may_be_held=plan.holds)
        self._sockets = self._socket_count()
        self._workers = [self._start_worker(uid) for uid in plans.USERS]
        self._held = Counter[int]()
        self._sampled = 0.0

    def run(self) -> None:
        for step in self._plan.steps:
            if isinstance(step, Change):
                self._change(step)
            elif isinstance(step, Restart):
                self._restart(step)
            else:
                self._give(self._idle_worker(step.uid), step)
        self._wait(lambda: all(worker.order is None for worker in self._workers))
        self._finish()

    def end(self) -> None:
        """Whatever happened."""
        if self._session is not None:
            self._session.close()
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                worker.kill()

    # ---- its parts ------------------------------------------------------------------------------

    def _write_files(self) -> None:
        open_dir, closed_dir = self._top / "open", self._top / "closed"
        for directory in (open_dir, open_dir / plans.DIRECTORY, closed_dir):
            directory.mkdir(mode=0o755)
        places = dict.fromkeys(plans.FILES, open_dir)
        places |= dict.fromkeys(plans.IN_DIRECTORY, open_dir / plans.DIRECTORY)
        places[plans.FORBIDDEN] = closed_dir
        for name, directory in places.items():
            file = File(directory / f"{name}.safetensors", allowed=directory != closed_dir)
            file.change(functools.partial(checkpoints.replace, file.path), atomic=True)
            self._files[name] = file

    def _start_daemon(self) -> DaemonProcess:
        flags = (*self._plan.flags, f"--allow={self._top / 'open'}")
        environment = {"PYTHONFAULTHANDLER": "1", "PYTHONASYNCIODEBUG": ""}
        daemon = DaemonProcess(self._top / "s", *flags, environment=environment)
        self._daemons.append(daemon)
        return daemon.wait_ready()

    def _start_worker(self, uid: int) -> WorkerProcess:
        return self._fleet.start(self._top / "s", uid=uid, reconnect_timeout=RECONNECT_SECONDS)

    def _idle_worker(self, uid: int) -> WorkerProcess:
        def idle() -> WorkerProcess | None:
            fit = (worker for worker in self._workers if worker.uid == uid and worker.order is None)
            return next(fit, None)

        while True:
            self._wait(lambda: idle() is not None)
            worker = idle()
            assert worker is not None
            if self._held[worker.pid] < HELD_MOST:
                return worker
            self._give(worker, Order("let_go", {}, uid))

    def _give(self, worker: WorkerProcess, order: Order) -> None:
        worker.order = _Running(order)
        worker.tell(order.operation, self._with_paths(order.arguments))
        wishes = [order.arguments, *order.arguments.get("loads", ())]
        wishes += [order.arguments[part] for part in ("outer", "inner") if part in order.arguments]
        if order.operation == "let_go":
            self._held[worker.pid] = 0
        self._held[worker.pid] += any(wish.get("hold") for wish in wishes)

    def _with_paths(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """As the worker takes them: sources as paths, nothing that only the model wants."""
        found: dict[str, Any] = {}
        for key, value in arguments.items():
            if key in ("loads",):
                found[key] = [self._with_paths(part) for part in value]
            elif key in ("outer", "inner"):
                found[key] = self._with_paths(value)
            elif key == "sources" and value is not None:
                found[key] = [str(self._path(name)) for name in value]
            elif key != "files" or "owned" in arguments:
                found[key] = value
        return found

    def _path(self, name: str) -> Path:
        if name == plans.DIRECTORY:
            return self._top / "open" / name
        return self._files[name].path

    def _change(self, step: Change) -> None:
        file = self._files[step.file]
        if file.broken and step.how in ("touch", "truncate"):
            return
        if step.how == "touch":
            file.touch()
        elif step.how == "truncate":
            file.truncate()
        elif step.how == "replace":
            file.change(functools.partial(checkpoints.replace, file.path), atomic=not file.broken)
        else:
            truncate, pause = step.how == "rewrite", step.pause_seconds
            file.change(
                lambda version: checkpoints.overwrite(
                    file.path, version, truncate=truncate, pause_seconds=pause
                ),
                atomic=False,
            )
        self.results[step.how] += 1

    def _restart(self, step: Restart) -> None:
        span = Span(time.monotonic(), float("inf"))
        self._situation.daemon_gone.append(span)
        if step.kill:
            self._daemon.kill()
        else:
            assert self._daemon.terminate() == 0, self._daemon.log()
        self._daemon.assert_log_clean()
        if self._session is not None:
            self._session.close()
            self._session = None
        self._daemon = self._start_daemon()
        span.ended = time.monotonic()
        self.results["restart"] += 1

    # ---- while it runs --------------------------------------------------------------------------

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds; meanwhile hears answers, kills, stops and samples."""
        while not condition():
            busy = [worker for worker in self._workers if worker.order is not None]
            ready = select.select(busy, [], [], 0.005)[0]
            for worker in busy:
                self._attend(worker, heard=worker in ready)
            if time.monotonic() > self._sampled + SAMPLE_SECONDS:
                self._sample()

    def _attend(self, worker: WorkerProcess, *, heard: bool) -> None:
        running, now = worker.order, time.monotonic()
        order: Order = running.order
        age = now - running.began
        if order.kill_after is not None and age >= order.kill_after:
            worker.kill()
            self._workers[self._workers.index(worker)] = self._start_worker(worker.uid)
            self.results["killed"] += 1
            return
        if order.stop_after is not None and age >= order.stop_after:
            if not running.stopped and age < order.stop_after + order.stop_seconds:
                os.kill(worker.pid, signal.SIGSTOP)
                running.stopped = True
                self.results["stopped"] += 1
            elif running.stopped and age >= order.stop_after + order.stop_seconds:
                os.kill(worker.pid, signal.SIGCONT)
                running.stopped = False
        if heard and not running.stopped:
            answer = worker.hear(0.0)
            if answer is not None and order.kill_after is None:
                worker.order = None
                self._judge(worker, order, answer)
                return
        if age > HANG_SECONDS:
            self._fail(f"{order} hangs", worker)

    def _judge(self, worker: WorkerProcess, order: Order, answer: dict[str, Any]) -> None:
        wishes: list[dict[str, Any]] = [order.arguments]
        answers = [answer]
        if "parts" in answer:
            wishes = order.arguments.get("loads") or [order.arguments["outer"], order.arguments["inner"]]
            answers = answer["parts"]
        for wish, part in zip(wishes, answers, strict=False):  # an outer load that failed had no inner one
            if order.operation in ("let_go", "evict"):
                complaint = part.get("wrong", "")
                if order.operation == "evict" and order.uid and part.get("error") != "AccessDeniedError":
                    complaint = complaint or self._daemon_gone_or(part, "evicted without leave")
                elif order.operation == "evict" and not order.uid and "error" in part:
                    complaint = complaint or self._daemon_gone_or(part, str(part))
            else:
                files = [self._files[name] for name in wish["files"]]
                complaint = self._situation.complaint(wish, part, worker.uid, files)
            if complaint:
                self._fail(f"uid {worker.uid}, {order.operation} {wish}: {complaint}")
            self.results[part.get("error", f"{order.operation} ok")] += 1
            if part.get("hit"):
                self.results["hit"] += 1
            if part.get("waited", 0) > 0.001:
                self.results["waited"] += 1

    def _daemon_gone_or(self, answer: dict[str, Any], complaint: str) -> str:
        gone = any(span.meets(answer["began"], answer["ended"]) for span in self._situation.daemon_gone)
        return "" if gone else complaint

    def _sample(self) -> None:
        """The daemon's memory at this moment."""
        self._sampled = time.monotonic()
        status = self._status()
        staging = status.staging
        used = staging.free_bytes + staging.reading_bytes + staging.leased_bytes + staging.warm_bytes
        shared, own = self._memory()
        self.peak_bytes = max(self.peak_bytes, staging.peak_bytes)
        if self._limits.memory_limit > 0:
            for what, amount in (
                ("staging", used),
                ("peak", staging.peak_bytes),
                ("RssShmem", shared - SLACK_BYTES),
            ):
                if amount > self._limits.memory_limit:
                    self._fail(f"{what} of {amount} bytes is over the limit of {self._limits.memory_limit}")
        elif shared > staging.peak_bytes + SLACK_BYTES:
            self._fail(f"RssShmem of {shared} bytes, but at most {staging.peak_bytes} were in use")
        if own > OWN_BYTES:
            self._fail(f"{own} bytes beyond the slabs")

    def _status(self) -> pb.GetStatusResponse:
        if self._session is None:
            self._session = Session(self._top / "s")
        try:
            answer: pb.GetStatusResponse = self._session.service.GetStatus(
                pb.GetStatusRequest(), metadata=self._session.metadata, timeout=HANG_SECONDS
            )
        except grpc.RpcError as error:
            self._session = None
            self._fail(f"the daemon does not tell its status: {error}")
        return answer

    def _memory(self) -> tuple[int, int]:
        figures = {
            line.split()[0]: int(line.split()[1]) * 1024
            for line in Path(f"/proc/{self._daemon.process.pid}/status").read_text().splitlines()
            if line.startswith("Rss")
        }
        return figures["RssShmem:"], figures["RssAnon:"] + figures["RssFile:"]

    def _socket_count(self) -> int:
        return sum("socket:" in fd for fd in self._daemon.fds())

    # ---- its end --------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Everybody goes, half in peace; then nothing of them is left."""
        for number, worker in enumerate(self._workers):
            if (number + self._plan.seed) % 2:
                worker.kill()
                continue
            worker.tell("let_go", {})
            answer = worker.hear(HANG_SECONDS)
            if answer is None:
                self._fail("letting go of tensors hangs", worker)
            if answer is not None and "wrong" in answer:
                self._fail(answer["wrong"])
            worker.end()
        self._workers = []
        assert not self._fleet.children()
        status = self._daemon.wait_idle()
        assert not any(stage["holders"] for stage in status["stages"]), status
        if self._session is not None:
            self._session.close()
            self._session = None
        wait_until(self._no_stage_is_stuck, "slabs that were being made, and reads, to be given up")
        with self._daemon.client() as client:

            def emptied() -> bool:
                client.evict()  # of what is being read, nothing
                return not self._daemon.status()["stages"]

            wait_until(emptied, "everything to be evicted")
        wait_until(lambda: not self._daemon.status()["readers"]["busy"], "the last reads to end")
        status = self._daemon.status()
        assert status["staging"]["warm_bytes"] == 0, status
        wait_until(self._rests, f"the daemon's descriptors to be what they were; now {self._daemon.fds()}")
        assert_no_shared_memory_but(self._shared_memory)
        assert self._daemon.terminate() == 0, self._daemon.log()
        self._daemon.assert_log_clean()

    def _no_stage_is_stuck(self) -> bool:
        stages = self._daemon.status()["stages"]
        return not any(stage["state"] in ("failed", "waiting") for stage in stages)

    def _rests(self) -> bool:
        """No file, no connection, no slab that the status does not know."""
        slabs = self._daemon.status()["staging"]["free_bytes"] // self._limits.slab_bytes
        fds = self._daemon.fds()
        trimmed = self._limits.memory_limit > 0 or slabs == 0
        return (
            trimmed
            and sum("memfd:" in fd for fd in fds) == slabs
            and not any(str(self._top / "open") in fd or str(self._top / "closed") in fd for fd in fds)
            and self._socket_count() <= self._sockets
        )

    def _fail(self, what: str, worker: WorkerProcess | None = None) -> None:
        """With all that helps to find out why."""
        parts = [what, f"seed {self._plan.seed}: {self._plan.limit}, {' '.join(self._plan.flags)}"]
        if worker is not None:
            parts.append(f"the worker's stacks:\n{worker.stacks()}")
            parts.append(f"the daemon's status:\n{json.dumps(self._daemon.status(), indent=1)}")
            self._daemon.process.send_signal(signal.SIGABRT)  # faulthandler writes its stacks to the log
            self._daemon.process.wait()
        log = self._daemon.log().splitlines()
        parts.append("the daemon's log ends:\n" + "\n".join(log[-60:]))
        raise AssertionError("\n".join(parts))


class _Running:
    """An order that a worker works on."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.began = time.monotonic()
        self.stopped = False
