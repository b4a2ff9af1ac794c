"""The answer of `GetStatus` and `/status`, and the gauges of the metrics, from the daemon's state.

Over gRPC a caller who is not privileged sees only its own loads, entries and errors. No token, credential or
byte of a tensor is ever shown.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from weakref import WeakKeyDictionary

from penstock.v1 import streamer_pb2 as pb

from ..config.settings import Config
from ..config.values import UNLIMITED
from ..loads.load import Load
from ..loads.running import Running
from ..loads.warm.warm_set import WarmSet
from ..sources.stores import kind_of
from ..staging.buffer import StagingBuffer
from ..staging.entry import CacheEntry
from ..staging.reading.reader import ReaderPool
from ..system.counts import Totals
from ..system.shown import encodable, shown_sources
from ..tier.tier import Tier
from .exposition import Gauges
from .health import Health
from .history import INTERVAL_SECONDS, Failure, History

SHOWN_HOLDERS = 1024
"""The most holders in one answer. Every open session may be one, and gRPC clients take answers of up to 4
MiB."""
SHOWN_HOLDERS_OF_A_STAGE = 64


@dataclass(frozen=True, slots=True)
class Status:
    """The parts of a daemon that status shows. Used on the event loop. `began` is a time of the loop's
    clock."""

    config: Config
    version: str
    began: float
    staging: StagingBuffer
    readers: Collection[ReaderPool]
    tier: Tier | None
    totals: Totals
    loads: Collection[Running]
    health: Health
    history: History
    warm_set: WarmSet | None = None
    _shown: WeakKeyDictionary[object, list[str]] = field(default_factory=WeakKeyDictionary)
    """The sources of loads and entries, as they are shown: to cut hundreds of long ones takes a while."""

    def gauges(self) -> Gauges:
        usage = self.staging.usage()
        return Gauges(
            limit_bytes=self.config.capacity_bytes,
            free_bytes=usage.free_bytes,
            reading_bytes=usage.reading_bytes,
            leased_bytes=usage.leased_bytes,
            warm_bytes=usage.warm_bytes,
            peak_bytes=usage.peak_bytes,
            oldest_lease_seconds=self._oldest_lease_seconds(),
            loads_active=len(self.loads),
            loads_waiting=usage.waiting,
            readers=sum(len(pool.threads) for pool in self.readers),
            readers_busy=sum(pool.busy for pool in self.readers),
            stuck_bytes=usage.stuck_bytes,
            warm_set_entries=self.warm_set.counts() if self.warm_set is not None else {},
            warm_set_broken=self.warm_set is not None and bool(self.warm_set.problems),
            tier_limit_bytes=self.tier.limit_bytes if self.tier else 0,
            tier_bytes=self.tier.used_bytes if self.tier else 0,
            tier_versions=self.tier.version_count if self.tier else 0,
            tier_off=int(self.tier is not None and bool(self.tier.off_because)),
        )

    def message(self, only_uid: int | None) -> pb.GetStatusResponse:
        """The answer for one user; None is for a privileged user, who sees everything."""
        now = asyncio.get_running_loop().time()
        all_of_it = only_uid is None
        answer = pb.GetStatusResponse(
            version=self.version,
            pid=os.getpid(),
            uptime_seconds=now - self.began,
            serving=not self.health.draining,
            staging=self._staging(),
            readers=pb.ReaderStatus(
                threads=sum(len(pool.threads) for pool in self.readers),
                busy=sum(pool.busy for pool in self.readers),
                stalled=self.health.stalled_readers,
                bytes_per_second=self.history.read_rate(),
            ),
            totals=pb.Totals(**self.totals.summary()),
            health=pb.Health(live=self.health.live, ready=self.health.ready, reason=self.health.reason),
            errors=[
                _failure(failure) for failure in self.history.failures if all_of_it or failure.uid == only_uid
            ],
            throughput=pb.Throughput(
                interval_seconds=INTERVAL_SECONDS,
                read_bytes=self.history.read_bytes,
                delivered_bytes=self.history.delivered_bytes,
                memory_bytes=self.history.memory_bytes,
                tier_bytes=self.history.tier_bytes,
            ),
            configuration=effective(self.config) if all_of_it else {},
            host=socket.gethostname(),
            unix_seconds=time.time(),
            tier=self._tier(),
            hung_mounts=[
                pb.HungMount(
                    mount_point=encodable(hung.mount_point), threads=hung.threads, seconds=hung.seconds
                )
                for hung in self.health.hung_mounts()
            ]
            if all_of_it
            else [],
            warm_set=_warm_set(self.warm_set, now) if all_of_it and self.warm_set is not None else None,
        )
        holders_left = SHOWN_HOLDERS
        for entry in self.staging.entries.values():
            if all_of_it or any(holder.uid == only_uid for holder in entry.holders.values()):
                most = min(SHOWN_HOLDERS_OF_A_STAGE, max(1, holders_left))
                shown = self._shown_sources(entry, entry.checkpoint.sources)
                answer.stages.append(_stage(entry, shown, now, only_uid, most))
                holders_left -= len(answer.stages[-1].holders)
        for load in self.loads:
            if all_of_it or load.caller.uid == only_uid:
                answer.loads.append(self._load(load, now))
        return answer

    def _shown_sources(self, whose: object, sources: Sequence[str]) -> list[str]:
        shown = self._shown.get(whose)
        if shown is None:
            shown = self._shown[whose] = shown_sources(sources)
        return shown

    def _staging(self) -> pb.StagingStatus:
        usage = self.staging.usage()
        status = pb.StagingStatus(
            slab_bytes=self.config.slab_bytes,
            free_bytes=usage.free_bytes,
            reading_bytes=usage.reading_bytes,
            leased_bytes=usage.leased_bytes,
            warm_bytes=usage.warm_bytes,
            peak_bytes=usage.peak_bytes,
            waiting=usage.waiting,
            stuck_bytes=usage.stuck_bytes,
            capacity_bytes=self.config.capacity_bytes,
            oldest_lease_seconds=self._oldest_lease_seconds(),
            populating=self.staging.populating,
        )
        if self.config.memory_limit != UNLIMITED:
            status.limit_bytes = self.config.memory_limit
        return status

    def _tier(self) -> pb.TierStatus | None:
        if self.tier is None:
            return None
        return pb.TierStatus(
            limit_bytes=self.tier.limit_bytes,
            used_bytes=self.tier.used_bytes,
            versions=self.tier.version_count,
            read_bytes=self.tier.counts["read_bytes"],
            written_bytes=self.tier.counts["written_bytes"],
            off_because=self.tier.off_because,
            stale_loads=self.totals.stale_loads,
        )

    def _oldest_lease_seconds(self) -> float:
        now = asyncio.get_running_loop().time()
        since = [
            holder.since
            for entry in self.staging.entries.values()
            if entry.slabs
            for holder in entry.holders.values()
        ]
        return now - min(since, default=now)

    def _load(self, load: Running, now: float) -> pb.LoadStatus:
        place = self.staging.place(load.entry) if load.entry else 0
        status = pb.LoadStatus(
            load_id=load.id,
            sources=self._shown_sources(load, load.request.sources),
            uid=load.caller.uid,
            pid=load.caller.pid,
            state=load.state,
            delivered_bytes=load.delivered_bytes,
            memory_bytes=load.memory_bytes,
            tier_bytes=load.tier_bytes,
            total_bytes=load.total_bytes,
            running_seconds=now - load.began,
            queue_place=place,
            stage_id=load.entry.id if load.entry else 0,
            client_name=load.request.client_name,
            kind=load.kind,
            bytes_per_second=self.history.load_rate(load),
            waited_seconds=now - load.queued_since if load.state == "waiting" else load.waited_seconds,
            waits_for=load.waits_for,
        )
        if isinstance(load, Load) and (member := load.in_group) is not None:
            status.group.CopyFrom(pb.GroupStatus(name=member.name, size=member.size, joined=member.joined))
            status.group_waited_seconds = member.waited_seconds
        return status


def effective(config: Config) -> dict[str, str]:
    """Every value of the configuration, as text."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values.update(values.pop("store_options"))
    return {name: _text(value) for name, value in values.items()}


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return encodable(",".join(map(str, value)))
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else encodable(str(value))


