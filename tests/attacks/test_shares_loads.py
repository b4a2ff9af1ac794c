"""Users who take all the loads and all the memory that they can get keep nobody out, root least of all."""

from __future__ import annotations

import queue
import re
import threading
from datetime import datetime, timezone
from typing import Any

import grpc
import pytest

from penstock.client import StreamerClient
from penstock.v1 import streamer_pb2 as pb
from penstock.v1 import streamer_pb2_grpc

from ..e2e.programs import await_go, say
from ..e2e.support import (
    MIB,
    Checkpoint,
    Checkpoints,
    ClientProcess,
    DaemonProcess,
    Nursery,
    expected,
    wait_until,
)
from .conftest import StartTarget
from .support import RawHandoff, TargetDaemon

GREEDY = (70001, 70002, 70003)
MODEST = 70009
LOADS_OF_A_CHANNEL = 15

pytestmark = pytest.mark.usefixtures("root")


def hold_loads(socket_dir: str, sources: list[str], count: int, **fields: Any) -> None:
    """Opens loads, takes the first message of each, and answers nothing; says how many there are, and why no
    more."""
    kept: list[object] = []
    refused = ""
    stub: Any = None
    for number in range(count):
        handoff = RawHandoff(socket_dir)
        if number % LOADS_OF_A_CHANNEL == 0:
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = grpc.insecure_channel(f"unix:{socket_dir}/penstock.sock", options=options)
            stub = streamer_pb2_grpc.StreamerServiceStub(channel)
        requests: queue.SimpleQueue[pb.LoadRequest] = queue.SimpleQueue()
        requests.put(pb.LoadRequest(open=pb.OpenLoad(sources=sources, **fields)))
        call = stub.Load(iter(requests.get, None), metadata=[("penstock-session", handoff.token())])
        try:
            next(call)
        except grpc.RpcError as error:
            refused = str(error.details())
            break
        kept.append((handoff, channel, requests, call))
    say("holds", count=len(kept), refused=refused)
    await_go()


def load_without_end(socket_dir: str, source: str, names: list[str], threads: int) -> None:
    """So many loads at a time, and another whenever one is done. Each leaves one of the tensors out, so that
    they share nothing."""

    def run(without: int) -> None:
        some = names[:without] + names[without + 1 :]
        while True:
            with StreamerClient(socket_dir).load(source, tensors=some) as opened:
                for _name, _tensor in opened:
                    del _tensor

    for number in range(threads):
        threading.Thread(target=run, args=(number,), daemon=True).start()
    await_go()


@pytest.fixture(scope="module")
def small(checkpoints: Checkpoints) -> Checkpoint:
    return checkpoints("small", 2)


@pytest.fixture(scope="module")
def large(checkpoints: Checkpoints) -> Checkpoint:
    return checkpoints("large", 40)


def start(
    start_target: StartTarget, checkpoint: Checkpoint, *flags: str, memory_mib: int = 64
) -> TargetDaemon:
    return start_target("--allow", str(checkpoint[0].parent), *flags, memory_limit_bytes=memory_mib * MIB)


def loads(attackers: Nursery, daemon: DaemonProcess, uid: int, checkpoint: Checkpoint) -> bool:
    client = attackers.start("load", uid=uid, socket_dir=daemon.socket_dir, source=checkpoint[0])
    return bool(client.hear("loaded")["found"] == expected(checkpoint[1]))


@pytest.mark.parametrize("fields", [{"list_tensors": True}, {"memory_limit_bytes": 1}, {}])
def test_users_who_take_every_load_leave_one_to_the_next_user_and_the_rest_to_root(
    start_target: StartTarget, attackers: Nursery, small: Checkpoint, fields: dict[str, Any]
) -> None:
    """They do not choose, do not release, or just stay."""
    daemon = start(start_target, small, "--max-loads", "32")
    before = daemon.usage()
    holders: list[ClientProcess] = []
    held = []
    for uid in GREEDY[:2]:
        holders.append(
            attackers.start(
                hold_loads, uid=uid, socket_dir=daemon.socket_dir, sources=[str(small[0])], count=60, **fields
            )
        )
        said = holders[-1].hear("holds")
        held.append(said["count"])
    if "list_tensors" in fields:  # the others' loads are over when their last segment is announced
        assert held == [22, 4]  # one first unit each; seven eighths of 25, and of the 4 that this leaves
        assert "--max-loads" in said["refused"]
    assert loads(attackers, daemon, MODEST, small)
    for _ in range(3):
        daemon.assert_serves(small)
    for holder in holders:
        holder.kill()
    daemon.assert_comes_back(before)


@pytest.mark.parametrize("users", [2, 3])
def test_a_load_waits_for_a_few_loads_of_users_who_queue_without_end(
    start_target: StartTarget, attackers: Nursery, large: Checkpoint, users: int
) -> None:
    """Each has 12 loads under way or waiting, of a checkpoint larger than all memory."""
    daemon = start(start_target, large, memory_mib=16)
    for uid in GREEDY[:users]:
        attackers.start(
            load_without_end,
            uid=uid,
            socket_dir=daemon.socket_dir,
            source=large[0],
            names=list(large[1]),
            threads=12,
        )
    wait_until(lambda: daemon.status()["staging"]["waiting"] >= 8 * users, "a long queue")

    def at_work() -> dict[str, Any] | None:
        """The modest user's load, and the time of day, once it has come so far."""
        status = daemon.status()
        found = [load for load in status["loads"] if load["uid"] == MODEST and load["state"] != "resolving"]
        return {**found[0], "now": status["unix_seconds"]} if found else None

    seen = 0
    while seen < 3:
        client = attackers.start(
            "load", uid=MODEST, socket_dir=daemon.socket_dir, source=large[0], pause_after=0
        )
        first = wait_until(at_work, "its load to wait")
        client.hear("paused")  # has its memory
        waited_seconds = wait_until(at_work, "its load")["waited_seconds"]
        client.go()
        assert client.hear("loaded")["found"] == expected(large[1])
        if first["state"] == "waiting":  # else nobody saw when that began
            seen += 1
            # By the daemon's clock: others go on while this process gets to hear that it is served.
            began = first["now"] - first["waited_seconds"]
            done = sum(began < moment < began + waited_seconds for moment in ends_of_loads(daemon))
            assert done <= 4 * users, "others were served many times before"
    attackers.end_all()


def ends_of_loads(daemon: DaemonProcess) -> list[float]:
    """When loads ended well, as Unix time, by the log."""
    stamps = re.findall(r"^(\S+)Z info load result=ok ", daemon.log(), re.MULTILINE)
    return [datetime.fromisoformat(stamp).replace(tzinfo=timezone.utc).timestamp() for stamp in stamps]


def test_a_group_that_nobody_joins_and_windows_that_nobody_reads_leave_others_their_memory(
    start_target: StartTarget, attackers: Nursery, large: Checkpoint
) -> None:
    """Nor do loads that wait for more than the first user left."""
    daemon = start(start_target, large, memory_mib=16)
    group = [
        attackers.start(
            "load",
            uid=GREEDY[0],
            socket_dir=daemon.socket_dir,
            source=large[0],
            group=("nobody", 60000),
            pause_after=0,
        )
    ]
    group[0].hear("paused")
    for number in range(3):
        attackers.start(
            hold_loads,
            uid=GREEDY[0],
            socket_dir=daemon.socket_dir,
            sources=[str(large[0])],
            count=10,
            tensors={"names": [f"layer.{number}.weight"]},
        )
    assert loads(attackers, daemon, MODEST, large)
    daemon.assert_serves(large)
    attackers.end_all()
