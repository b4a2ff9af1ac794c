"""Who gets memory and readers, in which order, and what those are told who have to wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.client import errors

from ..conftest import StartDaemon
from ..support import (
    MIB,
    Checkpoints,
    DaemonProcess,
    Nursery,
    RawLoad,
    expected,
    running_daemon,
    same,
    wait_until,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("admission"))


@pytest.fixture
def raw(daemon: DaemonProcess) -> Iterator[Callable[..., RawLoad]]:
    loads: list[RawLoad] = []

    def start(path: Path, **fields: Any) -> RawLoad:
        loads.append(RawLoad(daemon, path, **fields))
        return loads[-1]

    yield start
    for load in loads:
        load.close()


def waiting(daemon: DaemonProcess) -> int:
    count: int = daemon.status()["staging"]["waiting"]
    return count


def test_those_who_wait_are_told_their_place_and_served_in_order(
    daemon: DaemonProcess, raw: Callable[..., RawLoad], write: Checkpoints
) -> None:
    """Each of them needs all the memory there is."""
    running = raw(write("running", 20)[0])
    running.next("manifest")
    queue = []
    for number in range(1, 4):
        queue.append(raw(write(f"queued{number}", 20)[0]))
        assert queue[-1].next("queued").place == number
    assert sorted(load["queue_place"] for load in daemon.status()["loads"]) == [0, 1, 2, 3]
    running.close()
    first, second, third = queue
    first.next("manifest")
    assert second.next("queued").place == 1
    assert third.next("queued").place == 2
    second.close()  # gives up waiting
    assert third.next("queued").place == 1
    first.close()
    third.next("manifest")
    assert waiting(daemon) == 0


def test_a_large_load_is_not_overtaken_by_small_ones(
    daemon: DaemonProcess, raw: Callable[..., RawLoad], write: Checkpoints
) -> None:
    """The small ones would fit beside the one that runs; a new one comes whenever one is done."""
    running = raw(write("running", 20)[0], memory_limit_bytes=8 * MIB)
    running.next("manifest")
    large = raw(write("large", 12)[0])
    assert large.next("queued").place == 1
    small = [raw(write(f"small{number}", 1)[0]) for number in range(3)]
    for number, load in enumerate(small):
        assert load.next("queued").place >= 2, number
    assert waiting(daemon) == 4
    running.close()
    assert large.next("manifest").full
    large.close()
    for load in small:
        assert load.next_but("queued").HasField("manifest")


def test_a_load_that_could_never_fit_is_refused_at_once_also_when_others_wait(
    daemon: DaemonProcess, raw: Callable[..., RawLoad], write: Checkpoints, tmp_path: Path
) -> None:
    huge = write_checkpoint(tmp_path / "huge.safetensors", {"huge": torch.zeros(5 * MIB)})
    raw(write("running", 20)[0]).next("manifest")
    raw(write("large", 12)[0]).next("queued")
    with pytest.raises(errors.MemoryLimitTooSmallError, match=r"'huge'.*20971520 bytes.*16777216 bytes"):
        daemon.client().load(huge)
    with pytest.raises(errors.MemoryLimitTooSmallError, match="this load's memory_limit"):
        daemon.client().load(write("large", 12)[0], memory_limit="512KiB")


def test_the_queue_timeout_of_the_daemon_fails_a_load_with_numbers_that_reach_the_client(
    start_daemon: StartDaemon, nursery: Nursery, write: Checkpoints
) -> None:
    daemon = start_daemon("--memory-limit", "16MiB", "--queue-timeout", "0.5")
    path, tensors = write("running", 20)
    running = nursery.pause(daemon, path, after=0)
    with pytest.raises(errors.StagingExhaustedError) as caught:
        daemon.client().load(write("large", 12)[0])
    message = str(caught.value)
    assert "for 14.7 MB of a buffer of 16.8 MB" in message
    assert "--queue-timeout" in message
    assert caught.value.details["reading_bytes"] == str(16 * MIB)
    assert caught.value.details["retryable"] == "true"
    running.go()
    assert running.hear("loaded")["found"] == expected(tensors)


def test_loads_at_a_time_are_bounded(start_daemon: StartDaemon, nursery: Nursery, write: Checkpoints) -> None:
    """Those that ended do not count, although their tensors are held."""
    daemon = start_daemon("--memory-limit", "16MiB", "--max-loads", "2", "--window-size", "4MiB")
    path, tensors = write("running", 20)
    running = [
        nursery.start("load", socket_dir=daemon.socket_dir, source=path, pause_after=0) for _ in range(2)
    ]
    for client in running:
        client.hear("paused")
    small = write("small0", 1)
    with pytest.raises(errors.TooManyLoadsError, match=r"2 loads.*--max-loads"):
        daemon.client().load(small[0])
    with pytest.raises(errors.TooManyLoadsError):
        daemon.client().prefetch(small[0])
    for client in running:
        client.go()
    for client in running:
        assert client.hear("loaded")["found"] == expected(tensors)
    held = [daemon.client().load_state_dict(small[0]) for _ in range(3)]
    for state in held:
        same(state.items(), small[1])
    held.clear()
    del state


def test_a_window_takes_no_more_than_it_is_told_and_leaves_the_rest_to_others(
    start_daemon: StartDaemon, write: Checkpoints
) -> None:
    daemon = start_daemon("--memory-limit", "16MiB", "--window-size", "6MiB")
    one, two = write("running", 20), write("queued1", 20)
    with RawLoad(daemon, one[0]) as first, RawLoad(daemon, two[0]) as second:
        for load in (first, second):
            manifest = load.next("manifest")
            assert (manifest.full, manifest.slab_count * manifest.slab_bytes) == (False, 6 * MIB)
        path, tensors = write("queued2", 20)
        same(daemon.client().load_state_dict(path).items(), tensors)


def test_a_window_smaller_than_every_tensor_takes_what_the_largest_needs(
    start_daemon: StartDaemon, write: Checkpoints
) -> None:
    daemon = start_daemon("--memory-limit", "16MiB", "--window-size", "4096")
    path, tensors = write("running", 20)
    with RawLoad(daemon, path) as load:
        assert load.next("manifest").slab_count == 1
    same(daemon.client().load_state_dict(path).items(), tensors)
    assert daemon.status()["staging"]["waiting"] == 0


def test_a_load_beside_leases_that_stay_streams_through_what_is_left(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    nursery.hold(daemon, write("large", 12))
    path, tensors = write("queued1", 20)
    same(daemon.client().load_state_dict(path).items(), tensors)
    path, tensors = write("medium", 10)  # would fit, were there no leases
    same(daemon.client().load_state_dict(path).items(), tensors)


def test_a_mixture_of_sizes_all_finish_within_the_limit(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    names = [("queued1", 20), ("small0", 1), ("large", 12), ("small1", 1), ("queued2", 20), ("medium", 10)]
    clients = [
        (nursery.start("load", socket_dir=daemon.socket_dir, source=path, memory_limit=limit), tensors)
        for limit in (None, "3MiB")
        for path, tensors in (write(*name) for name in names)
    ]
    for client, tensors in clients:
        assert client.hear("loaded")["found"] == expected(tensors)
    assert daemon.status()["staging"]["peak_bytes"] <= 16 * MIB


# ---- fairness ------------------------------------------------------------------------------------


def write_shards(top: Path, count: int) -> Path:
    """So many files, each a segment, of 2 MiB."""
    top.mkdir()
    for number in range(count):
        write_checkpoint(top / f"{number:03}.safetensors", {f"{number}": torch.zeros(MIB // 2)})
    return top


@pytest.fixture(scope="module")
def slow_daemon() -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "160MiB", "--concurrency", "1", "--block-size", "64KiB") as daemon:
        yield daemon


def progress(daemon: DaemonProcess) -> dict[str, tuple[int, int]]:
    """Bytes (ready, total) of every stage that has begun to read."""
    return {
        stage["sources"][0]: (stage["ready_bytes"], stage["total_bytes"])
        for stage in daemon.status()["stages"]
        if stage["total_bytes"]
    }


def test_of_two_equal_loads_neither_gets_more_than_its_share_while_both_run(
    slow_daemon: DaemonProcess, tmp_path: Path
) -> None:
    one, two = write_shards(tmp_path / "one", 32), write_shards(tmp_path / "two", 32)
    blocker = write_shards(tmp_path / "blocker", 60)  # leaves too little for either

    def shares() -> list[float]:
        """Part of the bytes read since both had begun that went to `one`, at every look after a quarter."""
        slow_daemon.client().evict()
        with RawLoad(slow_daemon, blocker) as running:
            running.next("manifest")
            with RawLoad(slow_daemon, one) as first, RawLoad(slow_daemon, two) as second:
                first.next("queued")
                second.next("queued")
                running.close()  # both start now, though not at the same moment
                found: list[float] = []
                begun: tuple[int, int] | None = None
                while True:
                    now = progress(slow_daemon)
                    (ready, total), (other_ready, _) = now.get(str(one), (0, 1)), now.get(str(two), (0, 1))
                    if total in (ready, other_ready):
                        return found
                    if begun is None and ready and other_ready:
                        begun = ready, other_ready
                    if begun is not None:
                        mine, theirs = ready - begun[0], other_ready - begun[1]
                        if mine + theirs > total // 2:
                            found.append(mine / (mine + theirs))

    looks = wait_until(shares, "a look while both run")
    assert all(0.4 <= share <= 0.6 for share in looks), looks


def test_a_small_load_beside_a_huge_one_does_not_wait_for_it(
    slow_daemon: DaemonProcess, tmp_path: Path
) -> None:
    huge, small = write_shards(tmp_path / "huge", 64), write_shards(tmp_path / "small", 2)

    def small_was_first() -> bool:
        slow_daemon.client().evict()
        with RawLoad(slow_daemon, huge) as running:
            running.next("manifest")
            running.next("segment_ready")
            with RawLoad(slow_daemon, small) as beside:
                beside.finish()
                ready, total = progress(slow_daemon)[str(huge)]
                return ready < total

    wait_until(small_was_first, "the small load to be done while the huge one runs")
