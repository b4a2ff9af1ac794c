"""The daemon put together: build, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import logging
import os
import random
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from penstock.v1 import streamer_pb2 as pb
from penstock.v1 import streamer_pb2_grpc

from .admission import Admission, Emit, Parts, Request
from .catalog import Catalog, local_path
from .config import Config, distribution_version
from .errors import (
    AccessDeniedError,
    ConfigError,
    PenstockError,
    SessionRequiredError,
    ShuttingDownError,
    TooManyLoadsError,
)
from .handoff import HandoffServer, Session
from .limits import is_privileged, raise_open_files, shmem_huge_pages, user_share
from .load import Load
from .log import event
from .metrics import Totals
from .prefetch import DaemonItself, Prefetch
from .reader import ReaderPool
from .service import StreamerService
from .sources import Access
from .staging import Staging
from .status import build_status

logger = logging.getLogger(__name__)

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["StreamerService"].full_name
RESOLVERS = 8
HEADER_READERS = 16
PREFETCH_RETRY_SECONDS = 1.0
PREFETCH_RETRY_MAX_SECONDS = 60.0


class Daemon:
    """Everything of one penstockd. Made and used on one event loop."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.version = distribution_version()
        self.totals = Totals()
        self.readers = ReaderPool(config.concurrency)
        self._header_readers = ThreadPoolExecutor(HEADER_READERS, "header")
        self._resolvers = ThreadPoolExecutor(RESOLVERS, "resolver")
        self._slab_workers = ThreadPoolExecutor(4, "slab")
        self.staging = Staging(config, readers=self.readers, workers=self._slab_workers, totals=self.totals)
        self._parts = Parts(Catalog(self._header_readers), self.staging, self.totals, self._resolvers)
        self._handoff = HandoffServer(
            config.socket_dir / "handoff.sock",
            version=self.version,
            allows=lambda uid: is_privileged(uid) or bool(config.allow),
        )
        self._health = health.aio.HealthServicer()
        self._loads: dict[Admission, asyncio.Task[None]] = {}
        self._no_loads = asyncio.Event()
        self._no_loads.set()
        self._draining = False
        self._stop_asked = asyncio.Event()
        self._began = asyncio.get_running_loop().time()

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
        wanted = tuple(local_path(source) for source in sources)
        freed, leased = self.staging.evict(
            lambda staged: not wanted or tuple(map(local_path, staged.checkpoint.sources)) == wanted
        )
        event(logger, "evict", {"source": ",".join(sources[:3]), "freed": freed, "leased": leased})
        return freed, leased

    def _admit(self, session: Session) -> Access:
        """What the caller may read. Raises if the daemon takes nothing more."""
        if self._draining:
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

        def caller_gone() -> None:
            if not load.finished:
                task.cancel()

        load.caller.on_close(caller_gone)
        result = "cancelled"
        try:
            await load.run(emit)
            result = "ok"
        except PenstockError as error:
            result = error.reason
            raise
        except asyncio.CancelledError:
            # gRPC sends no status for a call that is cancelled here: the client would wait for ever.
            if load.caller.closed and self._draining:
                raise ShuttingDownError("penstockd stops, and this load was cut off") from None
            if load.caller.closed:
                raise SessionRequiredError("the load's handoff connection was closed") from None
            raise
        finally:
            del self._loads[load]
            if not self._loads:
                self._no_loads.set()
            if result == "ok":
                self.totals.loads_ok += 1
            else:
                self.totals.loads_failed += 1
            level = logging.INFO if result in ("ok", "cancelled") else logging.WARNING
            event(logger, type(load).__name__.lower(), {"result": result, **load.log_line()}, level=level)

    def status(self, session: Session) -> pb.GetStatusResponse:
        return build_status(
            config=self.config,
            version=self.version,
            now=asyncio.get_running_loop().time(),
            began=self._began,
            serving=not self._draining,
            staging=self.staging,
            readers=self.readers,
            totals=self.totals,
            loads=self._loads,
            only_uid=None if is_privileged(session.uid) else session.uid,
        )

    # ---- its life -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves until told to stop. Raises ConfigError when it cannot begin."""
        with _locked(self.config):
            server = await self._serve()
            keeper = asyncio.create_task(self.staging.keep())
            prefetching = asyncio.create_task(self._prefetch_all())
            try:
                await self._stop_asked.wait()
                prefetching.cancel()
                await self._drain()
            finally:
                keeper.cancel()
                prefetching.cancel()
                self._handoff.stop()
                await server.stop(None)
                await self.staging.stop()
                self.readers.stop()
                for executor in (self._resolvers, self._header_readers, self._slab_workers):
                    executor.shutdown(wait=False, cancel_futures=True)
                event(logger, "stopped", dataclasses.asdict(self.totals))

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
        path = self.config.socket_dir / "penstock.sock"
        path.unlink(missing_ok=True)
        server = grpc.aio.server(options=(("grpc.max_receive_message_length", 64 << 20),))
        streamer_pb2_grpc.add_StreamerServiceServicer_to_server(StreamerService(self), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        path.chmod(stat.S_IRUSR | stat.S_IWUSR | 0o066)  # the session token decides, not the mode
        self._handoff.start()
        if self.config.ready_after_prefetch:
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        else:
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        event(logger, "serving", {"version": self.version, **_effective(self.config), **_huge_pages()})
        return server

    async def _prefetch_all(self) -> None:
        """Stages what the flags name, each pinned, retrying for as long as it takes."""
        await asyncio.gather(*(self._prefetch(source) for source in self.config.prefetch))
        if self.config.ready_after_prefetch and not self._draining:
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)

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
        self._draining = True
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        event(logger, "draining", {"loads": len(self._loads), "grace_seconds": self.config.grace_seconds})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._no_loads.wait(), self.config.grace_seconds)
        if self._loads:
            event(logger, "loads cut off", {"loads": len(self._loads)}, level=logging.WARNING)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    def _stdin_readable(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self.ask_to_stop()


def _effective(config: Config) -> dict[str, object]:
    """Every value that the daemon runs with."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {**values, "allow": ",".join(config.allow), "prefetch": ",".join(config.prefetch)}


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
