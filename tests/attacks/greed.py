"""Attacks with a token: loads that cost more than their share, and clients that never finish."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Sequence

from penstock.client import StreamerClient
from penstock.v1 import streamer_pb2 as pb

from . import hostile_files
from .http2 import Setting
from .strangers import ROUND_SECONDS, STREAMS_PER_CONNECTION, Place, attack

MIB = 1 << 20
LOADS = 60
"""Of one stranger at once: with three strangers, and several attacks of each, more than there may be."""


def _loads(
    place: Place,
    request: pb.OpenLoad | bytes,
    count: int = LOADS,
    *,
    reads: bool = True,
    seconds: float = ROUND_SECONDS,
    more: Sequence[bytes] = (),
    method: str = "Load",
) -> None:
    """Begins loads and holds them for a round; with `reads` false it takes nothing of what the daemon says.

    `more` are messages that each load sends after its opening."""
    opening = request if isinstance(request, bytes) else pb.LoadRequest(open=request).SerializeToString()
    window = {} if reads else {Setting.INITIAL_WINDOW_SIZE: 0}
    with contextlib.ExitStack() as held:
        connections = []
        for number in range(count):
            if number % STREAMS_PER_CONNECTION == 0:
                connections.append(held.enter_context(place.connect(settings_sent=window)))
            token = held.enter_context(place.session())
            stream = connections[-1].open_stream(method, [("penstock-session", token)])
            for message in (opening, *more):
                connections[-1].send_message(stream, message)
        for connection in connections:
            connection.linger(seconds / len(connections))


def _open(*sources: object, **fields: object) -> pb.OpenLoad:
    return pb.OpenLoad(sources=map(str, sources), **fields)  # type: ignore[arg-type]


@attack
def costly_headers(place: Place) -> None:
    _loads(place, _open(place.models / hostile_files.COSTLY))


@attack
def deep_headers(place: Place) -> None:
    _loads(place, _open(place.models / hostile_files.DEEP))


@attack
def many_sources(place: Place) -> None:
    _loads(place, _open(*[place.models / hostile_files.SMALL] * 2000))


@attack
def long_sources(place: Place) -> None:
    """Three sources of 5 MiB."""
    _loads(place, _open(*[f"{place.models}/{letter * 5 * MIB}" for letter in "abc"]), 3)


@attack
def many_names(place: Place) -> None:
    """A selection of eight million empty names."""
    names = b"\x0a\x00" * 8_000_000
    source = str(place.models / hostile_files.SMALL).encode()
    selection = b"\x12" + _varint(len(names)) + names
    opening = b"\x0a" + _varint(len(source)) + source + selection
    _loads(place, b"\x0a" + _varint(len(opening)) + opening, 1)


@attack
def listings_without_a_choice(place: Place) -> None:
    """Each holds the descriptors of what it listed."""
    _loads(place, _open(*[place.models / hostile_files.SMALL] * 500, list_tensors=True))


@attack
def all_loads(place: Place) -> None:
    _loads(place, _open(place.models / hostile_files.SMALL, list_tensors=True), 240)


@attack
def indexes_of_many_tensors(place: Place) -> None:
    _loads(place, _open(place.models / hostile_files.INDEX_OF_TENSORS), 6)


@attack
def indexes_of_many_files(place: Place) -> None:
    _loads(place, _open(place.models / hostile_files.INDEX_OF_FILES), 6)


@attack
def long_names(place: Place) -> None:
    _loads(place, _open(place.models / hostile_files.LONG_NAMES), 20)


@attack
def long_names_nobody_reads(place: Place) -> None:
    """Listings and manifests that wait for a client without a window."""
    _loads(place, _open(place.models / hostile_files.LONG_NAMES, list_tensors=True), 20, reads=False)


@attack
def many_tensors_nobody_reads(place: Place) -> None:
    _loads(place, _open(place.models / hostile_files.MANY_TENSORS), 20, reads=False)


@attack
def huge_rank(place: Place) -> None:
    _loads(place, _open(place.models / hostile_files.HUGE_RANK), 6)


@attack
def large_metadata_in_files(place: Place) -> None:
    _loads(place, _open(*[place.models / hostile_files.METADATA] * 200), 6)


@attack
def windows_nobody_releases(place: Place) -> None:
    _loads(place, _open(place.models / hostile_files.LARGE, memory_limit_bytes=0), 30)


@attack
def groups_nobody_joins(place: Place) -> None:
    source = place.models / hostile_files.LARGE
    for number in range(3):
        group = pb.LoadGroup(name=f"{os.getpid()}-{number}", size=8)
        _loads(place, _open(source, group=group), 5, seconds=ROUND_SECONDS / 3)


@attack
def release_flood(place: Place) -> None:
    """Release messages by the hundred thousand, of a load that waits for a choice."""
    release = pb.LoadRequest(release=pb.Release(segments=0)).SerializeToString()
    opening = _open(place.models / hostile_files.SMALL, list_tensors=True)
    with place.connect() as connection, place.session() as token:
        stream = connection.open_stream("Load", [("penstock-session", token)])
        connection.send_message(stream, pb.LoadRequest(open=opening).SerializeToString())
        unit = (b"\0" + len(release).to_bytes(4, "big") + release) * 2000
        end = time.monotonic() + ROUND_SECONDS
        while time.monotonic() < end and not connection.closed and not connection.over(stream):
            if (room := connection.window_bytes(stream)) > 0:
                connection.send_data(stream, unit[:room])
            else:
                connection.linger(0.001)


@attack
def fetches_nobody_reads(place: Place) -> None:
    """Of all that the daemon may read, weights included."""
    request = pb.FetchRequest(source=str(place.models), allow=["*"], max_bytes=1 << 50, max_files=100_000)
    _loads(place, request.SerializeToString(), reads=False, method="Fetch")


@attack
def fetches_given_up_at_once(place: Place) -> None:
    end = time.monotonic() + ROUND_SECONDS
    request = pb.FetchRequest(source=str(place.models), allow=["*"]).SerializeToString()
    while time.monotonic() < end:
        _loads(place, request, 5, seconds=0.01, method="Fetch")


@attack
def fetches_with_costly_patterns_and_lists(place: Place) -> None:
    have = [pb.FetchedFile(name="x" * 200, version=str(number)) for number in range(3000)]
    request = pb.FetchRequest(
        source=str(place.models), allow=["*a" * 128] * 32, ignore=["[!a]*" * 51] * 32, have=have, more=True
    )
    parts = [pb.FetchRequest(have=have, more=True).SerializeToString()] * 20
    _loads(place, request.SerializeToString(), more=parts, method="Fetch")


@attack
def loads_given_up_at_once(place: Place) -> None:
    """Connections that end in the middle of whatever the daemon does for them."""
    end = time.monotonic() + ROUND_SECONDS
    while time.monotonic() < end:
        _loads(place, _open(place.models / hostile_files.LARGE), 5, seconds=0.01)


@attack
def a_file_that_never_stays_the_same(place: Place) -> None:
    """Overwrites a file of its own in place while it loads it, over and over."""
    path = place.own / f"{os.getpid()}.safetensors"
    end = time.monotonic() + ROUND_SECONDS
    with StreamerClient(place.socket_dir, reconnect_timeout=0) as client:
        while time.monotonic() < end:
            hostile_files.write_tensors(path, {f"t{number}": MIB for number in range(4)})
            with client.load(path, owned=False) as load:
                for _ in load:
                    with path.open("r+b") as file:
                        file.seek(4096)
                        file.write(os.urandom(MIB))


@attack
def files_with_leases(place: Place) -> None:
    """Whoever opens one waits for 45 s."""
    path = place.own / f"leased-{os.getpid()}.safetensors"
    hostile_files.write_tensors(path, {"t": 1024})
    with path.open("r+b") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(file, fcntl.F_SETOWN, 0)  # or this process would be sent a signal
        _loads(place, _open(path))


@attack
def writes_to_files_that_are_open(place: Place) -> None:
    """Loads that stand still keep files open, and the daemon is told of each write to them."""
    paths = [place.own / f"written-{os.getpid()}-{number}.safetensors" for number in range(2)]
    end = time.monotonic() + ROUND_SECONDS
    with contextlib.ExitStack() as held:
        for path in paths:
            hostile_files.write_tensors(path, {f"{path.stem}.{number}": MIB for number in range(8)})
        files = [held.enter_context(path.open("r+b", buffering=0)) for path in paths]
        client = held.enter_context(StreamerClient(place.socket_dir, reconnect_timeout=0))
        load = held.enter_context(client.load(paths, memory_limit=4 * MIB, owned=False))
        next(iter(load))
        while time.monotonic() < end:
            for file in files:
                os.pwrite(file.fileno(), b"x", 4096)


@attack
def names_that_change_without_end(place: Place) -> None:
    one, other = (place.own / f"{name}-{os.getpid()}" for name in ("one", "other"))
    one.mkdir(exist_ok=True)
    end = time.monotonic() + ROUND_SECONDS
    while time.monotonic() < end:
        one.rename(other)
        other.rename(one)
    one.rmdir()


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
