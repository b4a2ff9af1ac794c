"""Clients and daemons that die, stall, are stopped or lose interest, at every stage of a load.

What must hold: a client that goes, no matter how, gives everything back and disturbs nobody; a daemon that
goes leaves nothing behind, and the tensors that clients hold stay as they are.
"""

from __future__ import annotations

import gc
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.client import StreamerClient, errors
from penstock.client.load import Load

from ..conftest import StartDaemon
from ..support import (
    MIB,
    Checkpoint,
    Checkpoints,
    DaemonProcess,
    Nursery,
    assert_no_shared_memory_but,
    expected,
    random_tensors,
    same,
    shared_memory,
    wait_until,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def small(checkpoints: Checkpoints) -> Checkpoint:
    """4 MiB in 4 tensors."""
    return checkpoints("small", 4)


@pytest.fixture(scope="module")
def large(checkpoints: Checkpoints) -> Checkpoint:
    """40 MiB in 40 tensors."""
    return checkpoints("large", 40)


@pytest.fixture(scope="module")
def other(checkpoints: Checkpoints) -> Checkpoint:
    """24 MiB in 24 tensors."""
    return checkpoints("other", 24)


@pytest.fixture(params=["small", "large"])
def either(request: pytest.FixtureRequest) -> Checkpoint:
    """One that is staged as a whole, and one that passes through a window."""
    checkpoint: Checkpoint = request.getfixturevalue(request.param)
    return checkpoint


VICTIMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "before it reads its token": ("connect_only", "", {}),
    "before it asks for anything": ("session_only", "", {}),
    "while it chooses tensors": ("choose_for_ever", "large", {}),
    "before it takes its slabs": ("leave_the_slabs", "large", {"memory_limit_bytes": 8 * MIB}),
    "after the manifest": ("load", "large", {"pause_after": 0, "memory_limit": 8 * MIB}),
    "in the middle of a window": ("load", "large", {"pause_after": 13, "memory_limit": 8 * MIB}),
    "with views of a window": ("load", "large", {"pause_after": 13, "memory_limit": 8 * MIB, "owned": False}),
    "in the middle of a full stage": ("load", "small", {"pause_after": 2}),
}


@pytest.mark.parametrize("stage", VICTIMS)
def test_a_client_killed_at_any_stage_costs_nobody_anything(
    stage: str,
    daemon: DaemonProcess,
    nursery: Nursery,
    small: Checkpoint,
    large: Checkpoint,
    other: Checkpoint,
) -> None:
    program, source, options = VICTIMS[stage]
    path, tensors = other
    with daemon.client().load(path, memory_limit="8MiB") as load:
        iterator = iter(load)
        found = [next(iterator)]
        if source:
            options = {**options, "source": {"small": small, "large": large}[source][0]}
        victim = nursery.start(program, socket_dir=daemon.socket_dir, **options)
        victim.hear("paused")
        victim.kill()
        found += iterator
        same(found, tensors)
    daemon.wait_idle()
    same(daemon.client().load_state_dict(path).items(), tensors)


def test_a_client_killed_while_it_waits_for_memory_leaves_the_queue(
    daemon: DaemonProcess, nursery: Nursery, large: Checkpoint, other: Checkpoint
) -> None:
    path, tensors = other
    with daemon.client().load(path) as load:  # a window of all the memory
        iterator = iter(load)
        found = [next(iterator)]
        victim = nursery.start("queue_up", socket_dir=daemon.socket_dir, source=large[0])
        victim.hear("paused")
        wait_until(lambda: daemon.status()["staging"]["waiting"] == 1, "the victim to queue")
        victim.kill()
        wait_until(lambda: daemon.status()["staging"]["waiting"] == 0, "its place to be given up")
        found += iterator
        same(found, tensors)


def test_a_client_killed_with_tensors_of_a_full_stage_gives_its_lease_back(
    daemon: DaemonProcess, nursery: Nursery, small: Checkpoint, other: Checkpoint
) -> None:
    holder = nursery.hold(daemon, small)
    assert daemon.leased_bytes() > 0
    holder.kill()
    daemon.wait_idle()
    same(daemon.client().load_state_dict(other[0]).items(), other[1])  # needs its memory


def test_a_client_killed_while_its_header_is_parsed_leaves_nothing_running(
    daemon: DaemonProcess, nursery: Nursery, tmp_path: Path, small: Checkpoint
) -> None:
    """40 MB of header take a second or so, in a process of their own."""
    deep = b'{"a":' * 8_000_000
    path = tmp_path / "deep.safetensors"
    path.write_bytes(len(deep).to_bytes(8, "little") + deep)
    victim = nursery.start("load", socket_dir=daemon.socket_dir, source=path)
    wait_until(
        lambda: (
            any(load["state"] == "resolving" for load in daemon.status()["loads"])
            or victim.exit_code() is not None
        ),
        "the victim to be resolved",
    )
    if victim.exit_code() is None:
        victim.kill()
    same(daemon.client().load_state_dict(small[0]).items(), small[1])
    wait_until(lambda: str(path) not in daemon.fds(), "the file to be closed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_mid_load_gives_everything_back(
    number: int, daemon: DaemonProcess, nursery: Nursery, either: Checkpoint
) -> None:
    client = nursery.start("iterate_until_interrupted", socket_dir=daemon.socket_dir, source=either[0])
    client.hear("paused")
    client.signal(number)
    code = client.wait()
    assert code == (130 if number == signal.SIGINT else -number)
    daemon.wait_idle()


