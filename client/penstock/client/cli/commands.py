"""`penstock load | status | health | prefetch | fetch | evict | verify | bench | warm-set check | demo`.

Exit codes: 0 done, 1 failed with one line on stderr, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .. import errors
from ..client import StreamerClient, socket_directory
from ..ring.progress import QUEUE_LOG
from ..system.missing import explained, need
from ..system.printable import printable
from ..system.sizes import parse_memory_limit, parse_size, show_bytes
from ..system.version import client_version
from .status_text import show

_PIN = (
    "keep it until it is evicted; without, it stays until its memory is needed, and in a daemon without a "
    "memory limit for as long as penstockd --trim-after says (15 minutes by default) and the node has memory "
    "to spare"
)
_VARIANT = "of a directory with several, the one whose files have this in their names, such as fp16"

_VERIFY = "compare files with checksums: not, where the store has a CRC, or all (default: as the daemon does)"


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with _places_on_stderr():
            options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away; say nothing, and let nothing be said at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (errors.PenstockError, OSError, ValueError, ImportError, RuntimeError) as error:
        said = explained(error) if isinstance(error, ModuleNotFoundError) else str(error)
        message = " ".join(said.split()) or type(error).__name__
        print(f"penstock: {printable(message)}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _places_on_stderr() -> Iterator[None]:
    """Shows on a terminal what a load waits for, and its place in the queue."""
    logger, handler = logging.getLogger(QUEUE_LOG), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("penstock: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="penstock", description="Loads model checkpoints through the penstock daemon."
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        if name not in ("demo", "bench", "warm-set"):  # the first two start a daemon of their own
            added.add_argument(
                "--socket-dir",
                metavar="DIR",
                help="where the daemon listens (default: $PENSTOCK_SOCKET_DIR or /run/penstock)",
            )
        return added

    load = command("load", _load, "Loads a checkpoint and tells how fast that was.")
    load.add_argument("source", nargs="+", metavar="SOURCE", help="file, directory, *.index.json or URI")
    load.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    load.add_argument(
        "--tensors", action="append", metavar="GLOB", help="only tensors whose name matches; repeatable"
    )
    load.add_argument(
        "--memory-limit",
        metavar="SIZE",
        type=_memory_limit,
        help="staging memory for this load: -1 what the daemon allows, 0 as little as possible, 4GB, 4GiB",
    )
    load.add_argument("--variant", metavar="NAME", help=_VARIANT)
    load.add_argument("--verify", choices=("off", "auto", "require"), help=_VERIFY)
    load.add_argument("--no-progress", action="store_true", help="no bar on stderr")

    status = command("status", _status, "Shows the daemon's memory, loads and checkpoints.")
    status.add_argument("--json", action="store_true", help="every field, as JSON")
    status.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")

    health = command("health", _health, "Exits with 0 if the daemon is ready, else with 1; for probes.")
    health.add_argument("--live", action="store_true", help="if it does not hang, even if it is not ready")
    health.add_argument(
        "--timeout", type=float, default=5.0, metavar="SECONDS", help="to wait for an answer (default: 5)"
    )

    prefetch = command(
        "prefetch", _prefetch, "Reads a checkpoint into the staging buffer ahead of its loads."
    )
    prefetch.add_argument("source", nargs="+", metavar="SOURCE", help="as in load; all are one checkpoint")
    prefetch.add_argument("--pin", action="store_true", help=_PIN)
    prefetch.add_argument("--variant", metavar="NAME", help=_VARIANT)
    prefetch.add_argument("--verify", choices=("off", "auto", "require"), help=_VERIFY)
    prefetch.add_argument("--no-progress", action="store_true", help="no bar on a terminal")

    fetch = command(
        "fetch", _fetch, "Copies the files beside the weights, and tells the directory that they are in."
    )
    fetch.add_argument("source", metavar="SOURCE", help="directory, or URI of a prefix")
    fetch.add_argument(
        "directory",
        nargs="?",
        metavar="DIRECTORY",
        help="where to (default: the cache, $PENSTOCK_CACHE_DIR or ~/.cache/penstock)",
    )
    fetch.add_argument(
        "--allow", action="append", metavar="GLOB", help="only these; repeatable (default: all but weights)"
    )
    fetch.add_argument("--ignore", action="append", metavar="GLOB", help="not these; repeatable")
    fetch.add_argument(
        "--max-bytes", metavar="SIZE", type=_size, help="refuse more than that (default: 1GiB)"
    )
    fetch.add_argument(
        "--max-files", metavar="N", type=int, help="refuse more files than that (default: 10000)"
    )
    fetch.add_argument("--no-progress", action="store_true", help="no bar on a terminal")

    evict = command("evict", _evict, "Gives up a staged checkpoint, or all idle ones.")
    evict.add_argument("source", nargs="*", metavar="SOURCE", help="as in load; none means every idle one")

    warm_set = command("warm-set", _check_warm_set, "Checks the file of penstockd's --warm-set.")
    actions = warm_set.add_subparsers(dest="action", required=True, metavar="ACTION")
    check_help = (
        "Exits with 0 if the file is a warm set, else with 1 and a line for each fault; needs no daemon."
    )
    check = actions.add_parser("check", help=check_help, description=check_help)
    check.add_argument("file", metavar="FILE", help="as for penstockd --warm-set")

    verify = command(
        "verify", _verify, "Reads every file and compares it with its checksum; exits with 1 if one differs."
    )
    verify.add_argument("source", nargs="+", metavar="SOURCE", help="as in load; all are one checkpoint")
    verify.add_argument("--variant", metavar="NAME", help=_VARIANT)
    verify.add_argument("--no-progress", action="store_true", help="no bar on stderr")

    bench = command(
        "bench", _bench, "Measures what a store and this node can do, and says which flags to use."
    )
    bench.add_argument("source", nargs="+", metavar="SOURCE", help="as in load; all are one checkpoint")
    bench.add_argument(
        "--seconds", type=float, default=60.0, metavar="N", help="for all measurements together (default: 60)"
    )
    bench.add_argument(
        "--bytes", default="32GiB", metavar="SIZE", help="most that is read in all (default: 32GiB)"
    )
    bench.add_argument(
        "--memory-limit",
        default="1GiB",
        metavar="SIZE",
        type=_memory_limit,
        help="of the private daemon that measures (default: 1GiB)",
    )
    bench.add_argument("--no-progress", action="store_true", help="no bar on stderr")

    command("demo", _demo, "Loads a small real model with three memory limits and checks every byte.")
    return parser


class _Version(argparse.Action):
    """Looks it up only when asked: argparse's own would have every command do so."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> None:
        print(f"penstock {client_version()}")
        parser.exit()


