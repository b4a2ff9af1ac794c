"""`penstock load | status | health | prefetch | fetch | evict | verify | bench | warm-set check | demo`.

`arguments.py` parses the command line. Exit codes: 0 done, 1 failed with one line on stderr, 2 wrong usage,
130 interrupted.
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
from collections.abc import Callable, Iterable, Iterator, Sequence

from .. import errors
from ..client import StreamerClient
from ..ring.progress import QUEUE_LOG
from ..ring.socket_dir import socket_directory, socket_path
from ..system.missing import explained, need
from ..system.sizes import parse_memory_limit, show_bytes
from .arguments import parse
from .status_text import show


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    options = parse(arguments)
    try:
        with _places_on_stderr():
            run(options)
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
        print(f"penstock: {message}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Runs one command. Raises the errors of the client, and others for arguments that cannot be used."""
    _COMMANDS[options.command](options)


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
                print(f"penstock: {error}", file=sys.stderr)
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
    """Runs the check in another process: this package knows neither the server nor YAML."""
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
            f"{' '.join(options.source)}: {wrong} files are corrupt or could not be read, as said above; "
            "fetch or upload them again"
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


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "load": _load,
    "status": _status,
    "health": _health,
    "prefetch": _prefetch,
    "fetch": _fetch,
    "evict": _evict,
    "warm-set": _check_warm_set,
    "verify": _verify,
    "bench": _bench,
    "demo": _demo,
}
