"""Who gets in, who is kept out by whom, floods, clients that do not read, and whose files a daemon
removes."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2

from penstock.client import StreamerClient, errors
from penstock.v1 import streamer_pb2 as pb

from ..e2e.programs import await_go, say
from ..e2e.support import (
    DEADLINE_SECONDS,
    MIB,
    Checkpoint,
    Checkpoints,
    DaemonProcess,
    Nursery,
    RawLoad,
    wait_until,
)
from .conftest import StartTarget
from .http2 import Closed, Connection, frame, grpc_message, ping, reset, settings, window_update
from .support import MEMORY_BOUND_BYTES, RawHandoff, TargetDaemon

ANNE, BERT, CARL, DORA = 1201, 1202, 1203, 1204
HEALTH_SERVICES = ("", "penstock.v1.StreamerService", "live")


@pytest.fixture
def checkpoint(checkpoints: Checkpoints) -> Checkpoint:
    return checkpoints("edge")


@pytest.fixture
def daemon(root: None, start_target: StartTarget, checkpoint: Checkpoint) -> TargetDaemon:
    daemon = start_target("--allow", str(checkpoint[0].parent))
    daemon.assert_serves(checkpoint)
    wait_until(lambda: not daemon.usage().connections + daemon.usage().sessions, "the client to be gone")
    return daemon


def connect(socket_dir: str) -> Connection:
    return Connection(Path(socket_dir) / "penstock.sock")


def loads(attackers: Nursery, daemon: DaemonProcess, checkpoint: Checkpoint, uid: int) -> None:
    client = attackers.start("load", uid=uid, socket_dir=daemon.socket_dir, source=checkpoint[0])
    client.hear("loaded")
    client.kill()


# ---- attacks, run as other users -----------------------------------------------------------------


def all_sessions(socket_dir: str, most: int) -> None:
    """Opens handoff connections until one is refused, and keeps them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kept: list[RawHandoff] = []
    words = ""
    while len(kept) < most and not words:
        handoff = RawHandoff(socket_dir)
        came = handoff.receive()
        if came is not None and came.HasField("hello"):
            kept.append(handoff)
        else:
            words = came.refused.message if came is not None else "closed"
            handoff.close()
    say("holds", count=len(kept), words=words)
    await_go()


