"""The daemon put together: build, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator

from penstock.v1 import streamer_pb2 as pb

from .checkpoint.catalog import Catalog
from .config.settings import Config
from .edge.gate import MAX_CONNECTIONS
from .edge.handoff import MAX_SESSIONS, HandoffServer, Session
from .edge.rpc import RpcServer
from .edge.service import StreamerService
from .errors import CheckpointCorruptError
from .loads import at_start
from .loads.control import Control
from .loads.fetch import BUFFER_BYTES, FetchContext
from .loads.request import LoadContext
from .loads.warm.warm_set import WarmSet
from .sources import Source
from .sources.kept import Remote
from .sources.resolvers import Resolvers
from .sources.store import Reading
from .sources.stores import FLAGS, STORES
from .staging import unmounted
from .staging.buffer import StagingBuffer
from .staging.reading.reader import ReaderPool
from .system import stdin
from .system.counts import Totals
from .system.fair import FairExecutor
from .system.limits import file_descriptors, huge_pages_fields, is_privileged, raise_open_files
from .system.lock import locked
from .system.log import event
from .system.quota import Quota
from .system.version import distribution_version
from .tier.files import TierFiles
from .tier.opening import open_in_time
from .tier.replies import DiskReplies
from .tier.source import TieredSource
from .tier.tier import Tier
from .watch.endpoints import Endpoints
from .watch.exposition import Exposition
from .watch.health import Health
from .watch.history import INTERVAL_SECONDS, History
from .watch.http import HttpServer
from .watch.status import Status, effective

logger = logging.getLogger(__name__)

CPU_THREADS = 4
SLAB_WORKERS = 4


class Daemon:
    """Everything of one penstockd. Made and used on one event loop."""

    def __init__(self, config: Config, tier: Tier | None = None) -> None:
        """Stops the tier in the end."""
        self.config = config
        self.version = distribution_version()
        self.stores = {store.kind: store(config) for store in STORES}
        self.totals = Totals(list(self.stores))
        self.totals.retries.update({kind: store.retries for kind, store in self.stores.items()})
        self.readers = {kind: _readers(store.reading) for kind, store in self.stores.items()}
        self._cpu_pool = FairExecutor(CPU_THREADS, "cpu")
        self._selector = FairExecutor(1, "selector")
        self._resolvers = Resolvers(self.stores)
        self._slab_workers = FairExecutor(SLAB_WORKERS, "slab")
        self._hashers = FairExecutor(max(2, len(os.sched_getaffinity(0))), "hasher")
        self.staging = StagingBuffer(
            config,
            readers=self.readers,
            workers=self._slab_workers,
            hashers=self._hashers,
            totals=self.totals,
            writers=tier,
            on_corrupt=self._forget,
        )
        self._tier = tier
        if tier is not None:
            self.totals.tier = tier.counts
        self._tier_files = TierFiles(config.tier_files)
        self._sources = [_tiered(store.source, tier, self._tier_files) for store in self.stores.values()]
        descriptors = Quota(
            file_descriptors(slabs=config.max_slabs, sessions=MAX_SESSIONS, connections=MAX_CONNECTIONS)
        )
        for store in self.stores.values():
            store.charge_to(descriptors)
        stale_seconds = config.tier_stale_seconds
        self._catalog = Catalog(
            self._sources,
            replies=DiskReplies(tier, stale_seconds) if tier is not None and stale_seconds else None,
            descriptors=descriptors,
        )
        self._context = LoadContext(
            catalog=self._catalog,
            staging=self.staging,
            totals=self.totals,
            resolvers=self._resolvers.of,
            cpu_pool=self._cpu_pool,
            selector=self._selector,
            verify=config.verify,
            on_corrupt=self._forget,
        )
        self.history = History()
        fetching = FetchContext(
            self._sources,
            self._resolvers.of,
            self.totals,
            self._catalog.keep.budget,
            self._catalog.descriptors,
            Quota(BUFFER_BYTES),
            self._selector,
        )
        self._control = Control(
            self._context,
            fetching,
            max_loads=config.max_loads,
            prefixes=config.allow,
            on_failed=self.history.failed,
        )
        self._warm_set = self._make_warm_set()
        self._handoff = HandoffServer(
            config.socket_dir / "handoff.sock",
            version=self.version,
            allows=self._control.allows,
            on_refused=lambda error: self._control.refused(error, None),
        )
        self._stop_asked = asyncio.Event()
        self._broken = False
        self.health = Health(
            [self.readers[kind] for kind, store in self.stores.items() if store.reading.may_hang],
            lambda: [asked for store in self.stores.values() for asked in store.asked_since()],
            stall_seconds=config.stall_timeout_seconds,
            on_change=lambda: self._rpc.health_changed(),
        )
        self._rpc = RpcServer(
            config.socket_dir,
            health=self.health,
            allows=self._control.allows,
            on_closed=self.totals.closed_connection,
        )
        self.status = Status(
            config=config,
            version=self.version,
            began=asyncio.get_running_loop().time(),
            staging=self.staging,
            readers=self.readers.values(),
            tier=tier,
            totals=self.totals,
            loads=self._control.running,
            health=self.health,
            history=self.history,
            warm_set=self._warm_set,
        )

    def _make_warm_set(self) -> WarmSet | None:
        config = self.config
        if config.warm_set is None:
            return None
        return WarmSet(
            config.warm_set,
            self._context,
            self._control.run,
            stores=[flags.locators for flags in FLAGS],
            interval_seconds=config.warm_set_interval_seconds,
            features=config.node_features,
            name_tier_files=self._tier_files.name if self._tier is not None else None,
        )

    def _tell_status(self, session: Session) -> pb.GetStatusResponse:
        return self.status.message(None if is_privileged(session.uid) else session.uid)

    def _forget(self, error: CheckpointCorruptError) -> None:
        """Bytes of a file arrived damaged: what is kept of it may be damaged too."""
        self._catalog.forget(error.version)
        if self._tier is not None:
            # A digest that a user gave may be wrong: it costs others nothing that they have pinned.
            self._tier.drop(error.uri, error.kept_version, although_pinned=not error.given)

    # ---- its life -------------------------------------------------------------------------------

    async def run(self) -> bool:
        """Serves until told to stop; False: until it could not go on, which the log explains. Raises
        ConfigError when it cannot begin."""
        if self.config.exit_with_stdin:
            stdin.watch(self.ask_to_stop)  # before anything is made
        # A daemon that ends with its standard input has a directory for itself.
        lock = locked(self.config.socket_dir, private=self.config.exit_with_stdin)
        with lock, self._http() as address:
            await self._serve()
            started = {"version": self.version, "http": address, **effective(self.config)}
            warm = {"warm_for": self.config.warm_for}
            event(logger, "serving", {**started, **warm, **huge_pages_fields()})
            keeping = [
                asyncio.create_task(self.staging.keep()),
                asyncio.create_task(self._sample()),
                asyncio.create_task(self._watch_rpc()),
            ]
            unwatch = unmounted.watch(self.stores.values(), self.staging)
            staging = [asyncio.create_task(self._prefetch_all())]
            if self._warm_set is not None:
                staging.append(asyncio.create_task(self._warm_set.run()))
            try:
                await self._stop_asked.wait()
                for task in staging:
                    task.cancel()
                await self._drain()
            finally:
                unwatch()
                for task in (*keeping, *staging):
                    task.cancel()
                await self._stop()
        return not self._broken

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
            self._control.stop_waiting()
        self._stop_asked.set()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.ask_to_stop)
        await self._rpc.start(StreamerService(self._control, self._handoff.session, self._tell_status))
        self._handoff.start()
        self.health.waits_for = ""
        if self.config.ready_after_prefetch:
            self.health.waits_for = "what --prefetch names is not staged yet"
        self._rpc.health_changed()
        self.health.start()

    async def _prefetch_all(self) -> None:
        """Stages what the flags name; then nothing keeps the daemon from being ready."""
        await at_start.stage_all(self.config.prefetch, self._context, self._control.run)
        if not self.health.draining:
            self.health.waits_for = ""
            self._rpc.health_changed()

    async def _drain(self) -> None:
        self._control.draining = self.health.draining = True
        self.health.waits_for = "penstockd drains and will stop"
        self._rpc.health_changed()
        event(
            logger,
            "draining",
            {"loads": len(self._control.running), "grace_seconds": self.config.grace_seconds},
        )
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._control.wait_idle(), self.config.grace_seconds)
        if self._control.running:
            event(logger, "loads cut off", {"loads": len(self._control.running)}, level=logging.WARNING)

    async def _stop(self) -> None:
        self._handoff.stop()
        await self._rpc.stop()
        for store in self.stores.values():
            store.stop()  # first, so that what waits for it has ended when the loop does
        await self.staging.stop()
        for pool in self.readers.values():
            pool.stop()
        for store in self.stores.values():
            store.shutdown()
        self._catalog.shutdown()
        if self._tier is not None:
            self._tier.stop()
        for executor in (self._cpu_pool, self._selector, self._slab_workers, self._hashers):
            executor.shutdown()
        self._resolvers.shutdown()
        self.health.stop()
        event(logger, "stopped", self.totals.summary())

    async def _sample(self) -> None:
        """Records throughput and rates for the history, for as long as the daemon runs."""
        while True:
            read_bytes = sum(pool.read_bytes for pool in self.readers.values())
            self.history.sample(read_bytes, self.totals, self._control.running)
            self.staging.reconsider()
            await asyncio.sleep(INTERVAL_SECONDS)

    async def _watch_rpc(self) -> None:
        """Ends the daemon when gRPC's server has ended: nobody is answered any more, and nothing but a new
        daemon helps."""
        why = await self._rpc.ended()
        event(
            logger,
            "grpc ended",
            {"why": why, "hint": "penstockd cannot answer without it and ends too; start it again"},
            level=logging.ERROR,
        )
        self._broken = True
        self._control.stop_waiting()
        self.ask_to_stop()


def _tiered(source: Source, tier: Tier | None, files: TierFiles) -> Source:
    """With what comes over a network kept on the disk, if there is a tier."""
    if tier is None:
        return source
    return (
        TieredSource(source, tier) if isinstance(source, Remote) else TieredSource(source, tier, files.cover)
    )


def _readers(reading: Reading) -> ReaderPool:
    return ReaderPool(
        reading.threads,
        block_bytes=reading.block_bytes,
        name=reading.thread_name,
        spare_threads=reading.spare_threads,
        copies_at_once=reading.copies_at_once,
    )


async def serve(config: Config) -> bool:
    """Runs one daemon to its end, and says whether that was asked for."""
    raise_open_files()
    return await Daemon(config, await open_in_time(config.tier_dir, config.tier_limit_bytes)).run()
