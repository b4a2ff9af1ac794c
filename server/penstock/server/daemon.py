"""The daemon put together: build, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from penstock.v1 import streamer_pb2 as pb
from penstock.v1 import streamer_pb2_grpc

from .admission import Admission, Caller, Emit, Parts, Request
from .catalog import Catalog
from .config import Config, distribution_version
from .endpoints import Endpoints
from .errors import (
    AccessDeniedError,
    ConfigError,
    PenstockError,
    SessionRequiredError,
    ShuttingDownError,
    TooManyLoadsError,
)
from .gate import Gate
from .handoff import HandoffServer, Session
from .health import Health
from .history import INTERVAL_SECONDS, History
from .http import HttpServer
from .limits import is_privileged, raise_open_files, shmem_huge_pages, user_share
from .load import Load
from .log import event
from .metrics import RETRY_REASONS, Exposition, Totals
from .prefetch import DaemonItself, Prefetch
from .reader import ReaderPool
from .service import StreamerService
from .sources import Access
from .sources.file import FileSource
from .sources.s3 import S3Settings, S3Source
from .staging import Staging
from .status import Status, effective

logger = logging.getLogger(__name__)

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["StreamerService"].full_name
LIVENESS_NAME = "live"
"""The service of grpc.health.v1 that says whether the daemon hangs; the others say whether it takes loads."""
RESOLVERS = 8
S3_RESOLVERS = 64
"""More, because each may have to wait for a store that does not answer."""
HEADER_READERS = 16
MAX_CALLS_PER_CONNECTION = 16
S3_HEADER_READERS = 32
PREFETCH_RETRY_SECONDS = 1.0
PREFETCH_RETRY_MAX_SECONDS = 60.0


class Daemon:
    """Everything of one penstockd. Made and used on one event loop."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.version = distribution_version()
        self.totals = Totals()
        self.readers = {
            # Without spares: when all hang in the kernel the daemon is to say that it hangs.
            "file": ReaderPool(config.concurrency_of("file"), spare_threads=0),
            "s3": ReaderPool(config.concurrency_of("s3"), name="s3-reader"),
        }
        # Storage behind a network has threads of its own for everything, so that it can hold up only itself.
        self._header_readers = ThreadPoolExecutor(HEADER_READERS, "header")
        self._s3_header_readers = ThreadPoolExecutor(S3_HEADER_READERS, "s3-header")
        self._resolvers = ThreadPoolExecutor(RESOLVERS, "resolver")
        self._remote_resolvers = ThreadPoolExecutor(S3_RESOLVERS, "s3-resolver")
        self._slab_workers = ThreadPoolExecutor(4, "slab")
        self.staging = Staging(config, readers=self.readers, workers=self._slab_workers, totals=self.totals)
        retries = Counter(dict.fromkeys(RETRY_REASONS, 0))
        self.totals.retries["s3"] = retries.copy
        self.s3 = S3Source(
            S3Settings.of(config), self._s3_header_readers, lambda reason: retries.update([reason])
        )
        self._catalog = Catalog(FileSource(self._header_readers), self.s3)
        self._parts = Parts(self._catalog, self.staging, self.totals, self._resolvers, self._remote_resolvers)
        self._handoff = HandoffServer(
            config.socket_dir / "handoff.sock",
            version=self.version,
            allows=self._allows,
            on_refused=lambda error: self.refused(error, None),
        )
        self._grpc_path = config.socket_dir / "grpc.sock"
        self._gate = Gate(config.socket_dir / "penstock.sock", self._grpc_path, allows=self._allows)
        self._health = health.aio.HealthServicer()
        self._publishing: set[asyncio.Task[None]] = set()
        self._loads: dict[Admission, asyncio.Task[None]] = {}
        self._no_loads = asyncio.Event()
        self._no_loads.set()
        self._stop_asked = asyncio.Event()
        self.history = History()
        self.health = Health(
            [self.readers["file"]],  # requests to S3 have a timeout and end by themselves
            stall_seconds=config.stall_timeout_seconds,
            on_change=self._health_changed,
        )
        self.status = Status(
            config=config,
            version=self.version,
            began=asyncio.get_running_loop().time(),
            staging=self.staging,
            readers=self.readers.values(),
            totals=self.totals,
            loads=self._loads.keys(),
            health=self.health,
            history=self.history,
        )

    # ---- for the service ------------------------------------------------------------------------

    def session(self, token: str | None) -> Session:
        return self._handoff.session(token)

    def new_load(self, request: Request, session: Session) -> Load:
        return Load(request, session, self._admit(session), self._parts)

    def new_prefetch(self, request: Request, session: Session, *, pin: bool) -> Prefetch:
        access = self._admit(session)
        if pin and not access.privileged:
            raise AccessDeniedError(
                f"uid {session.uid} may prefetch but not pin: that is for root and for penstockd's own user"
            )
        return Prefetch(request, session, access, self._parts, pin=pin)

    def evict(self, session: Session, sources: Sequence[str]) -> tuple[int, int]:
        """Bytes (freed, still leased)."""
        if not is_privileged(session.uid):
            raise AccessDeniedError(
                f"uid {session.uid} may not evict: that is for root and for penstockd's own user"
            )
        locations = self._catalog.location
        wanted = tuple(map(locations, sources))
        freed, leased = self.staging.evict(
            lambda staged: not wanted or tuple(map(locations, staged.checkpoint.sources)) == wanted
        )
        event(logger, "evict", {"source": ",".join(sources[:3]), "freed": freed, "leased": leased})
        return freed, leased

    def _allows(self, uid: int) -> bool:
        return is_privileged(uid) or bool(self.config.allow)

    def _admit(self, session: Session) -> Access:
        """What the caller may read. Raises if the daemon takes nothing more."""
        if self.health.draining:
            raise ShuttingDownError("penstockd is stopping and takes no new loads; try again in a moment")
        privileged = is_privileged(session.uid)
        own = sum(load.caller.uid == session.uid for load in self._loads)
        if len(self._loads) >= self.config.max_loads or (
            not privileged and own >= user_share(self.config.max_loads)
        ):
            raise TooManyLoadsError(
                f"{len(self._loads)} loads run or wait already, {own} of them of uid {session.uid}; try "
                "again later, or raise --max-loads"
            )
        return Access(session.uid, privileged, self.config.allow)

    async def run_load(self, load: Load | Prefetch, emit: Emit) -> None:
        """Runs it, counts it, logs it; ends it when the caller's connection closes."""
        task = asyncio.current_task()
        assert task is not None
        self._loads[load] = task
        self._no_loads.clear()
        event(logger, "opened", load.first_line())

        def caller_gone() -> None:
            if not load.finished:
                task.cancel()

        load.caller.on_close(caller_gone)
        outcome = result = "cancelled"
        try:
            await load.run(emit)
            outcome = result = "ok"
        except PenstockError as error:
            outcome, result = error.reason, "failed"
            self.refused(error, load.caller, load.id, load.request.sources)
            raise
        except asyncio.CancelledError:
            # gRPC sends no status for a call that is cancelled here: the client would wait for ever.
            if load.caller.closed and self.health.draining:
                raise ShuttingDownError("penstockd stops, and this load was cut off") from None
            if load.caller.closed:
                raise SessionRequiredError("the load's handoff connection was closed") from None
            raise
        finally:
            del self._loads[load]
            if not self._loads:
                self._no_loads.set()
            load.count(result)
            level = logging.WARNING if result == "failed" else logging.INFO
            event(logger, load.kind, {"result": outcome, **load.log_line()}, level=level)

    def refused(
        self, error: PenstockError, caller: Caller | None, load_id: str = "", sources: Sequence[str] = ()
    ) -> None:
        """Counts an answer that is an error, and remembers it if it is known whose it is."""
        self.totals.rejected[error.reason] += 1
        if caller is not None:
            self.history.failed(
                error, uid=caller.uid, pid=caller.pid, load_id=load_id, sources=tuple(sources)
            )

    def tell_status(self, session: Session) -> pb.GetStatusResponse:
        return self.status.message(None if is_privileged(session.uid) else session.uid)

    # ---- its life -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves until told to stop. Raises ConfigError when it cannot begin."""
        with _locked(self.config), self._http() as address:
            server = await self._serve()
            started = {"version": self.version, "http": address, **effective(self.config)}
            event(logger, "serving", {**started, **_huge_pages()})
            keeping = [asyncio.create_task(self.staging.keep()), asyncio.create_task(self._sample())]
            prefetching = asyncio.create_task(self._prefetch_all())
            try:
                await self._stop_asked.wait()
                prefetching.cancel()
                await self._drain()
            finally:
                for task in (*keeping, prefetching):
                    task.cancel()
                self._handoff.stop()
                await server.stop(None)
                await self._gate.stop()
                self._grpc_path.unlink(missing_ok=True)
                await self.staging.stop()
                for pool in self.readers.values():
                    pool.stop()
                self.s3.stop()
                for executor in (
                    self._resolvers,
                    self._remote_resolvers,
                    self._header_readers,
                    self._s3_header_readers,
                    self._slab_workers,
                ):
                    executor.shutdown(wait=False, cancel_futures=True)
                self.health.stop()
                event(logger, "stopped", self.totals.summary())

    @contextlib.contextmanager
    def _http(self) -> Iterator[str]:
        """Serves HTTP from before the first load until after the last. Tells where."""
        if self.config.http_address is None:
            yield "none"
            return
        server = HttpServer(self.config.http_address)
        try:
            exposition = Exposition(self.totals, self.version)
            server.start(Endpoints(status=self.status, exposition=exposition, health=self.health).respond)
            yield str(server.address)
        finally:
            server.stop()

    def ask_to_stop(self) -> None:
        """Drains first; asked again, stops at once."""
        if self._stop_asked.is_set():
            self._no_loads.set()
        self._stop_asked.set()

    async def _serve(self) -> grpc.aio.Server:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.ask_to_stop)
        if self.config.exit_with_stdin:
            loop.add_reader(sys.stdin.fileno(), self._stdin_readable)
        self._grpc_path.unlink(missing_ok=True)
        server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", 64 << 20),
                ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
            )
        )
        streamer_pb2_grpc.add_StreamerServiceServicer_to_server(StreamerService(self), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        umask = os.umask(0o177)  # the way in is the gate
        try:
            server.add_insecure_port(f"unix:{self._grpc_path}")
        finally:
            os.umask(umask)
        await server.start()
        await self._gate.start()
        self._handoff.start()
        self.health.waits_for = ""
        if self.config.ready_after_prefetch:
            self.health.waits_for = "what --prefetch names is not staged yet"
        await self._publish_health()
        self.health.start()
        return server

    async def _prefetch_all(self) -> None:
        """Stages what the flags name, each pinned, retrying for as long as it takes."""
        await asyncio.gather(*(self._prefetch(source) for source in self.config.prefetch))
        if not self.health.draining:
            self.health.waits_for = ""
            await self._publish_health()

    async def _prefetch(self, source: str) -> None:
        caller = DaemonItself(os.geteuid(), os.getpid())
        access = Access(caller.uid, privileged=True, prefixes=())
        delay = PREFETCH_RETRY_SECONDS
        while True:
            prefetch = Prefetch(Request((source,)), caller, access, self._parts, pin=True)
            try:
                await self.run_load(prefetch, _ignore)
                return
            except PenstockError as error:
                event(
                    logger,
                    "prefetch failed",
                    {"source": source, "error": error.message, "retry_seconds": round(delay, 1)},
                    level=logging.WARNING,
                )
            await asyncio.sleep(delay * random.uniform(0.5, 1))
            delay = min(2 * delay, PREFETCH_RETRY_MAX_SECONDS)

    async def _drain(self) -> None:
        self.health.draining = True
        self.health.waits_for = "penstockd drains and will stop"
        await self._publish_health()
        event(logger, "draining", {"loads": len(self._loads), "grace_seconds": self.config.grace_seconds})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._no_loads.wait(), self.config.grace_seconds)
        if self._loads:
            event(logger, "loads cut off", {"loads": len(self._loads)}, level=logging.WARNING)

    async def _sample(self) -> None:
        """Remembers what the last minutes were like, for as long as the daemon runs."""
        while True:
            read_bytes = sum(pool.read_bytes for pool in self.readers.values())
            self.history.sample(read_bytes, self.totals.delivered_bytes, self._loads.keys())
            await asyncio.sleep(INTERVAL_SECONDS)

    def _health_changed(self) -> None:
        task = asyncio.create_task(self._publish_health())
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _publish_health(self) -> None:
        answer = health_pb2.HealthCheckResponse
        ready, live = self.health.ready, self.health.live
        for name, good in (("", ready), (SERVICE_NAME, ready), (LIVENESS_NAME, live)):
            await self._health.set(name, answer.SERVING if good else answer.NOT_SERVING)

    def _stdin_readable(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self.ask_to_stop()


async def _ignore(_: object) -> None:
    """Progress that nobody watches."""


def _huge_pages() -> dict[str, str]:
    setting = shmem_huge_pages()
    if setting in ("always", "within_size", "advise", "force"):
        return {"huge_pages": setting}
    return {
        "huge_pages": f"no ({setting})",
        "hint": "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled makes clients faster",
    }


@contextlib.contextmanager
def _locked(config: Config) -> Iterator[None]:
    """One daemon a directory: gRPC would silently take a live socket's place."""
    try:
        config.socket_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(config.socket_dir / "penstockd.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"--socket-dir: {config.socket_dir} cannot be used: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--socket-dir: another penstockd serves {config.socket_dir}; stop it, or choose another"
            ) from None
        yield
        if config.exit_with_stdin:  # a private directory, whose owner may be gone without cleaning up
            with contextlib.suppress(OSError):
                (config.socket_dir / "penstockd.lock").unlink()
                config.socket_dir.rmdir()
    finally:
        os.close(fd)


async def serve(config: Config) -> None:
    """Runs one daemon to its end."""
    raise_open_files()
    await Daemon(config).run()