def all_connections(socket_dir: str, most: int) -> None:
    """Opens connections to penstock.sock until one is refused, and keeps them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kept: list[Connection] = []
    for _ in range(most):
        try:
            kept.append(connect(socket_dir))
            kept[-1].wait(lambda: kept[-1].frames, "gRPC's settings")
        except ConnectionError:
            break
    say("holds", count=len(kept))
    await_go()


FLOODS = {
    "ping": ping(),
    "settings": settings({4: 70000}),
    "window update": window_update(0, 1),
    "priority": frame(2, 0, 1, bytes(5)),
    "unknown": frame(77, 0, 0, b"x" * 100),
    "empty data": frame(0, 0, 1),
    "continuation": frame(9, 0, 1),
    "reset": reset(1),
}


def flood(socket_dir: str, kind: str, rounds: int) -> None:
    """Sends one kind of frame as fast as it is taken, and connects again when the connection is closed."""
    words = []
    for _ in range(rounds):
        with connect(socket_dir) as connection, contextlib.suppress(Closed):
            if kind == "continuation":
                connection.send(frame(1, 0, connection.next_stream()))
            else:
                connection.open_stream("GetStatus")
            connection.offer(FLOODS[kind] * 20_000, seconds=5)
            connection.wait_closed()
            words.append(connection.goaway[1].decode() if connection.goaway else "")
    say("flooded", words=words)
    await_go()


def release_flood(socket_dir: str, source: str, connections: int) -> None:
    """Loads that stand still while their clients send Release without end, until told to stop."""
    release = grpc_message(pb.LoadRequest(release=pb.Release(segments=0)).SerializeToString())
    opening = pb.LoadRequest(open=pb.OpenLoad(sources=[source], list_tensors=True)).SerializeToString()
    chunk = release * (16000 // len(release))
    with contextlib.ExitStack() as stack:
        streams = []
        for _ in range(connections):
            connection = stack.enter_context(connect(socket_dir))
            for _ in range(8):
                token = stack.enter_context(RawHandoff(socket_dir)).token()
                stream = connection.open_stream("Load", [("penstock-session", token)])
                connection.send_message(stream, opening)
                streams.append((connection, stream))
        say("ready")
        sent = 0
        for _ in range(40):
            for connection, stream in streams:
                if connection.window_bytes(stream) < len(chunk):
                    connection.offer(b"", seconds=0)
                    connection._turn(0.0)
                    continue
                connection._connection_window_bytes -= len(chunk)
                connection._window_bytes[stream] -= len(chunk)
                sent += connection.offer(frame(0, 0, stream, chunk), seconds=0.02)
        say("flooded", sent=sent)
        await_go()


def deaf_loads(socket_dir: str, source: str, count: int) -> None:
    """Loads whose clients open every window and then read nothing."""
    with contextlib.ExitStack() as stack:
        opened = 0
        for _ in range(count):
            handoff = stack.enter_context(RawHandoff(socket_dir))
            connection = stack.enter_context(
                Connection(Path(socket_dir) / "penstock.sock", settings_sent={4: 2**31 - 1}, answers=False)
            )
            with contextlib.suppress(Closed):
                connection.send(window_update(0, 2**30))
                stream = connection.open_stream("Load", [("penstock-session", handoff.token())])
                opening = pb.OpenLoad(sources=[source], list_tensors=True)
                connection.send(
                    frame(0, 0, stream, grpc_message(pb.LoadRequest(open=opening).SerializeToString()))
                )
                opened += 1
        say("deaf", count=opened)
        await_go()


def watch_health(socket_dir: str) -> None:
    """Watches the health of each service: by a client that takes nothing, and by one that goes when told."""
    with (
        Connection(Path(socket_dir) / "penstock.sock", settings_sent={4: 0}) as deaf,
        connect(socket_dir) as fickle,
    ):
        _, watches = [
            [open_watch(connection, service) for service in HEALTH_SERVICES] for connection in (deaf, fickle)
        ]
        fickle.wait(lambda: all(fickle.messages(one) for one in watches), "an answer of each")
        say("watching")
        await_go()
        fickle.close()
        say("gone")
        await_go()


def open_watch(connection: Connection, service: str) -> int:
    stream = connection.open_stream("/grpc.health.v1.Health/Watch")
    request = health_pb2.HealthCheckRequest(service=service)
    connection.send_message(stream, request.SerializeToString(), end=True)
    return stream


def watched_states(connection: Connection, stream: int) -> list[int]:
    return [health_pb2.HealthCheckResponse.FromString(raw).status for raw in connection.messages(stream)]


# ---- sessions and connections --------------------------------------------------------------------


def test_four_users_who_take_every_session_keep_out_neither_root_nor_a_fifth(
    daemon: TargetDaemon, attackers: Nursery, checkpoint: Checkpoint
) -> None:
    before = daemon.usage()
    holders = []
    for uid in (ANNE, BERT, CARL, DORA):
        holders.append(attackers.start(all_sessions, uid=uid, socket_dir=daemon.socket_dir, most=1500))
        said = holders[-1].hear("holds")
        assert said["count"] > 0
        assert "connections and may have no more now" in said["words"]
    daemon.assert_serves(checkpoint)
    loads(attackers, daemon, checkpoint, 1299)
    for holder in holders:
        holder.kill()
    daemon.assert_comes_back(before)


@pytest.mark.parametrize("open_files", [512, 8192])
def test_users_who_take_every_connection_keep_out_neither_root_nor_another(
    open_files: int, root: None, start_target: StartTarget, attackers: Nursery, checkpoint: Checkpoint
) -> None:
    daemon = start_target("--allow", str(checkpoint[0].parent), open_files=open_files)
    before = daemon.usage()
    holders = []
    for uid in (ANNE, BERT):
        holders.append(attackers.start(all_connections, uid=uid, socket_dir=daemon.socket_dir, most=1000))
        assert holders[-1].hear("holds")["count"] > 0
    assert daemon.usage().descriptors < open_files * 3 // 4
    assert daemon.usage().anonymous_bytes < MEMORY_BOUND_BYTES // 2
    daemon.assert_serves(checkpoint)
    loads(attackers, daemon, checkpoint, CARL)
    for holder in holders:
        holder.kill()
    wait_until(lambda: daemon.usage().descriptors <= before.descriptors + 8, "the connections to be gone")


# ---- floods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_costs_its_connections_and_little_else(
    kind: str, daemon: TargetDaemon, attackers: Nursery, checkpoint: Checkpoint
) -> None:
    before = daemon.usage()
    rounds = 2 if kind == "reset" else 5  # the gate takes four seconds for the resets of a round
    with daemon.watched() as watch:
        flooder = attackers.start(flood, uid=ANNE, socket_dir=daemon.socket_dir, kind=kind, rounds=rounds)
        daemon.assert_serves(checkpoint)
        said = flooder.hear("flooded")
        flooder.kill()
    assert len(said["words"]) == rounds
    watch.assert_bounded(before.anonymous_bytes + 16 * MIB)
    if kind != "ping":  # of which gRPC itself takes only a few
        none = 'connections_closed_total{reason="flood"} 0.0'
        wait_until(lambda: none not in daemon.http("/metrics")[1].decode(), "a flood to be counted")
    daemon.assert_comes_back(before)


def test_releases_without_end_hold_up_their_sender(
    daemon: TargetDaemon, attackers: Nursery, checkpoint: Checkpoint
) -> None:
    before = daemon.usage()
    with daemon.watched() as watch:
        flooder = attackers.start(
            release_flood, uid=ANNE, socket_dir=daemon.socket_dir, source=checkpoint[0], connections=4
        )
        flooder.hear("ready")
        daemon.assert_serves(checkpoint)
        flooder.hear("flooded")
        loads(attackers, daemon, checkpoint, BERT)
        flooder.kill()
    watch.assert_bounded(before.anonymous_bytes + 32 * MIB)
    daemon.assert_comes_back(before)


def test_who_watches_the_health_and_takes_nothing_or_goes_keeps_it_from_nobody(
    daemon: TargetDaemon, attackers: Nursery, checkpoint: Checkpoint
) -> None:
    serving, not_serving = (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )
    stranger = attackers.start(watch_health, uid=ANNE, socket_dir=daemon.socket_dir)
    stranger.hear("watching")
    with daemon.connect() as connection, RawLoad(daemon, checkpoint[0], list_tensors=True) as load:
        load.next("listing")
        watches = [open_watch(connection, service) for service in HEALTH_SERVICES[:2]]
        connection.wait(lambda: all(watched_states(connection, one) for one in watches), "the state")
        stranger.go()
        stranger.hear("gone")
        daemon.process.send_signal(signal.SIGTERM)
        connection.wait(lambda: all(len(watched_states(connection, one)) == 2 for one in watches), "another")
        assert [watched_states(connection, one) for one in watches] == [[serving, not_serving]] * 2
    assert daemon.process.wait(DEADLINE_SECONDS) == 0


# ---- clients that do not read --------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_listing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4000 tensors of one byte, with names of 4 KB: a listing of 16 MB."""
    path = tmp_path_factory.mktemp("listing") / "long.safetensors"
    entries = {
        f"{number:05d}" + "n" * 4000: {"dtype": "U8", "shape": [1], "data_offsets": [number, number + 1]}
        for number in range(4000)
    }
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(len(entries)))
    for parent in (path, path.parent, path.parent.parent):
        parent.chmod(0o755)
    return path


