"""What `GetStatus` says, from the daemon's state. A caller that is not privileged sees its own loads only."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable

from penstock.v1 import streamer_pb2 as pb

from .admission import Admission
from .config import UNLIMITED, Config
from .metrics import Totals
from .reader import ReaderPool
from .staged import StagedCheckpoint
from .staging import Staging


def build_status(
    *,
    config: Config,
    version: str,
    now: float,
    began: float,
    serving: bool,
    staging: Staging,
    readers: ReaderPool,
    totals: Totals,
    loads: Iterable[Admission],
    only_uid: int | None,
) -> pb.GetStatusResponse:
    """`now` and `began` are of the loop's clock; `only_uid` None means everything."""
    usage = staging.usage()
    answer = pb.GetStatusResponse(
        version=version,
        pid=os.getpid(),
        uptime_seconds=now - began,
        serving=serving,
        staging=pb.StagingStatus(
            slab_bytes=config.slab_bytes,
            free_bytes=usage.free_bytes,
            reading_bytes=usage.reading_bytes,
            leased_bytes=usage.leased_bytes,
            warm_bytes=usage.warm_bytes,
            peak_bytes=usage.peak_bytes,
            waiting=usage.waiting,
        ),
        readers=pb.ReaderStatus(threads=len(readers.threads), busy=readers.busy),
        totals=pb.Totals(**dataclasses.asdict(totals)),
    )
    if config.memory_limit != UNLIMITED:
        answer.staging.limit_bytes = config.memory_limit
    for staged in staging.stages.values():
        if only_uid is None or any(holder.uid == only_uid for holder in staged.holders.values()):
            answer.stages.append(_stage(staged, now, only_uid))
    for load in loads:
        if only_uid is None or load.caller.uid == only_uid:
            answer.loads.append(_load(load, now, staging))
    return answer


def _stage(staged: StagedCheckpoint, now: float, only_uid: int | None) -> pb.StageStatus:
    stage = staged.stage
    message = pb.StageStatus(
        id=staged.id,
        sources=staged.checkpoint.sources,
        version=staged.version,
        capacity_bytes=stage.capacity_bytes if stage else 0,
        ready_bytes=stage.ready_bytes if stage else 0,
        total_bytes=stage.total_bytes if stage else 0,
        full=staged.full,
        state=staged.state,
        pinned=staged.pinned,
        idle_seconds=0 if staged.holders else now - staged.last_used,
    )
    for holder in staged.holders.values():
        if only_uid is None or holder.uid == only_uid:
            message.holders.add(
                uid=holder.uid, pid=holder.pid, held_seconds=now - holder.since, client_name=holder.name
            )
    return message


def _load(load: Admission, now: float, staging: Staging) -> pb.LoadStatus:
    return pb.LoadStatus(
        load_id=load.id,
        sources=load.request.sources,
        uid=load.caller.uid,
        pid=load.caller.pid,
        state=load.state,
        delivered_bytes=load.delivered_bytes,
        total_bytes=load.total_bytes,
        running_seconds=now - load.began,
        queue_place=staging.place(load.staged) if load.staged else 0,
        stage_id=load.staged.id if load.staged else 0,
        client_name=load.request.client_name,
    )
