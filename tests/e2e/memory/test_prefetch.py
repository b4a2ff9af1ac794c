"""Prefetch and pin: by client, by command line, by flag."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from penstock.client import Prefetched, errors
from penstock.client.cli import commands as cli
from penstock.client.ring.rpc import Session
from penstock.v1 import streamer_pb2 as pb

from ..conftest import StartDaemon
from ..support import (
    DEADLINE_SECONDS,
    MIB,
    Checkpoints,
    DaemonProcess,
    Nursery,
    RawLoad,
    expected,
    same,
    wait_until,
)


def pinned(daemon: DaemonProcess) -> list[tuple[str, str]]:
    """Name and state of what is pinned."""
    return [
        (Path(stage["sources"][0]).stem, stage["state"])
        for stage in daemon.status()["stages"]
        if stage["pinned"]
    ]


def health(daemon: DaemonProcess) -> str:
    """What gRPC's health service says of the daemon."""
    with grpc.insecure_channel(f"unix:{daemon.socket_dir / 'penstock.sock'}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answers = [
            stub.Check(health_pb2.HealthCheckRequest(service=name)).status
            for name in ("penstock.v1.StreamerService", "")
        ]
    return "/".join(map(health_pb2.HealthCheckResponse.ServingStatus.Name, answers))


# ---- client and command line ---------------------------------------------------------------------


def test_a_load_after_a_prefetch_reads_nothing(daemon: DaemonProcess, write: Checkpoints) -> None:
    path, tensors = write("m")
    before = daemon.read_bytes()
    assert daemon.client().prefetch(path) == Prefetched(5 * MIB, warm_bytes=0)
    assert daemon.read_bytes() - before == 5 * MIB
    assert daemon.client().prefetch(path) == Prefetched(5 * MIB, warm_bytes=5 * MIB)
    with daemon.client().load(path) as load:
        same(load, tensors)
    assert load.stats.cache_hit
    assert daemon.read_bytes() - before == 5 * MIB
    assert pinned(daemon) == []


def test_a_prefetch_tells_its_progress_and_ends_when_all_is_there(
    daemon: DaemonProcess, write: Checkpoints
) -> None:
    path, _ = write("m", 12)
    with Session(daemon.socket_dir) as session:
        request = pb.PrefetchRequest(sources=[str(path)])
        answers = list(session.service.Prefetch(iter([request]), metadata=session.metadata))
    assert [answer.done for answer in answers] == [False] * (len(answers) - 1) + [True]
    ready = [answer.ready_bytes for answer in answers]
    assert ready == sorted(ready)
    assert ready[-1] == 12 * MIB
    assert {answer.total_bytes for answer in answers} == {12 * MIB}


def test_a_prefetch_that_waits_for_memory_is_told_its_place(
    daemon: DaemonProcess, write: Checkpoints
) -> None:
    blocker, path = write("blocker", 40)[0], write("m")[0]
    with RawLoad(daemon, blocker) as holder, Session(daemon.socket_dir) as session:
        holder.next("manifest")
        request = pb.PrefetchRequest(sources=[str(path)])
        answers = session.service.Prefetch(iter([request]), metadata=session.metadata)
        assert next(answers).queued.place == 1
        holder.close()
        assert [answer.done for answer in answers][-1]


