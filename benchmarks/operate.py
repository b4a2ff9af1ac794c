"""The scenario of monitoring a daemon: a scrape of its metrics, and the probe of a container."""

import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import make_checkpoint, report, system
from benchmarks.daemons import Daemon, clean_environment
from benchmarks.runner import ONE_GB, Runner, files_of

_SCRAPES = 60
_PROBES = 10
_PAUSE_SECONDS = 0.05


def operate(runner: Runner) -> None:
    path = make_checkpoint.llama_checkpoint(runner.size_bytes)
    system.fill_page_cache(files_of(path))
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as directory:
        log = Path(directory, "log")
        with Daemon("--memory-limit", str(ONE_GB), log=log, http_address="127.0.0.1:0") as daemon:
            daemon.wait_until_populated()
            address = next(event["http"] for line in log.open() if "http" in (event := json.loads(line)))
            rows = [
                ("a scrape, nothing to do", _scrape_seconds(address), "0.02"),
                ("`penstock health`, nothing to do", _probe_seconds(daemon.socket_dir), "0.3"),
            ]
            with _loads(daemon.socket_dir, str(path)):
                rows.append(("a scrape while a load runs", _scrape_seconds(address), "0.02"))
    runner.publish_lines("operate", _lines(rows))


def _scrape_seconds(address: str) -> list[float]:
    """The seconds of scrapes, one after the other on one connection, as Prometheus makes them."""
    connection = http.client.HTTPConnection(address, timeout=30)
    taken = []
    with contextlib.closing(connection):
        for _ in range(_SCRAPES):
            start = time.perf_counter()
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            body = answer.read()
            taken.append(time.perf_counter() - start)
            if answer.status != 200 or b"penstock_read_bytes_total" not in body:
                raise RuntimeError(f"/metrics answers {answer.status}: {body[:200]!r}")
            time.sleep(_PAUSE_SECONDS)
    return taken


def _probe_seconds(socket_dir: str) -> list[float]:
    """The seconds of `penstock health`, from the start of the process to its end."""
    taken = []
    for _ in range(_PROBES):
        start = time.perf_counter()
        subprocess.run(
            [Path(sys.executable).with_name("penstock"), "health", "--socket-dir", socket_dir],
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        taken.append(time.perf_counter() - start)
    return taken


@contextlib.contextmanager
def _loads(socket_dir: str, path: str) -> Iterator[None]:
    """Loads the checkpoint again and again, in a process of its own, until the context ends."""
    code = (
        "import sys; from penstock.client import StreamerClient\n"
        "client = StreamerClient(sys.argv[1])\n"
        "while True:\n"
        "    with client.load(sys.argv[2], owned=False) as load:\n"
        "        for count, _ in enumerate(load): pass\n"
        "    print(count, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, socket_dir, path],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError("the process that loads ended before its first load; read its messages above")
        drain = threading.Thread(target=process.stdout.read)
        drain.start()
        yield
        if process.poll() is not None:
            raise RuntimeError(f"the process that loads ended early, with exit code {process.returncode}")
    finally:
        process.kill()
        process.wait()
    drain.join()


def _lines(rows: Sequence[tuple[str, list[float], str]]) -> list[str]:
    head = ["seconds", "median (range)", "95 %", "target"]
    cells = [
        [what, report.spread(seconds, 4), f"{sorted(seconds)[len(seconds) * 95 // 100]:.4f}", target]
        for what, seconds, target in rows
    ]
    return report.markdown_table(head, cells)
