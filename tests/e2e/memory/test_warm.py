"""What stays in the staging buffer after its loads: when it is served, and when it has to go."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.client.cli import commands as cli
from penstock.client.ring.rpc import Session
from penstock.v1 import streamer_pb2 as pb

from ..support import (
    MIB,
    Checkpoint,
    Checkpoints,
    DaemonProcess,
    Nursery,
    RawLoad,
    expected,
    random_tensors,
    running_daemon,
    same,
    wait_until,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def module_daemon() -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "16MiB", "--concurrency", "1", "--block-size", "64KiB") as daemon:
        yield daemon


@pytest.fixture
def daemon(module_daemon: DaemonProcess) -> Iterator[DaemonProcess]:
    """16 MiB of memory in 8 slabs, one slow reader; nothing staged before the test, idle after it."""
    evict_all(module_daemon)
    yield module_daemon
    module_daemon.wait_idle()
    with module_daemon.client() as client:
        client.evict()


def staged(daemon: DaemonProcess) -> set[str]:
    """Names of what is staged."""
    stages = daemon.status()["stages"]
    return {Path(source).name.removesuffix(".safetensors") for stage in stages for source in stage["sources"]}


# ---- served warm ---------------------------------------------------------------------------------


def test_another_process_s_second_load_reads_nothing_from_the_file(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    path, tensors = write("a", 12)
    first = nursery.start("load", socket_dir=daemon.socket_dir, source=path)
    assert first.hear("loaded")["found"] == expected(tensors)
    first.wait()
    daemon.wait_idle()
    assert daemon.status()["staging"]["warm_bytes"] >= 12 * MIB
    before, system_before = daemon.read_bytes(), bytes_read_by_system(daemon)
    second = nursery.start("load", socket_dir=daemon.socket_dir, source=path)
    assert second.hear("loaded")["found"] == expected(tensors)
    assert daemon.read_bytes() == before
    assert bytes_read_by_system(daemon) - system_before < MIB // 4


def bytes_read_by_system(daemon: DaemonProcess) -> int:
    """By the kernel's count: every read, from whatever file."""
    for line in Path(f"/proc/{daemon.process.pid}/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("no rchar")


def test_what_became_of_the_file_decides_whether_it_is_read_again(
    daemon: DaemonProcess, write: Checkpoints, tmp_path: Path
) -> None:
    path, tensors = write("a", 6)
    held = daemon.client().load_state_dict(path)
    before = daemon.read_bytes()
    load_and_compare(daemon, path, tensors)
    assert daemon.read_bytes() == before
    os.utime(path)
    load_and_compare(daemon, path, tensors)
    assert daemon.read_bytes() == before + 6 * MIB
    replacement, changed = write("b", 6)
    replacement.rename(path)
    load_and_compare(daemon, path, changed)
    assert daemon.read_bytes() == before + 12 * MIB
    same(held.items(), tensors)
    del held


def load_and_compare(daemon: DaemonProcess, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    same(daemon.client().load_state_dict(path).items(), tensors)


def test_any_part_of_a_warm_directory_is_served_without_reading(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    """One of its files, two in another order, one tensor."""
    parts = []
    (tmp_path / "model").mkdir()
    for number in range(3):
        tensors = {f"{number}.{name}": tensor for name, tensor in random_tensors(3, MIB // 4).items()}
        parts.append((write_checkpoint(tmp_path / "model" / f"{number}.safetensors", tensors), tensors))
    everything = {name: tensor for _, tensors in parts for name, tensor in tensors.items()}
    load_and_compare(daemon, tmp_path / "model", everything)
    before = daemon.read_bytes()
    load_and_compare(daemon, parts[1][0], parts[1][1])
    swapped = daemon.client().load_state_dict([parts[2][0], parts[0][0]])
    assert list(swapped) == [*sorted(parts[2][1]), *sorted(parts[0][1])]
    same(swapped.items(), {**parts[2][1], **parts[0][1]})
    del swapped
    one = daemon.client().load_state_dict(tmp_path / "model", tensors=["1.layer.2.weight"])
    same(one.items(), {"1.layer.2.weight": everything["1.layer.2.weight"]})
    assert daemon.read_bytes() == before


def test_more_than_what_is_staged_is_read(daemon: DaemonProcess, write: Checkpoints) -> None:
    path, tensors = write("a", 6)
    names = ["layer.0.weight", "layer.4.weight"]
    same(
        daemon.client().load_state_dict(path, tensors=names).items(), {name: tensors[name] for name in names}
    )
    before = daemon.read_bytes()
    with daemon.client().load(path) as load:
        same(load, tensors)
    assert not load.stats.cache_hit
    assert daemon.read_bytes() == before + 6 * MIB


def test_with_the_minimal_limit_nothing_stays(nursery: Nursery, write: Checkpoints) -> None:
    path, tensors = write("a", 1)
    with running_daemon("--memory-limit", "0") as daemon:
        load_and_compare(daemon, path, tensors)
        daemon.wait_idle()
        assert daemon.status()["stages"] == []


# ---- never served as whole -----------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Checkpoint:
    """14 MiB in 28 files, each a segment."""
    everything = {}
    (tmp_path / "sharded").mkdir()
    for number in range(28):
        tensors = {f"{number:02}.{name}": t for name, t in random_tensors(2, MIB // 16, seed=number).items()}
        write_checkpoint(tmp_path / "sharded" / f"{number:02}.safetensors", tensors)
        everything.update(tensors)
    return tmp_path / "sharded", everything


def leave_partial(daemon: DaemonProcess, path: Path) -> dict[str, Any]:
    """Cancels loads until one left a part of the checkpoint behind; its stage, which may get one more segment
    from a read that is not over."""
    while True:
        with daemon.client().load(path) as load:
            assert not load.stats.cache_hit
        daemon.wait_idle()
        (stage,) = daemon.status()["stages"]
        if 0 < stage["ready_bytes"] < stage["total_bytes"]:
            return dict(stage)
        evict_all(daemon)


def evict_all(daemon: DaemonProcess) -> None:
    """Also what a read is not yet over of."""
    daemon.client().evict()
    wait_until(lambda: not daemon.status()["stages"], "nothing to be staged")


def test_a_cancelled_load_is_gone_on_with_from_what_is_there(
    daemon: DaemonProcess, sharded: Checkpoint
) -> None:
    path, tensors = sharded
    left = leave_partial(daemon, path)
    with daemon.client().load(path) as load:
        assert not load.stats.cache_hit
        same(load, tensors)
    assert load.stats.read_bytes <= left["total_bytes"] - left["ready_bytes"]
    (stage,) = daemon.status()["stages"]
    assert (stage["id"], stage["read_bytes"]) == (left["id"], left["total_bytes"])
    with daemon.client().load(path) as load:
        same(load, tensors)
    assert load.stats.cache_hit


def test_a_part_of_a_cancelled_load_is_complete_only_with_the_rest(
    daemon: DaemonProcess, sharded: Checkpoint
) -> None:
    path, tensors = sharded
    leave_partial(daemon, path)
    name = max(tensors)  # in the last file, which is not there
    same(daemon.client().load_state_dict(path, tensors=[name]).items(), {name: tensors[name]})


def test_a_pin_that_was_cancelled_keeps_no_part(daemon: DaemonProcess, sharded: Checkpoint) -> None:
    request = pb.PrefetchRequest(sources=[str(sharded[0])], pin=True)
    ready = total = 0
    while not 0 < ready < total:  # until it was cancelled in the middle
        evict_all(daemon)
        with Session(daemon.socket_dir) as session:
            answers = session.service.Prefetch(iter([request]), metadata=session.metadata)
            next(answers)
            answers.cancel()
        daemon.wait_idle()
        for stage in daemon.status()["stages"]:  # none, if it was cancelled before it began
            ready, total = stage["ready_bytes"], stage["total_bytes"]
    assert not stage["pinned"]


def test_a_load_that_failed_leaves_nothing_that_is_served(daemon: DaemonProcess, sharded: Checkpoint) -> None:
    """A file shrinks while it is read, after its header was."""
    path, tensors = sharded
    victim = path / "27.safetensors"
    whole = victim.read_bytes()
    with RawLoad(daemon, path, list_tensors=True) as load:
        load.next("listing")
        os.truncate(victim, len(whole) - 4096)
        load.select(sorted(tensors))
        with pytest.raises(Exception, match="changed while it was read"):
            load.finish()
    victim.write_bytes(whole)
    daemon.wait_idle()
    assert daemon.status()["stages"] == []
    load_and_compare(daemon, path, tensors)


# ---- what goes, and what stays -------------------------------------------------------------------


def test_the_least_recently_used_idle_checkpoint_goes_first(
    daemon: DaemonProcess, write: Checkpoints
) -> None:
    for name in ("a", "b", "a", "c"):  # three slabs each; there are eight
        load_and_compare(daemon, *write(name))
    assert staged(daemon) == {"a", "c"}
    for name in ("a", "d"):
        load_and_compare(daemon, *write(name))
    assert staged(daemon) == {"a", "d"}
    assert daemon.status()["staging"]["peak_bytes"] <= 16 * MIB


def test_no_more_goes_than_has_to(daemon: DaemonProcess, write: Checkpoints) -> None:
    for name, count in (("a", 3), ("b", 3), ("c", 3), ("d", 3)):  # two slabs each
        load_and_compare(daemon, *write(name, count))
    assert staged(daemon) == {"a", "b", "c", "d"}
    load_and_compare(daemon, *write("e", 1))  # one slab
    assert staged(daemon) == {"b", "c", "d", "e"}


def test_what_is_pinned_stays_whatever_else_needs_the_memory(
    daemon: DaemonProcess, write: Checkpoints
) -> None:
    path, tensors = write("pinned", 5)
    with daemon.client() as client:
        client.prefetch(path, pin=True)
        for name in "bcdb":
            load_and_compare(daemon, *write(name))
        load_and_compare(daemon, *write("large", 40))  # through a window of what is left
        assert "pinned" in staged(daemon)
        before = daemon.read_bytes()
        load_and_compare(daemon, path, tensors)
        assert daemon.read_bytes() == before
        client.evict(path)
    for name in "bcd":
        load_and_compare(daemon, *write(name))
    assert "pinned" not in staged(daemon)


def test_a_pin_ends_when_a_load_finds_the_checkpoint_changed(
    daemon: DaemonProcess, write: Checkpoints
) -> None:
    path, _ = write("pinned", 5)
    daemon.client().prefetch(path, pin=True)
    replacement, changed = write("other", 5)
    replacement.rename(path)
    load_and_compare(daemon, path, changed)
    daemon.wait_idle()
    (stage,) = daemon.status()["stages"]
    assert not stage["pinned"]
    told = [line for line in daemon.log().splitlines() if "changed in storage" in line]
    (line,) = [line for line in told if f"source={path} " in line]  # others are of other tests
    assert "pinned=True" in line
    before = daemon.read_bytes()
    load_and_compare(daemon, path, changed)
    assert daemon.read_bytes() == before


def test_what_is_held_stays_whatever_else_needs_the_memory(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    held = write("held", 5)
    holder = nursery.hold(daemon, held)
    for name in "bcdb":
        load_and_compare(daemon, *write(name))
    load_and_compare(daemon, *write("large", 40))
    holder.go()
    assert holder.hear("holds")["found"] == expected(held[1])
    assert "held" in staged(daemon)


def test_evict_says_what_it_freed_and_what_is_still_in_use(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    """What is in use is given back when its last client lets go."""
    held, idle = write("held", 5), write("idle", 3)
    holder = nursery.hold(daemon, held)
    load_and_compare(daemon, *idle)
    wait_until(lambda: daemon.status()["staging"]["warm_bytes"], "the idle one to be idle")
    with daemon.client() as client:
        nothing = client.evict(held[0].with_name("other.safetensors"))
        assert (nothing.freed_bytes, nothing.leased_bytes) == (0, 0)
        one = client.evict(idle[0])
        assert (one.freed_bytes, one.leased_bytes) == (4 * MIB, 0)
        other = client.evict(held[0])
        assert (other.freed_bytes, other.leased_bytes) == (0, 6 * MIB)
    assert staged(daemon) == {"held"}
    holder.kill()
    wait_until(lambda: not staged(daemon), "the memory to be given back")


def test_evict_without_a_source_takes_what_is_idle_and_nothing_else(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    with daemon.client() as client:
        client.prefetch(write("pinned", 3)[0], pin=True)
        holder = nursery.hold(daemon, write("held", 3))
        load_and_compare(daemon, *write("idle", 3))
        wait_until(lambda: daemon.status()["staging"]["warm_bytes"] == 8 * MIB, "the load to be idle")
        evicted = client.evict()
    assert (evicted.freed_bytes, evicted.leased_bytes) == (8 * MIB, 0)
    assert staged(daemon) == {"held"}
    holder.kill()
    wait_until(lambda: daemon.status()["staging"]["warm_bytes"] == 4 * MIB, "the lease to end")


@pytest.mark.parametrize("pinned_as", ["directory", "one of them", "uri"])
def test_a_pin_is_taken_back_under_the_name_it_was_made_under(
    daemon: DaemonProcess, tmp_path: Path, write: Checkpoints, pinned_as: str
) -> None:
    """Whatever the checkpoint that serves it was staged as."""
    paths = [write("a", 2)[0], write("b", 2, prefix="b.")[0]]
    name = {"directory": str(tmp_path), "one of them": str(paths[0]), "uri": f"file://{tmp_path}/"}[pinned_as]
    with daemon.client() as client:
        with client.load(paths) as load:
            assert dict(load)
        gc.collect()
        client.prefetch(name, pin=True)
        stages = daemon.status()["stages"]
        assert [stage["pinned"] for stage in stages] == [True]
        assert client.evict(name if pinned_as != "uri" else tmp_path).freed_bytes >= 4 * MIB
        assert staged(daemon) == set()


def test_a_pin_that_is_held_is_unpinned_and_goes_when_it_is_let_go(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    path, tensors = write("pinned", 3)
    with daemon.client() as client:
        client.prefetch(path, pin=True)
        holder = nursery.hold(daemon, (path, tensors))
        assert [stage["pinned"] for stage in daemon.status()["stages"]] == [True]
        assert client.evict(path).leased_bytes == 4 * MIB
    assert [stage["pinned"] for stage in daemon.status()["stages"]] == [False]
    holder.kill()
    wait_until(lambda: not staged(daemon), "the memory to be given back")


def test_what_was_evicted_is_read_anew(daemon: DaemonProcess, write: Checkpoints) -> None:
    path, tensors = write("a", 5)
    load_and_compare(daemon, path, tensors)
    daemon.client().evict(path)
    before = daemon.read_bytes()
    load_and_compare(daemon, path, tensors)
    assert daemon.read_bytes() == before + 5 * MIB


def test_the_command_line_evicts(
    daemon: DaemonProcess, write: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    path, tensors = write("a")
    load_and_compare(daemon, path, tensors)
    daemon.wait_idle()
    assert cli.main(["evict", "--socket-dir", str(daemon.socket_dir), str(path)]) == 0
    assert capsys.readouterr().out == "freed 6.29 MB, in use 0 B\n"
    assert staged(daemon) == set()
    assert cli.main(["evict", "--socket-dir", str(daemon.socket_dir), str(path)]) == 1
    assert capsys.readouterr().err == (
        f"penstock: {path}: nothing is staged of it; see `penstock status` for what is, by its source\n"
    )
    assert cli.main(["evict", "--socket-dir", str(daemon.socket_dir)]) == 0