def test_answers_that_nobody_reads_are_bounded_and_hold_up_no_other_user(
    root: None,
    start_target: StartTarget,
    attackers: Nursery,
    checkpoint: Checkpoint,
    long_listing: Path,
) -> None:
    daemon = start_target(
        "--allow", str(checkpoint[0].parent), "--allow", str(long_listing.parent), "--max-loads", "200"
    )
    with daemon.client() as client, client.load(long_listing, tensors=lambda name: False) as load:
        assert load.tensor_count == 0  # and the header is known from now on
    before = daemon.usage()
    with daemon.watched() as watch:
        deaf = [
            attackers.start(deaf_loads, uid=uid, socket_dir=daemon.socket_dir, source=long_listing, count=60)
            for uid in (ANNE, BERT)
        ]
        for each in deaf:
            assert each.hear("deaf")["count"] > 0
        daemon.assert_serves(checkpoint)
        loads(attackers, daemon, checkpoint, CARL)
        with daemon.client() as client, client.load(long_listing, tensors=lambda name: False) as load:
            assert load.tensor_count == 0
        for each in deaf:
            each.kill()
    watch.assert_bounded()
    daemon.assert_comes_back(before)


def test_a_client_that_reads_late_gets_all_of_it(daemon: TargetDaemon, long_listing: Path) -> None:
    """In parts of about 1 MiB. A debugger may stop a client for minutes: nothing cuts it off."""
    with RawLoad(daemon, long_listing, list_tensors=True) as load:
        found, parts = [], 0
        while True:
            listing = load.next("listing")
            parts += 1
            assert listing.ByteSize() < MIB + 64 * 1024
            found += [tensor.name for tensor in listing.tensors]
            if listing.last:
                break
        assert len(found) == len(set(found)) == 4000
        assert parts >= 16


# ---- what is kept of what a caller sent ----------------------------------------------------------


