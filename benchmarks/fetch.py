"""The scenario of small files on a far server, such as a model has beside its weights."""

import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.daemons import Daemon
from benchmarks.make_checkpoint import DATA_DIR
from benchmarks.objects import Far
from benchmarks.runner import Runner, tell

_FILES, _FILE_BYTES = 200, 50_000
_DELAY_SECONDS, _RATE_BYTES = 0.02, 90_000_000
_CONNECTIONS = 32
"""Connections that the daemon keeps, and threads that open objects."""
_MOST_TIMES = 4


def fetch(runner: Runner) -> None:
    directory = _make_files()
    seconds: dict[str, list[float]] = {"penstock": [], "again": [], "runai": []}
    with Far(delay_seconds=_DELAY_SECONDS, rate_bytes=_RATE_BYTES) as server:
        uri = server.uri(directory)
        flags = ("--memory-limit", "64MiB", "--object-concurrency", str(_CONNECTIONS))
        with Daemon(*flags, environment=server.environment()) as daemon:
            _penstock(daemon, uri, directory)  # the daemon imports boto3 at its first request
            for number in range(runner.rounds):
                first, again = _penstock(daemon, uri, directory)
                seconds["penstock"].append(first)
                seconds["again"].append(again)
                tell("penstock", number + 1, first)
                tell("penstock, versions alone", number + 1, again)
                seconds["runai"].append(_runai(server.environment(), uri, directory))
                tell("runai pull_files", number + 1, seconds["runai"][-1])
    least = (_FILES + 1) * _DELAY_SECONDS / _CONNECTIONS
    times = [each / least for each in seconds["penstock"]]
    runner.publish_lines("fetch", _lines(seconds, least, times))
    if sorted(times)[len(times) // 2] > _MOST_TIMES:
        raise RuntimeError(
            f"fetching took {report.spread(times)} times as long as its round trips, more than {_MOST_TIMES}"
        )


def _lines(seconds: dict[str, list[float]], least: float, times: list[float]) -> list[str]:
    names = {
        "penstock": "Penstock, `client.fetch` to an empty cache",
        "again": "Penstock, `client.fetch` again: only versions are requested",
        "runai": "Run:ai 0.17, `pull_files`",
    }
    rows = [[names[name], report.spread(each, 3)] for name, each in seconds.items()]
    return [
        f"{_FILES} files of {_FILE_BYTES // 1000} kB below one prefix; every answer is "
        f"{_DELAY_SECONDS * 1e3:.0f} ms late. {_FILES + 1} round trips over {_CONNECTIONS} connections take "
        f"{least:.3f} s at least; the first fetch took {report.spread(times)} times that, with writing and "
        "syncing every file.",
        "",
        *report.markdown_table(["", "seconds"], rows),
    ]


def _make_files() -> Path:
    directory = DATA_DIR / f"fetch-{_FILES}-{_FILE_BYTES}"
    if not directory.is_dir():
        made = Path(tempfile.mkdtemp(dir=DATA_DIR))
        content = random.Random(1)
        for number in range(_FILES):
            (made / f"part-{number:03}.json").write_bytes(content.randbytes(_FILE_BYTES))
        made.chmod(0o755)
        made.rename(directory)
    return directory


def _penstock(daemon: Daemon, uri: str, directory: Path) -> tuple[float, float]:
    """Seconds of a fetch to an empty cache, and of one to a cache that has all files."""
    from penstock.client import StreamerClient

    with _environment() as temporary:
        os.environ["PENSTOCK_CACHE_DIR"] = str(temporary)
        with StreamerClient(daemon.socket_dir) as client:
            first = _timed(lambda: client.fetch(uri))
            again = _timed(lambda: client.fetch(uri))
            _check(client.fetch(uri), directory)
    return first, again


def _runai(environment: dict[str, str], uri: str, directory: Path) -> float:
    from runai_model_streamer import pull_files

    with _environment() as temporary:
        os.environ.update(environment)
        seconds = _timed(lambda: pull_files(uri, str(temporary)))
        _check(temporary, directory)
    return seconds


@contextlib.contextmanager
def _environment() -> Iterator[Path]:
    """A directory. Changes of the environment are undone when the context ends."""
    before = dict(os.environ)
    temporary = Path(tempfile.mkdtemp(dir=DATA_DIR))
    try:
        yield temporary
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(temporary)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _check(found: Path, directory: Path) -> None:
    for path in directory.iterdir():
        if (found / path.name).read_bytes() != path.read_bytes():
            raise RuntimeError(f"{path.name} has other bytes than the file that was to be fetched")
