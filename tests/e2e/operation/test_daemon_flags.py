"""penstockd's command line, its log and its exit codes."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.client import errors

from ..conftest import StartDaemon
from ..forked import fork_daemon
from ..support import DaemonProcess, random_tensors, same, wait_until, write_checkpoint

MIB = 1 << 20
FLAGS = (
    *("--socket-dir", "--memory-limit", "--concurrency", "--block-size", "--allow", "--trim-after"),
    *("--queue-timeout", "--group-timeout", "--grace", "--max-loads", "--log-format", "--log-level"),
    *("--warm-set", "--warm-set-interval", "--node-features"),
    *("--http-address", "--stall-timeout", "--no-populate", "--exit-with-stdin", "--version"),
)


def penstockd(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs it to its end."""
    return subprocess.run(
        [sys.executable, "-m", "penstock.server", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def refused(*flags: str, **environment: str) -> tuple[int, list[str]]:
    """Exit code and lines of standard error of one that does not come to serve; forked, as there are many."""
    with tempfile.TemporaryFile() as log:
        process = fork_daemon(flags, {**os.environ, **environment}, log)
        code = process.wait(60)
        log.seek(0)
        return code, log.read().decode().splitlines()


def test_help_names_every_flag_its_default_and_its_variables() -> None:
    done = penstockd("--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    for flag in FLAGS:
        assert flag in text
    for words in ("RUNAI_STREAMER_MEMORY_LIMIT", "PENSTOCK_ALLOW", "default: 8MiB", "default: /run/penstock"):
        assert words in text


def test_version_is_one_line() -> None:
    done = penstockd("--version")
    assert (done.returncode, done.stdout.split()[0], len(done.stdout.splitlines())) == (0, "penstockd", 1)


@pytest.mark.parametrize("flags", [["--nonsense"], ["--memory-limit"], ["stray"], ["--mem", "1GB"]])
def test_wrong_usage_exits_with_2_and_names_it(flags: list[str]) -> None:
    done = penstockd(*flags)
    assert done.returncode == 2
    assert flags[0] in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--memory-limit", "much"),
        ("--memory-limit", "-2"),
        ("--memory-limit", ""),
        ("--memory-limit", "1MiB"),
        ("--memory-limit", "1e9"),
        ("--memory-limit", "99999TB"),
        ("--concurrency", "0"),
        ("--concurrency", "-1"),
        ("--concurrency", "many"),
        ("--block-size", "1"),
        ("--block-size", "2GiB"),
        ("--allow", "relative/path"),
        ("--queue-timeout", "-1"),
        ("--queue-timeout", "nan"),
        ("--grace", "soon"),
        ("--max-loads", "0"),
        ("--log-format", "xml"),
        ("--log-level", "loud"),
        ("--socket-dir", "/" + "x" * 120),
        ("--socket-dir", "/dev/null/here"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_the_flag(
    flag: str, value: str, socket_dir: Path
) -> None:
    where = () if flag == "--socket-dir" else (f"--socket-dir={socket_dir}",)
    code, said = refused(*where, f"{flag}={value}")
    assert (code, len(said)) == (1, 1), said
    assert said[0].startswith(f"penstockd: {flag}: ")
    assert not socket_dir.exists()


def test_a_bad_variable_is_named() -> None:
    done = penstockd(RUNAI_STREAMER_MEMORY_LIMIT="plenty")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "RUNAI_STREAMER_MEMORY_LIMIT" in done.stderr


def test_a_port_that_is_taken_is_refused_in_one_line_that_names_the_flag(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon("--memory-limit", "16MiB")
    code, said = refused(f"--socket-dir={tmp_path}/s", f"--http-address={daemon.http_address}")
    assert (code, len(said)) == (1, 1), said
    assert said[0].startswith(f"penstockd: --http-address: {daemon.http_address} cannot be bound")
    assert not (tmp_path / "s" / "penstock.sock").exists()


def test_without_http_there_is_no_port(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--memory-limit", "16MiB", "--http-address", "none")
    assert daemon.http_address == "none"
    sockets = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
    assert not {fd[8:-1] for fd in daemon.fds() if fd.startswith("socket:[")} & sockets


def test_a_variable_that_means_nothing_is_named_in_a_warning(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--memory-limit", "16MiB", environment={"PENSTOCK_MEMROY_LIMIT": "1GB"})
    warned = [line for line in daemon.log().splitlines() if " unknown variable " in line]
    assert len(warned) == 1
    assert " warning unknown variable name=PENSTOCK_MEMROY_LIMIT meant=PENSTOCK_MEMORY_LIMIT" in warned[0]


def test_one_id_follows_a_load_through_the_daemon_s_log_the_client_s_and_its_errors(
    start_daemon: StartDaemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_checkpoint(tmp_path / "m.safetensors", random_tensors(20, MIB // 4))
    daemon = start_daemon("--memory-limit", "16MiB")
    with caplog.at_level(logging.INFO, "penstock"), daemon.client() as client:
        with client.load(path, memory_limit=0) as load:
            good = load.load_id
            for _ in load:
                path.write_bytes(b"something else")
                break
        with pytest.raises(errors.CheckpointInvalidError) as caught:
            client.load(path)
    bad = caught.value.load_id
    assert str(caught.value).endswith(f"(load {bad})")
    assert f"load {good} of {path} begins" in caplog.text
    wait_until(lambda: daemon.log().count(good) >= 2, "the first load to end")
    for load_id in (good, bad):
        words = [line.split()[2] for line in daemon.log().splitlines() if f"load={load_id}" in line]
        assert words == ["opened", "load"]
    recent = daemon.status()["errors"][0]
    assert (recent["load_id"], recent["reason"]) == (bad, "CHECKPOINT_INVALID")
    assert recent["sources"] == [str(path)]


def test_the_log_tells_of_start_loads_and_stop(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m.safetensors", random_tensors(2, MIB))
    daemon = start_daemon("--memory-limit", "16MiB", "--concurrency", "5")
    with daemon.client() as client:
        client.load_state_dict(path)
        with pytest.raises(errors.CheckpointNotFoundError):
            client.load(tmp_path / "gone with spaces.safetensors")
    daemon.wait_idle()
    assert daemon.terminate() == 0
    lines = daemon.log().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (info|warning) ", line) for line in lines)
    start = next(line for line in lines if " serving " in line)
    for words in (
        "memory_limit=16777216",
        "slab_bytes=2097152",
        "concurrency=5",
        f"socket_dir={daemon.socket_dir}",
        'warm_for="until others need the memory"',
    ):
        assert words in start
    good, bad = [line for line in lines if " load " in line]
    for words in (
        "result=ok",
        f"source={path}",
        f"bytes={8 * MIB}",
        "seconds=",
        "gb_per_second=",
        "waited_seconds=",
    ):
        assert words in good
    assert "result=CHECKPOINT_NOT_FOUND" in bad
    assert f'source="{tmp_path}/gone with spaces.safetensors"' in bad
    assert " stopped " in lines[-1]


def test_json_logs_parse(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / 'quoted "name"\n.safetensors', random_tensors(1, 10))
    daemon = DaemonProcess(tmp_path / "s", "--memory-limit", "16MiB", "--log-format", "json")
    try:
        wait_until(lambda: '"serving"' in daemon.log(), "the daemon to serve")
        with daemon.client() as client:
            client.load_state_dict(path)
        daemon.wait_idle()
        assert daemon.terminate() == 0
        events = [json.loads(line) for line in daemon.log().splitlines()]
    finally:
        daemon.kill()
    assert events[0]["event"] == "serving"
    load = next(event for event in events if event["event"] == "load")
    assert (load["source"], load["result"], load["bytes"]) == (str(path), "ok", 40)
    assert events[-1]["event"] == "stopped"


@pytest.mark.parametrize("limit", ["RUNAI_STREAMER_MEMORY_LIMIT", "PENSTOCK_MEMORY_LIMIT", "flag"])
def test_the_memory_limit_comes_from_the_flag_or_else_its_variables(
    limit: str, start_daemon: StartDaemon
) -> None:
    environment = {"RUNAI_STREAMER_MEMORY_LIMIT": "10MiB"}
    if limit != "RUNAI_STREAMER_MEMORY_LIMIT":
        environment["PENSTOCK_MEMORY_LIMIT"] = "20MiB"
    flags = ("--memory-limit", "30MiB") if limit == "flag" else ()
    daemon = start_daemon(*flags, environment=environment)
    want = {"RUNAI_STREAMER_MEMORY_LIMIT": 10, "PENSTOCK_MEMORY_LIMIT": 20, "flag": 30}[limit] * MIB
    assert daemon.status()["staging"]["limit_bytes"] == want
    assert daemon.status()["staging"]["peak_bytes"] == want


def test_it_ends_with_its_standard_input_and_leaves_no_sockets(socket_dir: Path) -> None:
    daemon = subprocess.Popen(
        [sys.executable, "-m", "penstock.server", "--socket-dir", str(socket_dir), "--exit-with-stdin"],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert daemon.stdin is not None
    try:
        wait_until((socket_dir / "handoff.sock").exists, "the daemon to serve")
        daemon.stdin.write(b"anything else is ignored\n")
        daemon.stdin.flush()
        assert daemon.poll() is None
        daemon.stdin.close()
        assert daemon.wait(60) == 0
    finally:
        daemon.kill()
        daemon.wait()
    assert not (socket_dir / "handoff.sock").exists()


@pytest.mark.parametrize("kind", ["/dev/null", "a file", "closed"])
def test_a_standard_input_without_an_end_is_refused_in_one_line(
    kind: str, socket_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "input"
    path.write_text("text")
    command = [sys.executable, "-m", "penstock.server", "--socket-dir", str(socket_dir), "--exit-with-stdin"]
    close = ["sh", "-c", 'exec "$@" <&-', "sh"] if kind == "closed" else []
    with open("/dev/null" if kind == "/dev/null" else path) as stdin:
        done = subprocess.run(
            [*close, *command], stdin=stdin, capture_output=True, text=True, timeout=60, check=False
        )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert done.stderr.startswith("penstockd: --exit-with-stdin: standard input cannot be watched")
    assert "a pipe" in done.stderr
    assert not socket_dir.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_with_0_when_signalled(number: signal.Signals, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--memory-limit", "16MiB")
    daemon.process.send_signal(number)
    assert daemon.process.wait(60) == 0


def test_loads_above_the_bound_are_refused(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m.safetensors", random_tensors(20, MIB // 4))
    daemon = start_daemon("--memory-limit", "16MiB", "--max-loads", "1")
    with daemon.client() as client, client.load(path, memory_limit=0) as load:
        with pytest.raises(errors.TooManyLoadsError, match="--max-loads"):
            client.load(path)
        same(load, random_tensors(20, MIB // 4))


def test_a_load_that_waits_too_long_for_memory_is_told_what_holds_it(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "m.safetensors", random_tensors(40, MIB // 4))
    other = write_checkpoint(tmp_path / "o.safetensors", random_tensors(40, MIB // 4, seed=1))
    daemon = start_daemon("--memory-limit", "4MiB", "--queue-timeout", "0.3")
    with daemon.client() as client, client.load(path) as load:
        iterator = iter(load)
        next(iterator)
        with pytest.raises(errors.StagingExhaustedError, match="--queue-timeout"):
            client.load(other)
        del iterator  # suspended, it would keep its lease
    gc.collect()


# ---- cgroups -------------------------------------------------------------------------------------


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup of 512 MiB: version 1 or 2, whatever this machine has and lets us make."""
    version_1 = Path("/sys/fs/cgroup/memory")
    top, name = (
        (version_1, "memory.limit_in_bytes") if version_1.is_dir() else (version_1.parent, "memory.max")
    )
    group = top / f"penstock-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(512 * MIB))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield group
    wait_until(lambda: not (group / "cgroup.procs").read_text(), "the cgroup to be empty")
    group.rmdir()


def inside(cgroup: Path) -> tuple[str, ...]:
    return ("sh", "-c", f'echo $$ > {cgroup}/cgroup.procs && exec "$@"', "sh")


def test_a_limit_above_the_cgroup_s_is_refused_with_both_numbers(cgroup: Path, socket_dir: Path) -> None:
    command = [*inside(cgroup), sys.executable, "-m", "penstock.server", "--socket-dir", str(socket_dir)]
    done = subprocess.run(
        [*command, "--memory-limit", "600MiB"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert str(600 * MIB) in done.stderr
    assert str(512 * MIB) in done.stderr
    assert "cgroup" in done.stderr


def test_without_a_limit_the_cgroup_s_is_never_reached(
    cgroup: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """A checkpoint larger than the container goes through a window."""
    path = tmp_path / "sparse.safetensors"
    size = 700 * MIB
    entries = {
        f"t{number}": {
            "dtype": "U8",
            "shape": [size // 100],
            "data_offsets": [number * (size // 100), (number + 1) * (size // 100)],
        }
        for number in range(100)
    }
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size // 100 * 100)
    daemon = start_daemon(wrapper=inside(cgroup))
    count = 0
    with daemon.client() as client, client.load(path, owned=False) as load:
        for _name, tensor in load:
            assert not tensor[::4096].any()
            count += 1
            del tensor
    assert count == 100
    assert daemon.status()["staging"]["peak_bytes"] <= 256 * MIB


HOLD = "held = bytearray(300 << 20); print('holding', flush=True); input()"


def test_what_others_hold_of_the_cgroup_is_taken_when_they_let_go(
    cgroup: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """All at once would end in a kill."""
    tensors = random_tensors(8, MIB)
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    command = [*inside(cgroup), sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"holding\n"
        daemon = start_daemon("--memory-limit", "256MiB", populated=False, wrapper=inside(cgroup))
        with daemon.client() as client:
            for _ in range(3):
                same(client.load_state_dict(path).items(), tensors)
        wait_until(lambda: "others hold the rest" in daemon.log(), "the buffer to be as large as it can")
        assert daemon.status()["staging"]["peak_bytes"] < 200 * MIB
        assert " populated" not in daemon.log()
        holder.communicate(b"\n", timeout=60)
    wait_until(lambda: " populated" in daemon.log(), "the rest of the buffer")
    assert daemon.status()["staging"]["peak_bytes"] == 256 * MIB


GROW = """
held = []
print(flush=True)
for line in iter(input, "end"):
    held.append(b"x" * (4 << 20))
    print(flush=True)
"""


def left_bytes(cgroup: Path) -> int:
    """What processes in it can take before the kernel kills one. Page cache counts."""
    usage = next(
        path for name in ("memory.current", "memory.usage_in_bytes") if (path := cgroup / name).exists()
    )
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return 512 * MIB - int(usage.read_text()) + int(stat["active_file"]) + int(stat["inactive_file"])


def kills(cgroup: Path) -> int:
    """How many processes of it the kernel has killed for want of memory."""
    (path,) = [path for name in ("memory.events", "memory.oom_control") if (path := cgroup / name).exists()]
    return int(dict(line.split() for line in path.read_text().splitlines())["oom_kill"])


def test_nothing_is_killed_for_memory_that_is_only_warm(
    cgroup: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """A neighbour in the same container takes what is left, and then what was warm: the checkpoint that was
    used first goes first, the last one when it has to."""
    paths = [write_checkpoint(tmp_path / f"{n}.safetensors", random_tensors(14, MIB, seed=n)) for n in (1, 2)]
    daemon = start_daemon(wrapper=inside(cgroup))
    with daemon.client() as client:
        for path in paths:
            client.prefetch(path)

    def warm() -> list[str]:
        return [Path(stage["sources"][0]).stem for stage in daemon.status()["stages"]]

    assert warm() == ["1", "2"]
    least_bytes = 512 * MIB // 16
    command = [*inside(cgroup), sys.executable, "-c", GROW]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as neighbour:
        assert neighbour.stdin is not None
        assert neighbour.stdout is not None
        assert neighbour.stdout.readline() == b"\n"
        seen = [["1", "2"]]
        for _ in range((left_bytes(cgroup) - least_bytes + 80 * MIB) // (4 * MIB)):
            neighbour.stdin.write(b"\n")
            neighbour.stdin.flush()
            assert neighbour.stdout.readline() == b"\n"
            wait_until(lambda: left_bytes(cgroup) >= least_bytes, "the share to be left again")
            if (now := warm()) != seen[-1]:
                seen.append(now)
        neighbour.communicate(b"end\n", timeout=60)
        assert neighbour.returncode == 0
    assert kills(cgroup) == 0
    assert seen == [["1", "2"], ["2"], []]
    assert " memory is short " in daemon.log()
