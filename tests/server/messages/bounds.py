"""What penstockd keeps for each user, and what the machine has left: bytes, descriptors, threads, frames."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from penstock.server.checkpoint.catalog import MAX_SOURCES
from penstock.server.checkpoint.headers.budget import Budget
from penstock.server.checkpoint.headers.parsers import Parsers
from penstock.server.checkpoint.headers.spool import Spools
from penstock.server.checkpoint.opening import Descriptors, Opening
from penstock.server.edge.requests import MAX_NAME_CHARACTERS, MAX_SOURCE_BYTES, _variant, check_sources
from penstock.server.edge.streams import MAX_MESSAGE_BYTES, UNAPPROVED_MESSAGE_BYTES, RequestStream
from penstock.server.loads.names import MAX_UNPACKED_BYTES, NAME_COST_BYTES, Names
from penstock.server.system.failure import NoThreadError, explain
from penstock.server.system.quota import Quota
from penstock.v1 import streamer_pb2 as pb

from . import provoked, said

ANNE = 1000
TOTAL = 800
"""Units of a quota: one user may have 612 of them (seven eighths of what root's eighth leaves)."""


def charged(size_bytes: int, *, held_bytes: int = 0) -> Callable[[], object]:
    def provoke() -> object:
        budget = Budget(TOTAL)
        held = budget.charge(ANNE, held_bytes)
        return held, budget.charge(ANNE, size_bytes)

    return provoke


def descriptors(count: int, *, held: int = 0) -> Callable[[], object]:
    def provoke() -> None:
        quota = Quota(TOTAL)
        Descriptors(quota, ANNE).take(held, held // 2)
        Descriptors(quota, ANNE).take(count, count // 2)

    return provoke


def opening() -> Opening[None]:
    """On threads that have been stopped."""
    workers = ThreadPoolExecutor(1)
    workers.shutdown()
    return Opening(workers, lambda _: None, lambda _: None, "/m/x", patience_seconds=60, descriptors=2)


def without_parser() -> object:
    parsers = Parsers()
    parsers.shutdown()
    return parsers.here(ANNE, lambda: None)


def without_spool() -> object:
    with Spools(TOTAL).open(ANNE, TOTAL + 1, give_up_at=-math.inf) as spool:
        return spool


def names(count: int) -> None:
    Names(lambda _: None, lambda _: None).add(pb.SelectTensors(names=["x"] * count))


def stream(memory_bytes: int = MAX_MESSAGE_BYTES) -> RequestStream:
    return RequestStream(ANNE, Quota(memory_bytes), lambda: None, lambda: None)


def refused(size_bytes: int, *, compressed: bool = False, small: bool = False) -> Callable[[], object]:
    """What a call is told that sends a message with this prefix."""

    def provoke() -> object:
        made = stream()
        if small:
            made.stay_small()
        made.accept(bytes([compressed]) + size_bytes.to_bytes(4, "big"))
        return made.refusal

    return provoke


def exhausted(error: BaseException) -> Callable[[], object]:
    return lambda: explain(error, "making 4 slabs of 2097152 bytes")


def system(code: int) -> OSError:
    return OSError(code, os.strerror(code))


EXAMPLES = [
    # ---- memory, descriptors, threads
    provoked(
        charged(700),
        "headers, indexes and plans",
        "take 700 B of penstockd's memory, more than the 546 B that one user may have",
        "load fewer files at a time",
    ),
    provoked(
        charged(100, held_bytes=500),
        "headers, indexes and plans",
        "need 100 B more of penstockd's memory, and 46 B are left for uid 1000",
        "try again when other loads have ended",
    ),
    provoked(
        descriptors(700),
        "350 files",
        "need 700 descriptors, more than the 546 that one user may have",
        "raise the limit of open files",
    ),
    provoked(
        descriptors(100, held=500),
        "50 files",
        "need 100 descriptors, and 46 are left for uid 1000",
        "try again when other loads have ended",
    ),
    said(
        "penstockd",
        " cannot start a process to parse a header: its Python interpreter is unknown (sys.executable is "
        "empty); ",
        "start it with the command penstockd",
    ),
    provoked(
        lambda: opening().start(),
        "/m/x",
        "penstockd has no thread to read it",
        "raise the limit of processes",
    ),
    provoked(
        lambda: opening().too_late(),
        "/m/x",
        "storage did not give its header or index within 60 s",
        "check whether it answers",
    ),
    provoked(without_parser, "penstockd", "has no thread to parse a header", "raise the limit of processes"),
    said(
        "/m/x: a header or index of 9 MB",
        " needs a process of its own, which could not be started: Cannot allocate memory; ",
        "raise the limits of penstockd (open files, processes, memory), or try again later",
    ),
    provoked(without_spool, "a header or index of 801 B", "no memory is free for", "try again later"),
    said(
        "a header or index of 9 MB",
        " cannot be read: the machine or the control group has 1 MB of memory left for penstockd; ",
        "raise the limit, lower --memory-limit, or try again later",
    ),
    *(
        provoked(exhausted(error), "making 4 slabs of 2097152 bytes", wrong, remedy)
        for error, wrong, remedy in [
            (MemoryError(), "the system has no memory for it", "raise the limit of memory"),
            (system(errno.EMFILE), "penstockd has no descriptor left", "raise its limit of open files"),
            (
                NoThreadError("can't start new thread"),
                "penstockd can start no thread or process",
                "raise its limit of processes",
            ),
            (KeyError("x"), "failed by a fault of penstockd (KeyError)", "please report it"),
        ]
    ),
    # ---- requests
    provoked(
        lambda: names(MAX_UNPACKED_BYTES // NAME_COST_BYTES),
        "tensors",
        "157286 names are more than penstockd looks up at once",
        "load all",
    ),
    provoked(
        lambda: _variant("x" * (MAX_NAME_CHARACTERS + 1)),
        "variant",
        "it has 201 characters, more than 200",
        "name one such as fp16",
    ),
    provoked(
        lambda: check_sources(["x"] * (MAX_SOURCES + 1)),
        "sources",
        "2001 are more than 2000",
        "load fewer at a time",
    ),
    provoked(
        lambda: check_sources(["/" + "x" * MAX_SOURCE_BYTES]),
        "sources: '/xxx",
        "has 8193 bytes, more than 8192: the path is too long",
        "name a shorter one",
    ),
    provoked(refused(9, compressed=True), "the request message", "is compressed", "send it plain"),
    provoked(
        refused(MAX_MESSAGE_BYTES + 1),
        "the request message",
        "has 1048577 bytes, and penstockd takes at most 1048576",
        "update penstock",
    ),
    provoked(
        refused(UNAPPROVED_MESSAGE_BYTES + 1, small=True),
        "the request message",
        "has 4097 bytes, and this call takes at most 4096",
        "send a smaller one",
    ),
    provoked(
        lambda: stream(TOTAL).keep(TOTAL),
        "the requests of uid 1000",
        "hold 0 bytes of the daemon's memory, and those of all users 0 of 800",
        "send fewer at a time",
    ),
    said("the LoadRequest", " has more than 4096 fields; ", "send a smaller one"),
    said("the message", " is not a valid LoadRequest; ", "send one"),
    said("the EvictRequest", " is missing: the call ended before it; ", "send one"),
    said(
        "the LoadRequest",
        " did not arrive completely within 30 s; ",
        "send it at once when the call is opened",
    ),
    said(
        "the list of tensor names",
        " is not complete: no SelectTensors follows one with `more`; ",
        "send the rest",
    ),
    said(
        "the list of tensor names",
        " is not complete: no `tensors` follow some with `more`; ",
        "send the rest",
    ),
    said("the headers of the call", " are not complete; ", "call again"),
    said(
        "select",
        ": the client chose no tensors within 60 s after the listing; ",
        "choose sooner, or list the tensors with one load and name them in another",
    ),
    said("the value of a header field", " is not printable ASCII; ", "send text, or base64 as gRPC does"),
    # ---- connections and loads
    said(
        "uid 1000",
        " has 64 connections and may have no more now: all users have 65 of 256, of which each gets a "
        "share; ",
        "close some",
    ),
    said(
        "256 loads",
        " run or wait already, 200 of them of uid 1000; this user may have no more of the 256; ",
        "try again later, or raise --max-loads",
    ),
]