def test_a_process_that_just_ends_gives_everything_back_and_ends_quietly(
    daemon: DaemonProcess, nursery: Nursery, either: Checkpoint
) -> None:
    client = nursery.start("exit_without_close", socket_dir=daemon.socket_dir, source=either[0])
    client.hear("exits")
    assert client.wait() == 0
    assert client.errors() == ""
    daemon.wait_idle()


def use(load: Load) -> None:
    with load:
        for _, tensor in load:
            tensor.fill_(1 // 0)


@pytest.mark.parametrize("how", ["break", "exception", "drop", "close"])
def test_leaving_a_load_early_gives_everything_back(
    how: str, daemon: DaemonProcess, either: Checkpoint
) -> None:
    load = daemon.client().load(either[0])
    if how == "break":
        for name, tensor in load:
            assert tensor.numel() > 0, name
            del tensor
            break
        load.close()
    elif how == "exception":
        with pytest.raises(ZeroDivisionError):
            use(load)
    elif how == "drop":
        next(iter(load))
        del load
    else:
        iterator = iter(load)
        next(iterator)
        load.close()
        with pytest.raises(errors.LoadClosedError):
            list(iterator)
    gc.collect()
    daemon.wait_idle()


def test_a_client_that_never_releases_does_not_hold_up_a_full_stage(
    start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    path, tensors = large
    daemon = start_daemon("--memory-limit", "64MiB")
    stalled = nursery.pause(daemon, path, after=0)
    stopped = nursery.pause(daemon, path, after=0)
    stopped.signal(signal.SIGSTOP)
    same(daemon.client().load_state_dict(path).items(), tensors)
    stalled.go()
    assert stalled.hear("loaded")["found"] == expected(tensors)


def test_a_client_that_stops_reading_costs_the_daemon_little_memory(
    start_daemon: StartDaemon, nursery: Nursery, tmp_path: Path
) -> None:
    """60,000 tensors make some 5 MB of messages."""
    names = {f"a.rather.long.name.of.a.tensor.{number:09d}": torch.ones(1) for number in range(60_000)}
    path = write_checkpoint(tmp_path / "many.safetensors", names)
    daemon = start_daemon("--memory-limit", "64MiB")
    assert len(daemon.client().load_state_dict(path)) == len(names)
    before = daemon.memory_kib("RssAnon")
    stalled = [nursery.start("leave_the_slabs", socket_dir=daemon.socket_dir, source=path) for _ in range(4)]
    for client in stalled:
        client.hear("paused")
        client.signal(signal.SIGSTOP)
    assert len(daemon.client().load_state_dict(path)) == len(names)
    assert daemon.memory_kib("RssAnon") < before + 32 * 1024
    for client in stalled:
        client.kill()
    daemon.wait_idle()


def test_two_loads_racing_for_memory_that_fits_one_both_finish(
    daemon: DaemonProcess, nursery: Nursery, large: Checkpoint, other: Checkpoint
) -> None:
    racers = [
        (nursery.start("load", socket_dir=daemon.socket_dir, source=path), tensors)
        for path, tensors in (large, other, large, other)
    ]
    for racer, tensors in racers:
        assert racer.hear("loaded")["found"] == expected(tensors)
    assert daemon.status()["staging"]["peak_bytes"] <= 16 * MIB


def test_threads_of_one_client_load_side_by_side(
    daemon: DaemonProcess, small: Checkpoint, large: Checkpoint, other: Checkpoint
) -> None:
    client = daemon.client()
    problems: list[BaseException] = []

    def run(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        try:
            for _ in range(3):
                same(client.load_state_dict(path, memory_limit="5MiB").items(), tensors)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=checkpoint) for checkpoint in (small, large, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


# ---- the daemon's death --------------------------------------------------------------------------


def test_a_daemon_killed_leaves_tensors_alive_and_nothing_else(
    start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    path, tensors = large
    before = shared_memory()
    daemon = start_daemon("--memory-limit", "64MiB")
    holder = nursery.hold(daemon, large)
    mine = daemon.client().load_state_dict(path)
    daemon.kill()
    holder.go()
    assert holder.hear("holds")["found"] == expected(tensors)
    same(mine.items(), tensors)
    assert_no_shared_memory_but(before)
    assert (daemon.socket_dir / "penstock.sock").exists()  # stale
    successor = start_daemon("--memory-limit", "64MiB")
    same(successor.client().load_state_dict(path).items(), tensors)
    holder.go()
    assert holder.hear("holds")["found"] == expected(tensors)


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("limit", ["8MiB", "64MiB"])
@pytest.mark.parametrize("pause_after", [0, 13])
def test_a_load_survives_the_daemon_and_goes_on_with_the_next(
    owned: bool, limit: str, pause_after: int, start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    path, tensors = large
    daemon = start_daemon("--memory-limit", limit)
    client = nursery.pause(daemon, path, after=pause_after, owned=owned)
    daemon.kill()
    client.go()
    start_daemon("--memory-limit", limit)
    assert client.hear("loaded")["found"] == expected(tensors)


def test_a_load_that_chose_by_predicate_survives_the_daemon(
    start_daemon: StartDaemon, large: Checkpoint
) -> None:
    path, tensors = large
    daemon = start_daemon("--memory-limit", "8MiB")
    wanted = {name: tensor for name, tensor in tensors.items() if "3" in name}
    with daemon.client().load(path, tensors=lambda name: "3" in name, memory_limit=0) as load:
        iterator = iter(load)
        found = [next(iterator), next(iterator)]
        daemon.kill()
        start_daemon("--memory-limit", "8MiB")
        found += iterator
    same(found, wanted)


def test_a_checkpoint_changed_while_the_daemon_was_away_is_not_resumed(
    start_daemon: StartDaemon, nursery: Nursery, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "m.safetensors", random_tensors(40, MIB // 4))
    daemon = start_daemon("--memory-limit", "8MiB")
    client = nursery.pause(daemon, path, after=3)
    daemon.kill()
    write_checkpoint(path, random_tensors(40, MIB // 4, seed=9))
    client.go()
    start_daemon("--memory-limit", "8MiB")
    assert client.hear("failed")["error"] == "CheckpointChangedError"


def test_a_load_whose_daemon_never_comes_back_says_so(start_daemon: StartDaemon, large: Checkpoint) -> None:
    daemon = start_daemon("--memory-limit", "8MiB")
    client = StreamerClient(daemon.socket_dir, reconnect_timeout=0.2)
    with client.load(large[0]) as load:
        iterator = iter(load)
        next(iterator)
        daemon.kill()
        with pytest.raises(errors.DaemonUnavailableError, match=str(daemon.socket_dir)):
            list(iterator)


# ---- stopping ------------------------------------------------------------------------------------


def test_sigterm_refuses_new_loads_and_lets_running_ones_finish(
    start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    path, tensors = large
    daemon = start_daemon("--memory-limit", "8MiB", "--grace", "60")
    client = nursery.pause(daemon, path, after=3)
    daemon.process.send_signal(signal.SIGTERM)
    wait_until(lambda: " draining " in daemon.log(), "the daemon to drain")
    with pytest.raises(errors.ShuttingDownError):
        daemon.client().load(path)
    assert daemon.status()["serving"] is False
    client.go()
    assert client.hear("loaded")["found"] == expected(tensors)
    assert daemon.process.wait(60) == 0
    assert not (daemon.socket_dir / "handoff.sock").exists()


@pytest.mark.parametrize("how", ["the grace ends", "a second SIGTERM"])
def test_a_load_cut_off_by_a_stop_goes_on_with_the_next_daemon(
    how: str, start_daemon: StartDaemon, nursery: Nursery, large: Checkpoint
) -> None:
    path, tensors = large
    grace = "0.2" if how == "the grace ends" else "600"
    daemon = start_daemon("--memory-limit", "8MiB", "--grace", grace)
    client = nursery.pause(daemon, path, after=3)
    daemon.process.send_signal(signal.SIGTERM)
    if how != "the grace ends":
        wait_until(lambda: " draining " in daemon.log(), "the daemon to drain")
        daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(60) == 0
    assert "loads cut off" in daemon.log()
    start_daemon("--memory-limit", "8MiB")
    client.go()
    assert client.hear("loaded")["found"] == expected(tensors)


def test_tensors_outlive_a_daemon_that_stopped(start_daemon: StartDaemon, large: Checkpoint) -> None:
    path, tensors = large
    daemon = start_daemon("--memory-limit", "64MiB")
    state = daemon.client().load_state_dict(path)
    assert daemon.terminate() == 0  # does not wait for leases
    same(state.items(), tensors)


def test_a_second_daemon_in_the_directory_is_refused_and_the_first_serves_on(
    daemon: DaemonProcess, small: Checkpoint, tmp_path: Path
) -> None:
    second = DaemonProcess(daemon.socket_dir, log_path=tmp_path / "second.log")
    assert second.process.wait(60) == 1
    assert second.log().splitlines() == [
        f"penstockd: --socket-dir: another penstockd serves {daemon.socket_dir}; stop it, or choose another"
    ]
    same(daemon.client().load_state_dict(small[0]).items(), small[1])
