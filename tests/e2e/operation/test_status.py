"""What status tells of a daemon at work: over gRPC, over HTTP, and by `penstock status`."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.client import StreamerClient, errors
from penstock.client.cli import commands as cli
from penstock.client.cli.status_text import show
from penstock.server.config.settings import Config
from penstock.server.sources.stores import FLAGS

from ..conftest import StartDaemon
from ..support import (
    Nursery,
    RawLoad,
    process_figure,
    random_tensors,
    wait_until,
    write_checkpoint,
)

MIB = 1 << 20
ANNE, BERT = 12001, 12002
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    tmp_path.chmod(0o755)

    def write(name: str, count: int) -> Path:
        """A checkpoint of `count` MiB."""
        return write_checkpoint(tmp_path / f"{name}.safetensors", random_tensors(count, MIB // 4))

    return write


def test_a_load_says_how_far_it_is_and_what_it_waits_for(start_daemon: StartDaemon, write: Write) -> None:
    path, other = write("m", 16), write("other", 6)
    daemon = start_daemon("--memory-limit", "8MiB", "--window-size", "8MiB")
    with RawLoad(daemon, path, client_name="one") as first:
        manifest = first.next_but("queued")
        release = "its client to release what it has"
        wait_until(lambda: daemon.status()["loads"][0]["waits_for"] == release, "the window to be full")
        (load,) = daemon.status()["loads"]
        assert (load["kind"], load["state"]) == ("load", "streaming")
        assert (load["load_id"], load["total_bytes"]) == (manifest.manifest.load_id, 16 * MIB)
        assert 0 < load["delivered_bytes"] <= 8 * MIB
        (stage,) = daemon.status()["stages"]
        assert (stage["full"], stage["slab_count"], stage["source"]) == (False, 4, "file")
        assert stage["read_bytes"] >= load["delivered_bytes"]
        with RawLoad(daemon, other, client_name="two") as second:
            queued = second.next("queued")
            (_, load) = daemon.status()["loads"]
            assert (load["load_id"], load["state"], load["queue_place"]) == (queued.load_id, "waiting", 1)
            assert load["waits_for"] == "waiting for staging memory that other loads use"
            waited = load["waited_seconds"]
            wait_until(lambda: daemon.status()["loads"][1]["waited_seconds"] > waited, "the clock to go on")
            first.finish()
            first.close()
            second.finish()
    daemon.wait_idle()


def test_memory_adds_up_whoever_has_it(start_daemon: StartDaemon, write: Write) -> None:
    one, two = write("one", 3), write("two", 4)
    daemon = start_daemon("--memory-limit", "32MiB", "--concurrency", "3", "--object-concurrency", "2")
    with daemon.client() as client:
        client.prefetch(one, pin=True)
        state = client.load_state_dict(two)
        status = daemon.status()
        staging = status["staging"]
        by_state = {name: staging[f"{name}_bytes"] for name in ("free", "reading", "leased", "warm")}
        assert sum(by_state.values()) == staging["capacity_bytes"] == staging["limit_bytes"] == 32 * MIB
        assert by_state["leased"] == 6 * MIB
        assert by_state["warm"] == 4 * MIB
        assert [stage["capacity_bytes"] for stage in status["stages"]] == [4 * MIB, 6 * MIB]
        assert [stage["slab_count"] * staging["slab_bytes"] for stage in status["stages"]] == [
            4 * MIB,
            6 * MIB,
        ]
        assert [stage["pinned"] for stage in status["stages"]] == [True, False]
        assert [stage["uid"] for stage in status["stages"]] == [None, 0]
        assert staging["oldest_lease_seconds"] == pytest.approx(
            status["stages"][1]["holders"][0]["held_seconds"], abs=1
        )
        assert status["readers"]["threads"] == 3  # of files: no object store was used
        assert not staging["populating"]
        del state
    gc.collect()
    assert daemon.wait_idle()["staging"]["oldest_lease_seconds"] == 0


def test_a_store_has_reader_threads_from_its_first_use_on(start_daemon: StartDaemon, write: Write) -> None:
    daemon = start_daemon("--memory-limit", "16MiB", "--concurrency", "50", "--object-concurrency", "50")
    assert daemon.status()["readers"]["threads"] == 0
    assert process_figure(daemon.process.pid, "Threads") < 50
    with daemon.client() as client:
        client.load_state_dict(write("m", 1))
    assert daemon.status()["readers"]["threads"] == 50
    assert 50 < process_figure(daemon.process.pid, "Threads") < 100


def test_the_last_minutes_add_up_to_what_was_read_and_delivered(
    start_daemon: StartDaemon, write: Write
) -> None:
    path = write("m", 5)
    daemon = start_daemon("--memory-limit", "16MiB")
    with daemon.client() as client:
        for _ in range(3):
            client.load_state_dict(path)
            gc.collect()

    def sums() -> tuple[int, int]:
        throughput = daemon.status()["throughput"]
        assert len(throughput["read_bytes"]) == len(throughput["delivered_bytes"]) <= 300
        return sum(throughput["read_bytes"]), sum(throughput["delivered_bytes"])

    wait_until(lambda: sums() == (5 * MIB, 15 * MIB), "the next sample")
    assert daemon.status()["throughput"]["interval_seconds"] == 1


def test_failures_are_remembered_newest_first_and_no_more_than_fifty(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon("--memory-limit", "16MiB")
    with daemon.client() as client:
        for number in range(55):
            with pytest.raises(errors.CheckpointNotFoundError) as caught:
                client.load(tmp_path / f"{number}.safetensors")
        with pytest.raises(errors.CheckpointNotFoundError):
            client.prefetch(tmp_path / "last.safetensors")
        remembered = client.status()["errors"]
    assert len(remembered) == 50
    assert remembered[0]["sources"] == [str(tmp_path / "last.safetensors")]
    assert remembered[1]["load_id"] == caught.value.load_id
    assert {failure["reason"] for failure in remembered} == {"CHECKPOINT_NOT_FOUND"}
    assert all(str(tmp_path) in failure["message"] for failure in remembered)
    assert daemon.http_status()["errors"][0]["sources"] == remembered[0]["sources"]


def test_users_see_over_grpc_only_what_is_theirs(
    start_daemon: StartDaemon, nursery: Nursery, write: Write, tmp_path: Path
) -> None:
    write("m", 1)
    daemon = start_daemon("--memory-limit", "16MiB", "--allow", str(tmp_path))
    refused = nursery.start(
        "call",
        uid=BERT,
        socket_dir=daemon.socket_dir,
        method="load",
        source=str(tmp_path / "gone.safetensors"),
    )
    refused.wait()
    assert [failure["uid"] for failure in daemon.status()["errors"]] == [BERT]
    assert daemon.status()["configuration"]["allow"] == str(tmp_path)
    for uid, count in ((ANNE, 0), (BERT, 1)):
        asking = nursery.start("status", uid=uid, socket_dir=daemon.socket_dir)
        seen: dict[str, Any] = asking.hear("status")["status"]
        asking.wait()
        assert len(seen["errors"]) == count
        assert seen["configuration"] == {}


def test_the_table_names_what_is_there_and_steers_no_terminal(
    start_daemon: StartDaemon, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path, nasty = write("m", 2), write("\x1b[2J\nforged", 1)
    daemon = start_daemon("--memory-limit", "16MiB")
    with daemon.client() as client:
        client.prefetch(path, pin=True)
        with RawLoad(daemon, nasty, client_name="\x1b]0;owned\x07") as load:
            load.finish()
            with pytest.raises(errors.CheckpointNotFoundError):
                client.load("/no/such\x1b[31m/thing")
            assert cli.main(["status", "--socket-dir", str(daemon.socket_dir)]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    for words in (
        "ready",
        "limit 16.78 MB",
        "warm, pinned",
        "leased",
        "CHECKPOINT_NOT_FOUND",
        "/m.safetensors",
    ):
        assert words in out
    assert "?[2J?forged" in out
    daemon.wait_idle()


def test_watching_goes_on_when_the_daemon_comes_back(start_daemon: StartDaemon) -> None:
    first = start_daemon("--memory-limit", "16MiB")
    command = "import sys; from penstock.client.cli.commands import main; sys.exit(main(sys.argv[1:]))"
    arguments = ("status", "--watch", "--json", "--socket-dir", str(first.socket_dir))
    with subprocess.Popen(
        [sys.executable, "-c", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        assert json.loads(watching.stdout.readline())["pid"] == first.process.pid
        first.kill()
        assert watching.stderr.readline().startswith("penstock: ")
        second = start_daemon("--memory-limit", "16MiB")
        while json.loads(watching.stdout.readline())["pid"] != second.process.pid:
            pass
        watching.send_signal(signal.SIGINT)
        assert watching.wait(60) == 130


def test_every_value_of_the_configuration_is_in_status_and_the_log(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--memory-limit", "16MiB", "--object-block-size", "1MiB")
    told = daemon.http_status()["configuration"]
    shared = {field.name for field in dataclasses.fields(Config)} - {"store_options"}
    assert set(told) == shared | {option.field for store in FLAGS for option in store.options}
    assert (told["memory_limit"], told["object_block_bytes"], told["prefetch"]) == (
        str(16 * MIB),
        str(MIB),
        "",
    )
    (start,) = [line for line in daemon.log().splitlines() if " serving " in line]
    logged = {
        key: json.loads(value) if value.startswith('"') else value
        for key, value in re.findall(r' (\w+)=("(?:[^"\\]|\\.)*"|\S+)', start)
    }
    assert told.items() <= logged.items()


def test_the_sample_document_has_every_field_and_can_be_shown(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """What the tables are tested with is what a daemon says."""
    sample = json.loads((Path(__file__).parents[2] / "server/data/status.json").read_text())
    daemon = start_daemon("--memory-limit", "16MiB", "--warm-set", str(tmp_path / "none.yaml"))
    told = daemon.http_status()

    def fields(value: dict[str, Any]) -> dict[str, Any]:
        return {key: fields(inner) if isinstance(inner, dict) else 0 for key, inner in value.items()}

    assert fields(sample) == fields(told)
    shown = show(sample)
    assert "warm, pinned" in shown
    assert "30 files; " in shown
    assert "off: No space left on device" in shown
    assert "tier " not in show(told)
    assert "not in force: /etc/penstock/warm-set.yaml: line 9: pinned" in shown
    assert "does not fit" in shown
    assert "it needs 93.4 GB" in shown


def test_status_can_be_told_of_paths_that_are_no_utf_8(
    start_daemon: StartDaemon, socket_dir: Path, tmp_path: Path
) -> None:
    """Of the daemon's own directory and of its flags."""
    socket_dir.mkdir()
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe4"))
    directory.mkdir()
    home = Path(os.fsdecode(os.fsencode(socket_dir) + b"/\xe4"))
    # The last --socket-dir counts, so the log stays where it can be found.
    daemon = start_daemon("--memory-limit", "16MiB", "--socket-dir", str(home), "--allow", str(directory))
    with StreamerClient(home) as client:
        told = client.status()
    assert told["configuration"]["socket_dir"] == str(socket_dir / "?")
    assert told["configuration"]["allow"] == str(tmp_path / "?")
    assert json.loads(daemon.http("/status")[1])["configuration"] == told["configuration"]
    assert daemon.terminate() == 0