def _warm_set(warm_set: WarmSet, now: float) -> pb.WarmSet:
    entries = []
    for keeper in warm_set.keepers:
        wish, entry = keeper.wish, keeper.entry
        ready_bytes, total_bytes = keeper.progress
        lacks = keeper.state in ("does_not_fit", "on_disk")
        entries.append(
            pb.WarmSetEntry(
                name=wish.name,
                sources=shown_sources(wish.sources),
                state=keeper.state,
                reason=keeper.reason,
                seconds=now - keeper.since,
                pin=wish.pin,
                tier=wish.tier,
                tensors=shown_sources(wish.tensors),
                ready_bytes=ready_bytes,
                total_bytes=total_bytes,
                needed_bytes=keeper.needed_bytes if lacks else 0,
                left_bytes=keeper.left_bytes if lacks else 0,
                stage_id=entry.id if entry is not None else 0,
                checked_seconds=None if keeper.checked_at is None else now - keeper.checked_at,
            )
        )
    return pb.WarmSet(
        file=encodable(str(warm_set.path)), problems=map(encodable, warm_set.problems), entries=entries
    )


def _failure(failure: Failure) -> pb.RecentError:
    return pb.RecentError(
        age_seconds=time.monotonic() - failure.when,
        load_id=failure.load_id,
        reason=failure.reason,
        message=failure.message,
        uid=failure.uid,
        pid=failure.pid,
        sources=failure.sources,
    )


def _stage(
    entry: CacheEntry, shown: Sequence[str], now: float, only_uid: int | None, most_holders: int
) -> pb.StageStatus:
    ring = entry.ring
    sources = entry.checkpoint.sources
    message = pb.StageStatus(
        id=entry.id,
        sources=shown,
        version=entry.version,
        capacity_bytes=ring.capacity_bytes if ring else 0,
        ready_bytes=ring.ready_bytes if ring else 0,
        total_bytes=ring.total_bytes if ring else 0,
        full=entry.full,
        state=entry.state,
        pinned=entry.pinned,
        idle_seconds=0 if entry.holders else now - entry.last_used,
        slab_count=len(entry.slabs),
        uid=entry.owner_uid,
        read_bytes=entry.read_bytes,
        tier_bytes=entry.tier_bytes,
        source=kind_of(sources[0]),
        verified_bytes=entry.verified_bytes,
    )
    members = entry.members
    if members.group and not entry.full:
        message.group.CopyFrom(
            pb.GroupStatus(name=members.group, size=members.expected, joined=members.joined)
        )
    holders = (holder for holder in entry.holders.values() if only_uid in (None, holder.uid))
    for holder in islice(holders, most_holders):
        message.holders.add(
            uid=holder.uid,
            pid=holder.pid,
            held_seconds=now - holder.since,
            client_name=holder.name,
            group=holder.group,
        )
    return message
