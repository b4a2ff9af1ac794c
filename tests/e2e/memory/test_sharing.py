"""Clients that load the same checkpoint at the same time: its bytes are read once."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ..support import (
    MIB,
    Checkpoints,
    DaemonProcess,
    Nursery,
    RawLoad,
    expected,
    same,
    wait_until,
)


class BytesRead:
    """What the daemon has read since this was made."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._before = daemon.read_bytes()

    def __call__(self) -> int:
        return self._daemon.read_bytes() - self._before


@pytest.mark.parametrize(("count", "what"), [(12, "full"), (32, "window")])
def test_processes_that_load_a_checkpoint_at_once_read_it_once(
    count: int, what: str, daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    path, tensors = write(f"{count}", count)
    read = BytesRead(daemon)
    clients = [
        nursery.start("load", socket_dir=daemon.socket_dir, source=path, pause_after=0) for _ in range(6)
    ]
    for client in clients:
        client.hear("paused")
    stages = daemon.status()["stages"]
    assert [(stage["full"], len(stage["holders"])) for stage in stages] == [(what == "full", 6)]
    for client in clients:
        client.go()
    for client in clients:
        assert client.hear("loaded")["found"] == expected(tensors)
    assert read() == count * MIB


@pytest.mark.parametrize("count", [12, 32])
def test_threads_that_load_a_checkpoint_at_once_read_it_once(
    count: int, daemon: DaemonProcess, write: Checkpoints
) -> None:
    path, tensors = write(f"{count}", count)
    read = BytesRead(daemon)
    together = threading.Barrier(4)
    problems: list[BaseException] = []

    def run() -> None:
        try:
            with daemon.client().load(path) as load:
                together.wait(30)
                same(load, tensors)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert read() == count * MIB


def test_loads_of_a_full_stage_that_is_being_consumed_join_it_at_any_time(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    path, tensors = write("m", 12)
    read = BytesRead(daemon)
    first = nursery.pause(daemon, path, after=7)
    same(daemon.client().load_state_dict(path).items(), tensors)
    first.go()
    assert first.hear("loaded")["found"] == expected(tensors)
    assert read() == 12 * MIB


def test_a_load_that_comes_after_a_window_was_recycled_reads_anew_and_gets_every_tensor(
    daemon: DaemonProcess, write: Checkpoints
) -> None:
    path, tensors = write("m", 32)
    read = BytesRead(daemon)
    with daemon.client().load(path, memory_limit="8MiB") as load:
        iterator = iter(load)
        found = [next(iterator) for _ in range(20)]
        same(daemon.client().load_state_dict(path, memory_limit="8MiB").items(), tensors)
        found += iterator
        same(found, tensors)
    assert read() == 64 * MIB


def test_a_member_of_a_window_that_dies_neither_holds_up_the_others_nor_makes_them_read_again(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    path, tensors = write("m", 32)
    read = BytesRead(daemon)
    clients = [
        nursery.start("load", socket_dir=daemon.socket_dir, source=path, pause_after=pause)
        for pause in (0, 0, 2)
    ]
    for client in clients:
        client.hear("paused")
    first, second, victim = clients
    first.go()
    victim.kill()
    second.go()
    for client in (first, second):
        assert client.hear("loaded")["found"] == expected(tensors)
    assert read() == 32 * MIB


def test_the_one_that_began_a_stage_may_die_and_the_others_go_on(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    for count in (12, 32):
        path, tensors = write(f"{count}", count)
        read = BytesRead(daemon)
        first = nursery.pause(daemon, path, after=0)
        second = nursery.pause(daemon, path, after=0)
        first.kill()
        second.go()
        assert second.hear("loaded")["found"] == expected(tensors)
        assert read() == count * MIB


def test_loads_that_wait_for_memory_share_the_stage_they_get(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    blocker, _ = write("blocker", 40)
    path, tensors = write("m", 12)
    with RawLoad(daemon, blocker) as holder:  # a window of all the memory
        holder.next("manifest")
        read = BytesRead(daemon)
        clients = [nursery.start("load", socket_dir=daemon.socket_dir, source=path) for _ in range(3)]

        def waiting() -> bool:
            loads = daemon.status()["loads"]
            return [load["state"] for load in loads].count("waiting") == 3

        wait_until(waiting, "three loads to wait")
        status = daemon.status()
        assert status["staging"]["waiting"] == 1
        assert {load["queue_place"] for load in status["loads"] if load["state"] == "waiting"} == {1}
        before = read()
    for client in clients:
        assert client.hear("loaded")["found"] == expected(tensors)
    assert read() - before == 12 * MIB


def test_a_part_of_a_checkpoint_that_is_being_loaded_whole_is_not_read_again(
    daemon: DaemonProcess, write: Checkpoints
) -> None:
    path, tensors = write("m", 12)
    read = BytesRead(daemon)
    names = ["layer.10.weight", "layer.3.weight"]
    with daemon.client().load(path) as whole:
        wanted = daemon.client().load_state_dict(path, tensors=names)
        same(whole, tensors)
    same(wanted.items(), {name: tensors[name] for name in names})
    assert read() == 12 * MIB
    del wanted


def test_different_parts_that_are_loaded_at_once_come_out_right(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    path, tensors = write("m", 32)
    parts: list[dict[str, Any]] = [
        {name: tensors[name] for name in sorted(tensors)[start::3]} for start in range(3)
    ]
    clients = [
        nursery.start(
            "load", socket_dir=daemon.socket_dir, source=path, tensors=sorted(part), memory_limit="4MiB"
        )
        for part in parts
    ]
    for client, part in zip(clients, parts, strict=True):
        assert client.hear("loaded")["found"] == expected(part)