def test_a_prefetch_of_what_is_being_loaded_reads_nothing_more(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    path, tensors = write("m", 12)
    before = daemon.read_bytes()
    client = nursery.pause(daemon, path, after=0)
    assert daemon.client().prefetch(path).total_bytes == 12 * MIB
    client.go()
    assert client.hear("loaded")["found"] == expected(tensors)
    assert daemon.read_bytes() - before == 12 * MIB


def test_a_prefetch_of_what_streams_through_a_window_does_not_stop_it(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    path, tensors = write("m", 10)
    client = nursery.start(
        "load", socket_dir=daemon.socket_dir, source=path, pause_after=0, memory_limit="4MiB"
    )
    client.hear("paused")
    assert daemon.client().prefetch(path).total_bytes == 10 * MIB
    client.go()
    assert client.hear("loaded")["found"] == expected(tensors)
    with daemon.client().load(path) as load:
        same(load, tensors)
    assert load.stats.cache_hit


def test_what_does_not_fit_as_a_whole_is_refused_at_once(daemon: DaemonProcess, write: Checkpoints) -> None:
    path, _ = write("m", 20)
    with pytest.raises(errors.MemoryLimitTooSmallError, match=r"as a whole.*16777216"):
        daemon.client().prefetch(path)
    with pytest.raises(errors.CheckpointNotFoundError):
        daemon.client().prefetch(path.with_name("gone.safetensors"))


def test_a_prefetch_that_cannot_have_its_memory_does_not_hold_up_loads(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    """Pins and the tensors that clients hold may stay for ever."""
    daemon.client().prefetch(write("pinned", 10)[0], pin=True)
    path, tensors = write("other", 30)
    prefetching = nursery.start(
        "call", socket_dir=daemon.socket_dir, method="prefetch", source=write("m", 12)[0]
    )
    wait_until(lambda: daemon.status()["staging"]["waiting"], "the prefetch to wait")
    same(daemon.client().load_state_dict(path).items(), tensors)
    assert prefetching.exit_code() is None
    daemon.client().evict(path.with_name("pinned.safetensors"))
    prefetching.hear("returned")


def test_a_pin_whose_client_was_killed_before_it_was_done_does_not_stay(
    daemon: DaemonProcess, nursery: Nursery, write: Checkpoints
) -> None:
    blocker, path = write("blocker", 40)[0], write("m")[0]
    with RawLoad(daemon, blocker, memory_limit_bytes=14 * MIB) as holder:
        holder.next("manifest")
        client = nursery.start("call", socket_dir=daemon.socket_dir, method="prefetch", source=path, pin=True)
        wait_until(lambda: daemon.status()["staging"]["waiting"], "the prefetch to wait")
        client.kill()
        wait_until(lambda: not daemon.status()["staging"]["waiting"], "the prefetch to be gone")
    assert pinned(daemon) == []


def test_a_later_pin_of_what_is_staged_pins_it(daemon: DaemonProcess, write: Checkpoints) -> None:
    path, _ = write("m")
    daemon.client().load_state_dict(path)
    daemon.client().prefetch(path)
    assert pinned(daemon) == []
    daemon.client().prefetch(path, pin=True)
    daemon.wait_idle()
    assert pinned(daemon) == [("m", "warm")]
    daemon.client().prefetch(path)
    assert pinned(daemon) == [("m", "warm")]


def test_the_command_line_prefetches_and_pins(
    daemon: DaemonProcess, write: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write("m")
    command = ["prefetch", "--socket-dir", str(daemon.socket_dir), str(path)]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == "staged 5.24 MB\n"
    assert pinned(daemon) == []
    assert cli.main([*command, "--pin"]) == 0
    assert capsys.readouterr().out == "staged 5.24 MB (5.24 MB were there before), pinned\n"
    assert pinned(daemon) == [("m", "warm")]
    assert cli.main(["prefetch", "--socket-dir", str(daemon.socket_dir), "/gone.safetensors"]) == 1
    assert "/gone.safetensors" in capsys.readouterr().err


# ---- flags ---------------------------------------------------------------------------------------


def test_the_flag_stages_and_pins_at_start(start_daemon: StartDaemon, write: Checkpoints) -> None:
    one, tensors = write("one")
    two, _ = write("two", 4)
    daemon = start_daemon("--memory-limit", "16MiB", "--prefetch", str(one), "--prefetch", f"file://{two}")
    wait_until(lambda: sorted(pinned(daemon)) == [("one", "warm"), ("two", "warm")], "both to be staged")
    with daemon.client().load(one) as load:
        same(load, tensors)
    assert load.stats.cache_hit
    assert health(daemon) == "SERVING/SERVING"
    assert daemon.read_bytes() == 9 * MIB


def test_the_variable_names_one_a_line(start_daemon: StartDaemon, write: Checkpoints) -> None:
    one, two = write("one")[0], write("two", 4)[0]
    daemon = start_daemon("--memory-limit", "16MiB", environment={"PENSTOCK_PREFETCH": f"{one}\n{two}\n"})
    wait_until(lambda: sorted(pinned(daemon)) == [("one", "warm"), ("two", "warm")], "both to be staged")


def test_a_source_that_does_not_exist_yet_is_tried_again_and_the_daemon_is_ready_after_it(
    start_daemon: StartDaemon, write: Checkpoints, tmp_path: Path
) -> None:
    there, tensors = write("there", 4)
    path = tmp_path / "later.safetensors"
    daemon = start_daemon(
        "--memory-limit",
        "16MiB",
        "--prefetch",
        str(path),
        "--prefetch",
        str(there),
        "--ready-after-prefetch",
    )
    wait_until(lambda: " prefetch failed " in daemon.log(), "the first try to fail")
    assert f"source={path}" in daemon.log()
    wait_until(lambda: pinned(daemon) == [("there", "warm")], "the other one to be staged")
    assert health(daemon) == "NOT_SERVING/NOT_SERVING"
    same(daemon.client().load_state_dict(there).items(), tensors)  # loads are served meanwhile
    write("later")
    wait_until(lambda: health(daemon) == "SERVING/SERVING", "the daemon to be ready")
    wait_until(
        lambda: sorted(pinned(daemon)) == [("later", "warm"), ("there", "warm")], "nobody to hold either"
    )


def test_a_daemon_with_nothing_to_prefetch_is_ready_at_once(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--memory-limit", "16MiB", "--ready-after-prefetch")
    wait_until(lambda: health(daemon) == "SERVING/SERVING", "the daemon to be ready")


def test_prefetches_that_do_not_fit_together_hold_up_no_load(
    start_daemon: StartDaemon, write: Checkpoints
) -> None:
    one, two = write("one", 10)[0], write("two", 10)[0]
    path, tensors = write("m", 12)
    daemon = start_daemon("--memory-limit", "16MiB", "--prefetch", str(one), "--prefetch", str(two))
    wait_until(lambda: pinned(daemon) and daemon.status()["staging"]["waiting"], "one to wait")
    same(daemon.client().load_state_dict(path).items(), tensors)
    assert daemon.terminate() == 0


@pytest.mark.parametrize("when", ["between tries", "while it waits for memory"])
def test_a_daemon_stops_in_the_middle_of_a_prefetch(
    when: str, start_daemon: StartDaemon, write: Checkpoints, tmp_path: Path
) -> None:
    flags = ("--memory-limit", "16MiB", "--grace", "600")
    if when == "between tries":
        daemon = start_daemon(*flags, "--prefetch", str(tmp_path / "gone.safetensors"))
        wait_until(lambda: " prefetch failed " in daemon.log(), "a try to fail")
    else:
        one, two = write("one", 10)[0], write("two", 10)[0]
        daemon = start_daemon(*flags, "--prefetch", str(one), "--prefetch", str(two))
        wait_until(lambda: daemon.status()["staging"]["waiting"] == 1, "one to wait")
    daemon.process.send_signal(signal.SIGTERM)
    # Not the grace: nobody waits for a prefetch.
    assert daemon.process.wait(DEADLINE_SECONDS) == 0
    daemon.assert_log_clean()