def _memory_limit(text: str) -> str:
    try:
        parse_memory_limit(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _size(text: str) -> int | None:
    try:
        return parse_size("--max-bytes", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _load(options: argparse.Namespace) -> None:
    need("torch", *([] if options.no_progress else ["tqdm"]))  # or a daemon would be started for nothing
    patterns = options.tensors

    def matches(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    with _client_or_embedded(options) as client:
        with client.load(
            options.source,
            device=options.device,
            tensors=matches if patterns else None,
            memory_limit=options.memory_limit,
            variant=options.variant,
            verify=options.verify,
            owned=False,  # nothing is kept
            progress=not options.no_progress,
        ) as load:
            for _ in load:
                pass
        stats = load.stats
    if patterns and not stats.tensors:
        raise ValueError(
            f"--tensors {' '.join(patterns)}: the checkpoint has no tensor of such a name; give a pattern "
            "that its names match, such as '*.weight'"
        )
    rate = stats.bytes / stats.seconds / 1e9
    first = stats.first_tensor_seconds
    _table(
        [
            ("tensors", f"{stats.tensors}"),
            ("files", f"{len(load.files)}"),
            ("bytes", f"{stats.bytes} ({show_bytes(stats.bytes)})"),
            ("seconds", f"{stats.seconds:.3f}"),
            ("GB/s", f"{rate:.2f}"),
            ("first tensor after", "-" if first is None else f"{first:.3f} s"),
            ("waited for memory", f"{stats.waited_seconds:.3f} s"),
            ("read from source", show_bytes(stats.read_bytes)),
            ("of that from its tier", show_bytes(stats.tier_bytes)),
            ("verified", show_bytes(stats.verified_bytes)),
            ("staged already", "yes" if stats.cache_hit else "no"),
        ]
    )


def _client_or_embedded(options: argparse.Namespace) -> StreamerClient:
    """A client of the daemon that runs, else of a private one; prints which. If a directory was named, it
    must have a daemon. A daemon that hangs is not replaced by a private one."""
    from ..embedded import accepts
    from ..ring.handoff import socket_path

    client = StreamerClient(options.socket_dir)
    try:
        status = client.status()
    except errors.DaemonUnavailableError:
        named = options.socket_dir is not None or os.environ.get("PENSTOCK_SOCKET_DIR")
        if named or accepts(socket_path(client.socket_dir, "handoff.sock")):
            raise
        print(f"no daemon in {client.socket_dir}: using a private one for this load", file=sys.stderr)
        return StreamerClient.embedded(-1 if options.memory_limit is None else options.memory_limit)
    print(f"daemon {status['version']}, pid {status['pid']}, in {client.socket_dir}", file=sys.stderr)
    return client


def _status(options: argparse.Namespace) -> None:
    with StreamerClient(options.socket_dir) as client:
        text = _status_text(client, options)
        while options.watch:
            if text and not options.json and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            print(text, end="", flush=True)
            time.sleep(1)
            try:
                text = _status_text(client, options)
            except errors.DaemonUnavailableError as error:  # it may be on its way back
                print(f"penstock: {printable(str(error))}", file=sys.stderr)
                text = ""
        print(text, end="")


def _status_text(client: StreamerClient, options: argparse.Namespace) -> str:
    status = client.status()
    text = json.dumps(status, indent=None if options.watch else 2) if options.json else show(status)
    return text + "\n"


def _health(options: argparse.Namespace) -> None:
    from . import health

    health.check(socket_directory(options.socket_dir), live=options.live, timeout_seconds=options.timeout)
    print("live" if options.live else "ready")


def _prefetch(options: argparse.Namespace) -> None:
    with StreamerClient(options.socket_dir) as client:
        progress = sys.stderr.isatty() and not options.no_progress
        staged = client.prefetch(
            options.source,
            pin=options.pin,
            variant=options.variant,
            verify=options.verify,
            progress=progress,
        )
    warm = f" ({show_bytes(staged.warm_bytes)} were there before)" if staged.warm_bytes else ""
    print(f"staged {show_bytes(staged.total_bytes)}{warm}{', pinned' if options.pin else ''}")


def _fetch(options: argparse.Namespace) -> None:
    with StreamerClient(options.socket_dir) as client:
        directory = client.fetch(
            options.source,
            options.directory,
            allow=options.allow,
            ignore=options.ignore,
            max_bytes=options.max_bytes,
            max_files=options.max_files,
            progress=sys.stderr.isatty() and not options.no_progress,
        )
    print(directory)


def _evict(options: argparse.Namespace) -> None:
    with StreamerClient(options.socket_dir) as client:
        evicted = client.evict(options.source or None)
    if options.source and not (evicted.freed_bytes or evicted.leased_bytes):
        raise ValueError(
            f"{' '.join(options.source)}: nothing is staged of it; see `penstock status` for what is, by its "
            "source"
        )
    print(f"freed {show_bytes(evicted.freed_bytes)}, in use {show_bytes(evicted.leased_bytes)}")


def _check_warm_set(options: argparse.Namespace) -> None:
    """By a process of its own: this package knows neither the server nor YAML."""
    from ..system.interpreter import start_module

    sys.stdout.flush()
    module = "penstock.server.loads.warm.check"
    with start_module(module, [options.file], stdout=None, stderr=None, environment=os.environ) as checking:
        code = checking.wait()
    if code:
        raise SystemExit(1)


def _verify(options: argparse.Namespace) -> None:
    need("torch", *([] if options.no_progress else ["tqdm"]))
    from .verify import verify

    options.memory_limit = None
    with _client_or_embedded(options) as client:
        wrong = verify(client, options.source, variant=options.variant, progress=not options.no_progress)
    if wrong:
        raise RuntimeError(
            f"{' '.join(options.source)}: {wrong} files are not as they should be, as said above; fetch or "
            "upload them again"
        )


def _bench(options: argparse.Namespace) -> None:
    need("torch", *([] if options.no_progress else ["tqdm"]))
    from .bench import bench

    bench(
        options.source,
        seconds=options.seconds,
        most_bytes=parse_memory_limit(options.bytes) or 0,
        memory_limit=options.memory_limit,
        progress=not options.no_progress,
    )


def _demo(options: argparse.Namespace) -> None:
    from .demo import run

    run()


def _table(rows: Iterable[tuple[str, str]]) -> None:
    for name, value in rows:
        print(f"{name:<20}{value}")
