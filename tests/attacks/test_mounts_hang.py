"""A mount that does not answer costs the loads from it, and nobody else: not other users, other mounts,
health, nor the memory that its reads do not write into."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from penstock.client import errors
from penstock.client.cli.status_text import show

from ..e2e.programs import await_go, say
from ..e2e.support import (
    Checkpoints,
    Nursery,
    RawLoad,
    random_tensors,
    same,
    wait_until,
    write_checkpoint,
)
from .conftest import StartTarget
from .fuse import FuseFileSystem, mounted
from .outcomes import assert_loads, outcomes_of
from .support import TargetDaemon

MIB = 1 << 20
STALL_SECONDS = "1"
TENSORS = random_tensors(24, MIB // 4)
FLAGS = ("--stall-timeout", STALL_SECONDS, "--block-size", "256KiB", "--concurrency", "4", "--allow", "/")
ALICE, BOB = 54321, 54322


@pytest.fixture
def daemon(start_target: StartTarget) -> TargetDaemon:
    return start_target(*FLAGS)


@pytest.fixture
def system(daemon: TargetDaemon, tmp_path: Path) -> Iterator[FuseFileSystem]:
    """Unmounted before the daemon has to be idle."""
    content = safetensors.torch.save(TENSORS)
    index = b'{"weight_map": {}}'
    for parent in (tmp_path, *tmp_path.parents):
        if parent.owner() == tmp_path.owner() and parent != Path("/") and not parent.samefile("/tmp"):
            parent.chmod(0o755)
    files = {"m.safetensors": content, "other.safetensors": content, "x.safetensors.index.json": index}
    with mounted(tmp_path / "hung", files) as system:
        yield system


class Loading:
    """A load on a thread that may hang."""

    def __init__(self, daemon: TargetDaemon, source: Path | list[Path], **options: Any) -> None:
        self.error: Exception | None = None
        self.found: dict[str, Any] = {}
        self._arguments = daemon, source, options
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        daemon, source, options = self._arguments
        try:
            with daemon.client() as client, client.load(source, **options) as load:
                self.found = dict(load)
        except Exception as error:
            self.error = error

    def wait(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


def hung_mounts(daemon: TargetDaemon) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = daemon.status().get("hung_mounts", [])
    return mounts


def gauges(daemon: TargetDaemon) -> dict[str, float]:
    lines = daemon.http("/metrics")[1].decode().splitlines()
    return {name: float(value) for name, value in (line.split(" ") for line in lines if line[0] != "#")}


def assert_lives(daemon: TargetDaemon) -> None:
    """Though mounts hang. A busy machine may not let it run for the second after which it would be known to
    hang, and then it lives again: one that hangs because of a mount would do so until that is released."""

    def lives() -> bool:
        return all(daemon.http(path) == (200, b"ok\n") for path in ("/healthz", "/readyz"))

    wait_until(lives, "the daemon to say that it lives")


OPERATIONS = ["open", "getattr", "read"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_loads_from_a_mount_that_hangs_stop_no_others_and_leave_the_daemon_live(
    operation: str, daemon: TargetDaemon, system: FuseFileSystem, write: Checkpoints
) -> None:
    """More loads than there are threads of any kind, by root, which has no share to keep to."""
    path, tensors = write("elsewhere", 8)
    system.hang(operation)
    loads = [Loading(daemon, system.mount_point / "m.safetensors") for _ in range(40)]
    wait_until(lambda: hung_mounts(daemon), "the hang to be told")
    for _ in range(3):
        with daemon.client() as client:
            same(client.load_state_dict(path).items(), tensors)
            client.evict([path])
    assert_lives(daemon)
    (hung,) = hung_mounts(daemon)
    assert hung["mount_point"] == str(system.mount_point)
    assert hung["threads"] > 0
    assert f"hangs     {system.mount_point}: " in show(daemon.status())
    assert hung["seconds"] > 1
    assert gauges(daemon)["penstock_hung_mounts"] == 1
    assert gauges(daemon)["penstock_hung_threads"] > 0
    wait_until(lambda: gauges(daemon)['penstock_stalled{part="readers"}'] == 0, "the readers to go on")
    wait_until(lambda: f" mount hangs mount={system.mount_point} " in daemon.log(), "the log to tell")
    system.release()
    for load in loads:
        load.wait()
        assert load.error is None
        same(load.found.items(), TENSORS)
        load.found.clear()
    wait_until(lambda: not hung_mounts(daemon), "the recovery to be noticed")
    wait_until(lambda: " mount answers again " in daemon.log(), "the log to tell")


def test_a_directory_that_hangs_stops_no_other_load(
    daemon: TargetDaemon, system: FuseFileSystem, write: Checkpoints
) -> None:
    path, tensors = write("elsewhere", 8)
    system.hang("readdir")
    loads = [Loading(daemon, system.mount_point) for _ in range(40)]
    wait_until(lambda: hung_mounts(daemon), "the hang to be told")
    same(daemon.client().load_state_dict(path).items(), tensors)
    assert_lives(daemon)
    system.release()
    for load in loads:
        load.wait()
        assert isinstance(load.error, errors.CheckpointInvalidError)  # its index names no files


def test_loads_from_several_mounts_of_which_one_hangs_stop_no_load_from_another(
    daemon: TargetDaemon, system: FuseFileSystem, write: Checkpoints
) -> None:
    path, tensors = write("elsewhere", 8)
    system.hang("readdir")
    loads = [Loading(daemon, [path, system.mount_point]) for _ in range(40)]
    wait_until(lambda: hung_mounts(daemon), "the hang to be told")
    same(daemon.client().load_state_dict(path).items(), tensors)
    system.release()
    for load in loads:
        load.wait()
        assert isinstance(load.error, errors.CheckpointInvalidError)


@pytest.mark.parametrize("operation", ["read", "getattr"])
def test_a_mount_that_begins_to_hang_in_mid_stream_stops_no_other_load(
    operation: str, daemon: TargetDaemon, system: FuseFileSystem, write: Checkpoints
) -> None:
    """Through windows, with readers in the middle of what they do: `getattr` hangs where a segment is
    checked."""
    path, tensors = write("elsewhere", 8)
    with daemon.client().load(system.mount_point / "m.safetensors", memory_limit="4MiB") as load:
        iterator = iter(load)
        found = [next(iterator)]
        system.hang(operation)
        taken = threading.Thread(target=lambda: found.extend(iterator))
        taken.start()
        wait_until(lambda: hung_mounts(daemon), "the hang to be told")
        same(daemon.client().load_state_dict(path).items(), tensors)
        assert_lives(daemon)
        system.release()
        taken.join(60)
        assert not taken.is_alive()
    same(found, TENSORS)


def test_closing_a_file_that_hangs_holds_up_nobody(
    daemon: TargetDaemon, system: FuseFileSystem, write: Checkpoints
) -> None:
    """FUSE asks its server when a file is closed; the event loop must not wait for that."""
    path, tensors = write("elsewhere", 8)
    with daemon.client() as client:
        with client.load(system.mount_point / "m.safetensors", memory_limit="4MiB") as load:
            iterator = iter(load)
            found = [next(iterator)]
            system.hang("flush")
            same([*found, *iterator], TENSORS)
        wait_until(lambda: system.kept, "a file to be closed")
        same(client.load_state_dict(path).items(), tensors)
    assert_lives(daemon)
    wait_until(lambda: daemon.http_status()["health"]["live"], "status to say that it lives")
    system.release()
    wait_until(
        lambda: not [name for name in daemon.fds() if name.startswith(str(system.mount_point))],
        "its files to be closed",
    )


def write_from(source: str, target: str) -> None:
    """Writes one file over another by one call, which takes as long as the first one is not read."""
    size_bytes = os.path.getsize(source)
    with open(source, "rb") as file, mmap.mmap(file.fileno(), size_bytes, prot=mmap.PROT_READ) as content:
        say("writing")
        with open(target, "r+b", buffering=0) as over:
            assert over.write(content) == size_bytes
        say("written")
        await_go()


def test_what_was_loaded_during_one_write_is_not_loaded_again_after_it(
    daemon: TargetDaemon, attackers: Nursery, tmp_path: Path
) -> None:
    """The file's times are those of the beginning of the write, when it ends as when the load came."""
    new = random_tensors(8, MIB // 4, seed=5)
    path = write_checkpoint(tmp_path / "m.safetensors", random_tensors(8, MIB // 4, seed=4))
    half = path.stat().st_size // 2 // MIB * MIB
    with mounted(tmp_path / "slow", {"new": safetensors.torch.save(new)}) as system:
        before = path.stat()
        system.hang("read", beyond=half)
        writer = attackers.start(write_from, source=system.mount_point / "new", target=path)
        writer.hear("writing")
        wait_until(lambda: system.kept, "the write to stand still")
        during = path.stat()
        assert during.st_mtime_ns != before.st_mtime_ns
        with daemon.client() as client:
            client.load_state_dict(path)
            system.release()
            writer.hear("written")
            assert path.stat().st_mtime_ns == during.st_mtime_ns
            assert path.stat().st_ctime_ns == during.st_ctime_ns
            same(client.load_state_dict(path).items(), new)


def test_files_that_do_not_close_count_as_their_user_s_until_they_do(
    start_target: StartTarget, attackers: Nursery, tmp_path: Path, write: Checkpoints
) -> None:
    """Or a user whose file system does not let a file be closed would take all descriptors, load by load."""
    elsewhere = write("elsewhere", 3)
    daemon = start_target(*FLAGS, open_files=2048)
    before = daemon.usage()
    files = {f"{n}.safetensors": safetensors.torch.save({f"t{n}": torch.zeros(8)}) for n in range(60)}
    with mounted(tmp_path / "open", files) as system:
        system.hang("flush")
        outcomes = outcomes_of(attackers, daemon, ALICE, system.mount_point, 30)
        assert not outcomes[0].error, outcomes[0]
        assert outcomes[-1].error == "TooManyLoadsError", outcomes[-1]
        assert "60 files need 120 descriptors, and " in outcomes[-1].message
        assert daemon.usage().descriptors < 2048 // 2
        assert_loads(attackers, daemon, BOB, elsewhere)
        system.release()
        daemon.assert_comes_back(before)
        (again,) = outcomes_of(attackers, daemon, ALICE, system.mount_point)
        assert again.found == outcomes[0].found


def test_another_user_s_hung_loads_leave_a_user_its_share(
    daemon: TargetDaemon, system: FuseFileSystem, attackers: Nursery, write: Checkpoints
) -> None:
    path, tensors = write("elsewhere", 8)
    system.hang("read")
    for name in ("m", "other") * 6:
        attackers.start(
            "load", uid=ALICE, socket_dir=daemon.socket_dir, source=system.mount_point / f"{name}.safetensors"
        )
    wait_until(lambda: hung_mounts(daemon), "the hang to be told")
    bob = attackers.start("hold", uid=BOB, socket_dir=daemon.socket_dir, source=path)
    found = bob.hear("holds")["found"]
    assert sorted(name for name, _ in found) == sorted(tensors)
    bob.end()
    system.release()


def test_memory_that_hung_reads_do_not_write_into_serves_others_when_the_client_is_gone(
    daemon: TargetDaemon, system: FuseFileSystem, write: Checkpoints
) -> None:
    """64 MiB in 32 slabs: all but those of four blocks come back."""
    path, tensors = write("elsewhere", 52)
    content_bytes = sum(tensor.nbytes for tensor in TENSORS.values())
    system.hang("read", beyond=2 * MIB)
    load = RawLoad(daemon, system.mount_point / "m.safetensors")
    load.next("manifest")
    wait_until(lambda: [hung["threads"] for hung in hung_mounts(daemon)] == [4], "the readers to hang")
    load.close()
    wait_until(lambda: not daemon.status()["loads"], "the load to end")
    with daemon.client() as client:
        same(client.load_state_dict(path).items(), tensors)
        staging = daemon.status()["staging"]
        assert 0 < staging["stuck_bytes"] < content_bytes
        assert staging["stuck_bytes"] <= 4 * 2 * staging["slab_bytes"]
        assert staging["reading_bytes"] >= staging["stuck_bytes"]
        wait_until(
            lambda: gauges(daemon)["penstock_stuck_bytes"] == staging["stuck_bytes"],
            "the metrics to tell of it",
        )
    system.release()
    wait_until(lambda: not daemon.status()["staging"]["stuck_bytes"], "the stuck memory to come back")


def test_an_operator_evicts_what_hangs(
    daemon: TargetDaemon, system: FuseFileSystem, write: Checkpoints
) -> None:
    source = system.mount_point / "m.safetensors"
    system.hang("read", beyond=2 * MIB)
    load = RawLoad(daemon, source)
    load.next("manifest")
    wait_until(lambda: [hung["threads"] for hung in hung_mounts(daemon)] == [4], "the readers to hang")
    load.close()
    wait_until(lambda: not daemon.status()["loads"], "the load to end")
    with daemon.client() as client:
        evicted = client.evict([source])
        assert evicted.freed_bytes > 0
        assert evicted.leased_bytes == daemon.status()["staging"]["stuck_bytes"] > 0
    assert not daemon.status()["stages"]
    system.release()
    wait_until(lambda: not daemon.status()["staging"]["stuck_bytes"], "the stuck memory to come back")
