"""Flags, variables, and what the machine does not allow."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from penstock.server.config.settings import load_config
from penstock.server.sources.stores import FLAGS
from penstock.server.system.limits import MemoryBound
from penstock.server.tier.directory import Directory

from . import provoked, said

GIB = 1 << 30


def started(*flags: str, bound_bytes: int = 16 * GIB, **variables: str) -> Callable[[], object]:
    return lambda: load_config(
        flags, variables, lambda: MemoryBound(bound_bytes, "the machine's memory"), FLAGS
    )


def a_link_as_tier() -> object:
    with tempfile.TemporaryDirectory() as directory:
        link = Path(directory, "tier")
        link.symlink_to(directory)
        return Directory(link)


EXAMPLES = [
    provoked(started("--memory-limit", "x"), "--memory-limit", "'x' is not a size", "write bytes"),
    provoked(started("--memory-limit", "1"), "--memory-limit", "1 bytes are less than one slab", "raise it"),
    provoked(started("--memory-limit", "1TiB"), "--memory-limit", "are more than", "lower the limit"),
    provoked(started(bound_bytes=1), "the machine's memory", "leaves no room", "raise it"),
    provoked(started("--socket-dir", " "), "--socket-dir", "it is empty", "name a directory"),
    provoked(started("--socket-dir", "/" + "x" * 120), "--socket-dir", "is too long", "choose a shorter one"),
    provoked(
        started("--memory-limit", "0", "--prefetch", "/x"),
        "--prefetch",
        "nothing can be kept staged",
        "give a limit",
    ),
    provoked(
        started("--memory-limit", "0", "--warm-set", "/x"),
        "--warm-set",
        "nothing can be kept warm",
        "give a limit",
    ),
    provoked(
        started("--node-features", "/x"),
        "--node-features",
        "it tells what of --warm-set is warm, and there is none",
        "give --warm-set too",
    ),
    provoked(started("--warm-set", "/x/"), "--warm-set", "'/x/' is a directory", "name a file in it"),
    provoked(
        started("--max-loads", "1", "--prefetch", "/x"),
        "--max-loads",
        "must be more than the number of --prefetch",
        "raise it",
    ),
    provoked(
        started("--memory-limit", "4MiB", "--block-size", "16MiB"),
        "--block-size",
        "is more than the whole --memory-limit",
        "lower it",
    ),
    provoked(
        started("--s3-unsigned", "1", "--s3-requester-pays", "1"),
        "--s3-requester-pays",
        "S3 cannot charge a requester that it does not know",
        "leave out --s3-unsigned",
    ),
    provoked(
        started("--tier-dir", "/tier"),
        "--tier-dir and --tier-limit",
        "one is given without the other",
        "name the directory, and how much",
    ),
    provoked(a_link_as_tier, "--tier-dir", "is a link or no directory", "name a directory itself"),
    provoked(started("--max-loads", "0"), "--max-loads", "'0' is not a whole number above 0", "write one"),
    provoked(started("--concurrency", "9999999"), "--concurrency", "is more than", "lower it"),
    provoked(started("--grace", "soon"), "--grace", "is not a number of seconds", "write one"),
    provoked(started("--object-timeout", "0"), "--object-timeout", "'0' is not above 0", "raise it"),
    provoked(started("--stall-timeout", "0.01"), "--stall-timeout", "is less than 0.1 seconds", "raise it"),
    provoked(started("--block-size", "1"), "--block-size", "is not between 64KiB and 1GiB", "choose a size"),
    provoked(started("--http-address", "x"), "--http-address", "is neither none nor HOST:PORT", "write it"),
    provoked(started("--s3-unsigned", "x"), "--s3-unsigned", "'x' is neither 0 nor 1", "choose one"),
    provoked(started("--s3-addressing", "x"), "--s3-addressing", "is none of auto, path", "choose one"),
    provoked(started("--allow", "x"), "--allow", "is neither an absolute path nor", "write one"),
    provoked(
        started(PENSTOCK_LOG_FORMAT="x"), "PENSTOCK_LOG_FORMAT", "'x' is none of text, json", "choose one"
    ),
    provoked(
        started(PENSTOCK_NO_POPULATE="x"), "PENSTOCK_NO_POPULATE", "'x' is neither 0 nor 1", "choose one"
    ),
    said("--socket-dir: another penstockd", " serves /run/penstock; ", "stop it, or choose another"),
    said(
        "--socket-dir: another penstockd",
        " listens on /run/penstock/handoff.sock, though it does not hold the directory's lock: its lock file "
        "was removed; ",
        "stop it, or choose another directory",
    ),
    said("--socket-dir: /run/penstock", " cannot be used: Permission denied; ", "choose another"),
    said(
        "--http-address: 127.0.0.1:9464",
        " cannot be bound (Address already in use); ",
        "choose another, port 0 for any that is free, or none",
    ),
    said(
        "--exit-with-stdin: standard input",
        " cannot be watched, as it is a file; ",
        "give penstockd a pipe, and hold its other end open for as long as it shall run",
    ),
    said("h11", " is not installed: ", "pip install 'penstock[server]'"),
]