def test_an_error_s_text_survives_any_path(daemon: TargetDaemon) -> None:
    for path in (
        "/" + "\U0001f600" * 900,
        "/" + "/".join(["\U0001f600" * 60] * 15),
        "/" + "/".join(["%" * 200] * 5),
    ):
        with pytest.raises(errors.PenstockError) as caught:
            StreamerClient(daemon.socket_dir).load(path)
        assert caught.value.reason == "CHECKPOINT_NOT_FOUND"
        assert "more characters]" in str(caught.value)
        assert str(caught.value).startswith(path[:50])


def test_long_sources_leave_little_in_log_status_and_memory(daemon: TargetDaemon) -> None:
    before = daemon.usage()
    log_bytes = len(daemon.log())
    with daemon.watched() as watch:
        for number in range(60):
            with pytest.raises(errors.PenstockError):
                StreamerClient(daemon.socket_dir).load([f"/{number}{'x' * 8000}"] * 100)
        status = daemon.http_status()
    assert len(json.dumps(status)) < 150_000
    assert len(daemon.log()) - log_bytes < 60 * 2 * 1500
    watch.assert_bounded(before.anonymous_bytes + 40 * MIB)
    for failure in status["errors"]:
        assert sum(map(len, failure["sources"])) < 2000
        assert "more characters]" in failure["sources"][0]


# ---- whose files ---------------------------------------------------------------------------------


class Daemons:
    """Daemons in directories whose files a test replaces."""

    def __init__(self) -> None:
        self.top = Path(tempfile.mkdtemp(prefix="pst-", dir="/tmp"))
        self.started: list[DaemonProcess] = []

    def start(self, name: str = "s") -> DaemonProcess:
        log = self.top / f"{len(self.started)}.log"
        self.started.append(DaemonProcess(self.top / name, "--memory-limit", "8MiB", log_path=log))
        return self.started[-1].wait_ready()


@pytest.fixture
def daemons() -> Iterator[Daemons]:
    made = Daemons()
    yield made
    for daemon in made.started:
        daemon.kill()
    shutil.rmtree(made.top)


NAMES = {"handoff.sock", "penstock.sock", "penstockd.lock"}


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_daemon_whose_directory_was_replaced_removes_nothing_of_its_successor(
    how: str, daemons: Daemons, checkpoint: Checkpoint
) -> None:
    old = daemons.start()
    if how == "removed":
        shutil.rmtree(old.socket_dir)
    else:
        old.socket_dir.rename(daemons.top / "elsewhere")
    new = daemons.start()
    before = {path: path.lstat().st_ino for path in new.socket_dir.iterdir()}
    assert {path.name for path in before} == NAMES
    assert old.terminate() == 0, old.log()
    assert {path: path.lstat().st_ino for path in new.socket_dir.iterdir()} == before
    with new.client() as client:
        assert set(client.load_state_dict(checkpoint[0])) == set(checkpoint[1])
    assert new.terminate() == 0
    assert {path.name for path in new.socket_dir.iterdir()} == {"penstockd.lock"}


def test_a_daemon_whose_sockets_were_replaced_by_files_leaves_these(daemons: Daemons) -> None:
    daemon = daemons.start()
    for name in ("handoff.sock", "penstock.sock"):
        (daemon.socket_dir / name).unlink()
        (daemon.socket_dir / name).write_text("another's")
    assert daemon.terminate() == 0
    for name in ("handoff.sock", "penstock.sock"):
        assert (daemon.socket_dir / name).read_text() == "another's"


def test_a_daemon_without_its_lock_file_keeps_its_sockets_from_a_second_one(
    daemons: Daemons, checkpoint: Checkpoint
) -> None:
    daemon = daemons.start()
    (daemon.socket_dir / "penstockd.lock").unlink()
    command = [sys.executable, "-m", "penstock.server", "--socket-dir", str(daemon.socket_dir)]
    second = subprocess.run([*command, "--memory-limit", "8MiB"], capture_output=True, text=True, timeout=60)
    assert second.returncode != 0
    assert "another penstockd listens" in second.stderr
    with daemon.client() as client:
        assert set(client.load_state_dict(checkpoint[0])) == set(checkpoint[1])


def test_a_killed_daemon_s_files_do_not_keep_the_next_one_from_its_directory(daemons: Daemons) -> None:
    daemons.start().kill()
    new = daemons.start()
    assert {path.name for path in new.socket_dir.iterdir()} == NAMES


def test_nobody_can_reach_grpc_past_the_gate(daemon: TargetDaemon) -> None:
    """Once it serves, no path leads there."""
    assert {path.name for path in daemon.socket_dir.iterdir()} == NAMES
    paths = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "/s/." in line}
    assert not [path for path in paths if os.path.exists(path)]
