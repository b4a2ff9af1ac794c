"""Users of one daemon: whose slabs are whose, who may do what, and what one cannot do to another.

`test_isolation.py` has the paths that a user may load; `test_hostile_clients.py` broken messages.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from ..conftest import StartDaemon
from ..support import (
    MIB,
    Checkpoint,
    Checkpoints,
    ClientProcess,
    DaemonProcess,
    Nursery,
    RawLoad,
    expected,
    running_daemon,
    same,
    wait_until,
    write_checkpoint,
)

ANNE, BERT = 54321, 54322


pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture(scope="module")
def models(checkpoints: Checkpoints) -> Path:
    """The directory of `small` and `large`, which other users may load from."""
    return checkpoints.directory


@pytest.fixture(scope="module")
def small(checkpoints: Checkpoints) -> Checkpoint:
    """3 MiB in 3 tensors."""
    return checkpoints("small", 3)


@pytest.fixture(scope="module")
def large(checkpoints: Checkpoints) -> Checkpoint:
    """24 MiB in 24 tensors."""
    return checkpoints("large", 24)


@pytest.fixture(scope="module")
def module_daemon(models: Path) -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "16MiB", "--allow", str(models)) as daemon:
        yield daemon


@pytest.fixture
def ask(daemon: DaemonProcess, nursery: Nursery) -> Ask:
    return Ask(daemon, nursery)


class Ask:
    """Runs programs as a user."""

    def __init__(self, daemon: DaemonProcess, nursery: Nursery) -> None:
        self._daemon = daemon
        self._nursery = nursery

    def __call__(self, uid: int, program: str, **arguments: object) -> ClientProcess:
        return self._nursery.start(program, uid=uid, socket_dir=self._daemon.socket_dir, **arguments)


# ---- slabs ---------------------------------------------------------------------------------------


def test_a_slab_that_one_user_received_is_never_received_by_another(
    daemon: DaemonProcess, ask: Ask, small: Checkpoint, large: Checkpoint
) -> None:
    """Though every load takes what the one before left: full stages and windows, by turns, thrice."""
    seen: dict[int, set[str]] = {ANNE: set(), BERT: set(), 0: set()}
    for path, tensors in (small, large, small):
        for uid, inodes in seen.items():
            said = ask(uid, "mapped_slabs", source=path).hear("slabs")
            assert said["found"] == expected(tensors)
            inodes.update(said["inodes"])
        daemon.wait_idle()
    assert all(seen.values())
    assert not seen[ANNE] & seen[BERT]
    assert not seen[0] & (seen[ANNE] | seen[BERT])
    assert daemon.status()["staging"]["peak_bytes"] <= 16 * MIB


def test_one_user_s_slabs_are_used_again_for_that_user(
    daemon: DaemonProcess, ask: Ask, large: Checkpoint
) -> None:
    first = set(ask(ANNE, "mapped_slabs", source=large[0]).hear("slabs")["inodes"])
    daemon.wait_idle()
    second = set(ask(ANNE, "mapped_slabs", source=large[0]).hear("slabs")["inodes"])
    assert first & second


def test_a_checkpoint_that_one_user_staged_is_not_shared_with_another(
    daemon: DaemonProcess, ask: Ask, small: Checkpoint
) -> None:
    before = daemon.read_bytes()
    holders = [ask(uid, "hold", source=small[0]) for uid in (ANNE, BERT, ANNE)]
    for holder in holders:
        assert holder.hear("holds")["found"] == expected(small[1])
    assert daemon.read_bytes() - before == 6 * MIB
    assert len(daemon.status()["stages"]) == 2


def test_what_the_operator_prefetched_is_warm_for_the_first_user_only(
    daemon: DaemonProcess, ask: Ask, small: Checkpoint
) -> None:
    daemon.client().prefetch(small[0], pin=True)
    before = daemon.read_bytes()
    first = ask(ANNE, "mapped_slabs", source=small[0]).hear("slabs")
    assert daemon.read_bytes() == before
    second = ask(BERT, "mapped_slabs", source=small[0]).hear("slabs")
    assert daemon.read_bytes() == before + 3 * MIB
    assert first["found"] == second["found"] == expected(small[1])
    assert not set(first["inodes"]) & set(second["inodes"])
    third = ask(ANNE, "mapped_slabs", source=small[0]).hear("slabs")
    assert third["inodes"] == first["inodes"]


# ---- who may -------------------------------------------------------------------------------------


def test_a_user_may_load_and_prefetch_what_is_allowed_and_nothing_else(
    ask: Ask, small: Checkpoint, tmp_path: Path
) -> None:
    path, tensors = small
    secret = write_checkpoint(tmp_path / "secret.safetensors", tensors)
    assert ask(ANNE, "load", source=path).hear("loaded")["found"] == expected(tensors)
    staged = ask(ANNE, "call", method="prefetch", source=path).hear("returned")["result"]
    assert staged["total_bytes"] == 3 * MIB
    for client in (
        ask(ANNE, "load", source=secret),
        ask(ANNE, "call", method="prefetch", source=secret),
        ask(ANNE, "call", method="prefetch", source=path, pin=True),
        ask(ANNE, "call", method="evict", source=path),
        ask(ANNE, "call", method="evict"),
    ):
        failed = client.hear("failed")
        assert failed["error"] == "AccessDeniedError"
        assert str(ANNE) in failed["message"]


def test_what_a_user_staged_is_neither_evicted_nor_seen_by_another(
    daemon: DaemonProcess, ask: Ask, small: Checkpoint
) -> None:
    holder = ask(ANNE, "hold", source=small[0])
    holder.hear("holds")
    ask(BERT, "call", method="evict", source=small[0]).hear("failed")
    seen = ask(BERT, "status").hear("status")["status"]
    assert seen["stages"] == seen["loads"] == []
    assert [stage["state"] for stage in daemon.status()["stages"]] == ["leased"]
    own = ask(ANNE, "status").hear("status")["status"]
    assert [[one["uid"] for one in stage["holders"]] for stage in own["stages"]] == [[ANNE]]


def test_the_operator_may_do_everything(daemon: DaemonProcess, small: Checkpoint) -> None:
    client = daemon.client()
    client.prefetch(small[0], pin=True)
    assert [stage["pinned"] for stage in client.status()["stages"]] == [True]
    assert client.evict(small[0]).freed_bytes == 4 * MIB


def test_no_token_opens_another_s_load(daemon: DaemonProcess, small: Checkpoint) -> None:
    """Neither one changed in a bit, nor one used, nor one whose connection closed."""
    with RawLoad(daemon, small[0]) as used:
        used.finish()
        flipped = used.token[:-1] + ("0" if used.token[-1] != "0" else "1")
        assert len(used.token) == 32
        for token in (flipped, used.token, used.token.upper(), used.token[:16], used.token + " "):
            assert refused(daemon, small[0], token)
    assert wait_until(lambda: refused(daemon, small[0], used.token), "the token to die")


def refused(daemon: DaemonProcess, path: Path, token: str) -> bool:
    with RawLoad(daemon, path, token=token) as load:
        try:
            load.next("manifest")
        except grpc.RpcError as error:
            return isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAUTHENTICATED
        return False


# ---- what one cannot do to another ---------------------------------------------------------------


def loads(ask: Ask, uid: int, checkpoint: Checkpoint) -> bool:
    client = ask(uid, "load", source=checkpoint[0])
    return bool(client.hear("loaded")["found"] == expected(checkpoint[1]))


def test_a_user_who_opens_a_thousand_connections_keeps_nobody_from_loading(
    daemon: DaemonProcess, ask: Ask, small: Checkpoint
) -> None:
    flood = ask(ANNE, "flood", count=1100)
    assert flood.hear("flooded")["refused"] >= 76
    assert loads(ask, BERT, small)
    flood.kill()
    wait_until(lambda: ask(ANNE, "status").hear("status"), "the connections to be forgotten")


def test_a_thousand_connections_leave_a_daemon_of_few_descriptors_some(
    start_daemon: StartDaemon, nursery: Nursery, models: Path, small: Checkpoint
) -> None:
    daemon = start_daemon(
        "--memory-limit", "16MiB", "--allow", str(models), wrapper=("prlimit", "--nofile=1024:1024")
    )
    ask = Ask(daemon, nursery)
    ask(ANNE, "flood", count=1000).hear("flooded")
    assert loads(ask, BERT, small)


@pytest.mark.parametrize("files", [1024, 4096])
def test_thousands_of_connections_without_a_session_leave_the_daemon_its_descriptors(
    files: int, start_daemon: StartDaemon, nursery: Nursery, models: Path, small: Checkpoint
) -> None:
    """Users get a twelfth of the descriptors' number, less an eighth of that for root. An eighth of these is
    set aside for the first eight users; of the rest one of them gets seven eighths."""
    daemon = start_daemon(
        "--memory-limit", "16MiB", "--allow", str(models), wrapper=("prlimit", f"--nofile={files}:{files}")
    )
    ask = Ask(daemon, nursery)
    flood = ask(ANNE, "flood_grpc", count=5000)
    total = files // 12
    shared = total - total // 8
    first = shared // 8
    assert flood.hear("flooded")["kept"] == (shared - first) * 7 // 8 + first // 8
    same(daemon.client().load_state_dict(small[0]).items(), small[1])
    assert loads(ask, BERT, small)
    assert len(daemon.fds()) < files // 3
    another = ask(ANNE, "load", source=small[0])
    wait_until(lambda: "does not take this connection" in another.errors(), "a connection to be refused")
    flood.kill()
    another.hear("loaded")  # it tried again
    another.kill()
    wait_until(lambda: len(daemon.fds()) < files // 12, "the connections to be forgotten")
    assert loads(ask, ANNE, small)


@pytest.mark.stress
def test_a_connection_without_a_call_is_closed_after_a_minute(daemon: DaemonProcess) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings, acknowledged = (b"\0\0\0\4" + flags + bytes(4) for flags in (b"\0", b"\1"))
    with contextlib.ExitStack() as stack:
        connections = []
        for said in (b"", preface[:10], preface, preface + settings, preface + settings + acknowledged):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(90)
            connection.connect(str(daemon.socket_dir / "penstock.sock"))
            connection.sendall(said)
            connections.append(connection)
        for connection in connections:
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass


def test_a_user_who_may_load_nothing_gets_no_connection_at_all(
    start_daemon: StartDaemon, nursery: Nursery
) -> None:
    daemon = start_daemon("--memory-limit", "16MiB")
    assert Ask(daemon, nursery)(ANNE, "flood_grpc", count=100).hear("flooded")["kept"] == 0
    assert {path.name for path in daemon.socket_dir.iterdir()} == {
        "handoff.sock",
        "penstock.sock",
        "penstockd.lock",
    }


def test_a_user_who_sends_garbage_or_never_takes_slabs_keeps_nobody_from_loading(
    daemon: DaemonProcess, ask: Ask, small: Checkpoint, large: Checkpoint
) -> None:
    stuck = [ask(ANNE, "leave_the_slabs", source=large[0]) for _ in range(5)]
    stuck += [ask(ANNE, "leave_the_slabs", source=small[0], memory_limit_bytes=2 * MIB) for _ in range(5)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(daemon.socket_dir / "handoff.sock"))
        connection.send(b"\xff" * 10_000)
        wait_until(lambda: loads(ask, BERT, small), "the other user's load")
        wait_until(lambda: loads(ask, BERT, large), "the other user's load")
    assert stuck


@pytest.mark.parametrize("limit", ["16MiB", "64MiB"])
def test_a_user_who_holds_the_whole_share_for_ever_keeps_nobody_from_loading(
    limit: str, start_daemon: StartDaemon, nursery: Nursery, models: Path, large: Checkpoint
) -> None:
    """Neither with tensors nor with a window that does not move; what waits of that user waits aside."""
    daemon = start_daemon("--memory-limit", limit, "--allow", str(models))
    ask = Ask(daemon, nursery)
    if limit == "16MiB":
        ask(ANNE, "load", source=large[0], pause_after=0).hear("paused")
    else:
        parts = [sorted(large[1])[first : first + 12] for first in (0, 12)]
        for part in parts:
            ask(ANNE, "hold", source=large[0], tensors=part).hear("holds")
        for count in range(1, 24):
            names = sorted(large[1])[count : count + 12]
            ask(ANNE, "load", source=large[0], tensors=names, pause_after=0)
        wait_until(lambda: daemon.status()["staging"]["waiting"], "the share to be taken")
    waiting = [ask(ANNE, "load", source=large[0], tensors=["layer.3.weight"]) for _ in range(2)]
    assert loads(ask, BERT, large)
    assert daemon.status()["staging"]["peak_bytes"] <= int(limit.removesuffix("MiB")) * MIB
    assert waiting


def test_a_user_s_loads_do_not_use_up_what_loads_there_may_be(
    start_daemon: StartDaemon, nursery: Nursery, models: Path, small: Checkpoint, large: Checkpoint
) -> None:
    daemon = start_daemon("--memory-limit", "16MiB", "--allow", str(models), "--max-loads", "8")
    ask = Ask(daemon, nursery)
    clients = [ask(ANNE, "load", source=large[0], pause_after=0) for _ in range(6)]
    for client in clients:
        client.hear("paused")
    assert ask(ANNE, "load", source=small[0]).hear("failed")["error"] == "TooManyLoadsError"
    assert loads(ask, BERT, small)
