"""The gate with real sockets and frames by hand; gRPC's place behind it is taken by the test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import stat
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from penstock.server.edge import frame_filter
from penstock.server.edge import gate as gates
from penstock.server.edge.frame_filter import CONTROL_AT_ONCE, MAX_CONTINUATIONS, MAX_HEADER_BLOCK_BYTES
from penstock.server.edge.gate import CONNECTION_BYTES, Gate
from penstock.server.edge.streams import (
    MAX_MESSAGE_BYTES,
    MAX_WAITING_MESSAGES,
    STREAM_BYTES,
    RequestStream,
)
from penstock.server.errors import ConfigError, InvalidRequestError, TooManyLoadsError
from penstock.server.system.quota import Quota

from ...attacks.hpack import Decoder, literal
from ...attacks.http2 import (
    PREFACE,
    Flag,
    Frame,
    Kind,
    call_fields,
    frame,
    grpc_message,
    ping,
    reset,
    settings,
    window_update,
)
from ..support import until

MIB = 1 << 20
HELLO = PREFACE + settings({})
ALLOWED_BACKLOG = int(Path("/proc/sys/net/core/somaxconn").read_text())


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not tmp_path: the path of a socket has to be short."""
    path = Path(tempfile.mkdtemp(prefix="pst-"))
    yield path
    shutil.rmtree(path)


class Behind:
    """What stands behind the gate, as gRPC does, and who connects before it."""

    def __init__(self, directory: Path, gate: Gate, memory: Quota, closed: Counter[str]) -> None:
        self.directory = directory
        self.gate = gate
        self.memory = memory
        self.closed = closed
        self.came: asyncio.Queue[End] = asyncio.Queue()
        self._ends: list[End] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.came.put_nowait(self._kept(reader, writer))

    async def client(self, said: bytes = HELLO) -> End:
        end = self._kept(*await asyncio.open_unix_connection(self.directory / "outer", limit=4 * MIB))
        end.say(said)
        return end

    async def pair(self, said: bytes = HELLO) -> tuple[End, End]:
        """A client and its server's end, which has heard the hello."""
        client = await self.client(said)
        server = await self.came.get()
        if said.startswith(HELLO):
            assert await server.reader.readexactly(len(HELLO)) == HELLO
        return client, server

    def _kept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> End:
        self._ends.append(End(reader, writer))
        return self._ends[-1]

    async def close(self) -> None:
        for end in self._ends:
            if not end.writer.transport.is_closing():
                end.writer.transport.abort()
            with contextlib.suppress(OSError):
                await end.writer.wait_closed()


class End:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._decoder = Decoder()

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    async def frame(self) -> Frame:
        head = await self.reader.readexactly(9)
        payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        return Frame(head[3], head[4], int.from_bytes(head[5:9], "big"), payload)

    async def request(self) -> tuple[Frame, list[tuple[str, bytes]]]:
        """The headers of the next call, and their fields."""
        came = await self.frame()
        assert came.kind == Kind.HEADERS
        assert came.flags & Flag.END_HEADERS
        return came, self._decoder.decode(came.payload)

    async def closed_with(self) -> str:
        """The words with which the gate closed the connection."""
        words = b""
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                came = await self.frame()
                if came.kind == Kind.GOAWAY:
                    words = came.payload[8:]
        return words.decode()

    async def silent(self) -> bool:
        """Nothing comes, for as long as the loop has anything to do."""
        for _ in range(200):
            await asyncio.sleep(0)
        return not self.reader._buffer  # type: ignore[attr-defined]


@pytest.fixture
def frequent_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a test waits a second for the first sweep."""
    monkeypatch.setattr(gates, "SWEEP_SECONDS", 0.01)


@pytest.fixture
async def behind(directory: Path) -> AsyncIterator[Behind]:
    memory, closed = Quota(48 * MIB), Counter[str]()
    gate = Gate(
        directory / "outer", memory=memory, allows=lambda uid: True, on_closed=lambda r: closed.update([r])
    )
    behind = Behind(directory, gate, memory, closed)
    server = await asyncio.start_unix_server(behind.serve, directory / "inner")
    await gate.start(str(directory / "inner"))
    yield behind
    await behind.close()
    await gate.stop()
    server.close()
    assert memory.used == 0


def headers(stream: int, block: bytes | None = None, flags: int = Flag.END_HEADERS) -> bytes:
    return frame(Kind.HEADERS, flags, stream, call_fields("/a/b") if block is None else block)


def data(stream: int, content: bytes, flags: int = 0) -> bytes:
    return frame(Kind.DATA, flags, stream, content)


async def test_a_crowd_that_connects_while_the_loop_is_busy_is_not_turned_away(behind: Behind) -> None:
    """Not by the kernel: it would answer EAGAIN, which gRPC's clients cannot tell from a daemon's end."""
    count = 1000
    if count > ALLOWED_BACKLOG:
        pytest.skip(f"net.core.somaxconn allows fewer than {count} connections to wait")
    with contextlib.ExitStack() as held:
        for _ in range(count):  # without a turn of the loop
            client = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            client.setblocking(False)
            client.connect(str(behind.directory / "outer"))
    await until(lambda: behind.gate._connections.used > 0)
    await until(lambda: not behind.memory.used)


# ---- bytes ---------------------------------------------------------------------------------------


async def test_frames_pass_both_ways_until_the_client_closes(behind: Behind) -> None:
    client, server = await behind.pair()
    client.say(headers(1) + data(1, grpc_message(b"question"), Flag.END_STREAM) + ping())
    claimed(behind, (await server.request())[1])
    assert (await server.frame()).payload == grpc_message(b"question")
    assert (await server.frame()).kind == Kind.PING
    server.say(b"".join(data(1, b"x" * 16384) for _ in range(512)))
    for _ in range(512):
        assert (await client.frame()).payload == b"x" * 16384
    client.writer.close()
    assert await server.reader.read() == b""


async def test_frames_may_come_byte_by_byte(behind: Behind) -> None:
    client, server = await behind.pair(b"")
    for byte in HELLO + headers(1) + data(1, grpc_message(b"hi"), Flag.END_STREAM):
        client.say(bytes([byte]))
        await asyncio.sleep(0)
    assert await server.reader.readexactly(len(HELLO)) == HELLO
    claimed(behind, (await server.request())[1])
    assert await server.frame() == Frame(Kind.DATA, Flag.END_STREAM, 1, grpc_message(b"hi"))


async def test_what_was_said_last_arrives_though_the_gate_stops(
    behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "FLUSH_SECONDS", 60.0)  # not the time that a machine takes for it is tested
    client, server = await behind.pair()
    server.say(b"goodbye" * MIB)
    server.writer.close()
    _, said = await asyncio.gather(behind.gate.stop(), client.reader.read())
    assert said == b"goodbye" * MIB


async def test_a_client_that_stays_does_not_keep_the_gate_from_stopping(
    behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "FLUSH_SECONDS", 0.01)
    client, _ = await behind.pair()
    await behind.gate.stop()
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await client.reader.readexactly(1)


async def test_a_server_is_held_up_by_a_client_that_does_not_read(behind: Behind) -> None:
    """Or what is on the way would be memory without a bound."""
    client, server = await behind.pair()
    server.writer.transport.set_write_buffer_limits(0)
    client.reader._limit = 0  # type: ignore[attr-defined]
    server.say(data(2, bytes(16384)) * 4096)
    left = size = server.writer.transport.get_write_buffer_size()
    while True:  # until nothing moves any more
        for _ in range(100):
            await asyncio.sleep(0)
        if (now := server.writer.transport.get_write_buffer_size()) == left:
            break
        left = now
    assert 48 * MIB < left <= size
    client.reader._limit = 4 * MIB  # type: ignore[attr-defined]
    assert len(await client.reader.readexactly(4096 * (9 + 16384))) == 4096 * (9 + 16384)


async def test_a_client_is_held_up_by_a_server_that_does_not_read(behind: Behind) -> None:
    client, server = await behind.pair()
    client.writer.transport.set_write_buffer_limits(0)
    server.reader._limit = 0  # type: ignore[attr-defined]
    client.say(headers(1))
    _, fields = await server.request()
    claimed(behind, fields).approve()
    client.say(data(1, grpc_message(bytes(MIB))[:16384]) + data(1, bytes(16384)) * 63)
    left = -1
    while (now := client.writer.transport.get_write_buffer_size()) != left:
        left = now
        for _ in range(100):
            await asyncio.sleep(0)
    assert behind.memory.used < 2 * MIB


async def test_without_anybody_behind_it_a_connection_is_closed(directory: Path) -> None:
    memory = Quota(MIB)
    gate = Gate(directory / "outer", memory=memory, allows=lambda uid: True)
    await gate.start(str(directory / "nobody"))
    reader, writer = await asyncio.open_unix_connection(directory / "outer")
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()
    assert memory.used == 0
    await gate.stop()


# ---- its socket ----------------------------------------------------------------------------------


def made_gate(directory: Path) -> Gate:
    return Gate(directory / "outer", memory=Quota(MIB), allows=lambda uid: True)


async def test_a_stale_socket_is_replaced_by_one_that_everybody_may_open(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(directory / "outer"))
    gate = made_gate(directory)
    await gate.start("nobody")
    assert stat.S_IMODE((directory / "outer").stat().st_mode) == 0o666
    await gate.stop()
    assert not (directory / "outer").exists()


async def test_a_socket_on_which_somebody_listens_is_left_alone(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(directory / "outer"))
        other.listen()
        gate = made_gate(directory)
        with pytest.raises(ConfigError, match="another penstockd listens"):
            await gate.start("nobody")
        await gate.stop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(directory / "outer"))


async def test_a_socket_that_took_the_place_of_its_own_is_left_alone(directory: Path) -> None:
    gate = made_gate(directory)
    await gate.start("nobody")
    (directory / "outer").unlink()
    (directory / "outer").write_text("another's")
    await gate.stop()
    assert (directory / "outer").read_text() == "another's"


# ---- requests ------------------------------------------------------------------------------------


def key_of(fields: list[tuple[str, bytes]]) -> str:
    return [value for name, value in fields if name == "penstock-stream"][-1].decode()


def claimed(behind: Behind, fields: list[tuple[str, bytes]]) -> RequestStream:
    stream = behind.gate.claim(key_of(fields))
    assert stream is not None
    return stream


async def take_calls(behind: Behind, server: End) -> list[RequestStream]:
    """Takes up every call, as gRPC does, until the connection ends."""
    calls = []
    with contextlib.suppress(asyncio.IncompleteReadError, OSError):
        await server.reader.readexactly(len(HELLO))
        while True:
            came = await server.frame()
            if came.kind == Kind.HEADERS:
                calls.append(claimed(behind, server._decoder.decode(came.payload)))
    return calls


async def test_a_request_carries_the_key_of_its_stream_once(behind: Behind) -> None:
    client, server = await behind.pair()
    client.say(headers(1) + headers(3))
    keys = [key_of((await server.request())[1]) for _ in range(2)]
    assert keys[0] != keys[1]
    assert behind.gate.claim(keys[0]) is not None
    assert behind.gate.claim(keys[0]) is None
    assert behind.gate.claim("made up") is None


async def test_a_key_that_the_client_sends_is_not_the_last(behind: Behind) -> None:
    client, server = await behind.pair()
    client.say(headers(1, call_fields("/a/b", [("penstock-stream", "f" * 32)])))
    _, fields = await server.request()
    assert [name for name, _ in fields].count("penstock-stream") == 2
    assert key_of(fields) != "f" * 32


@pytest.mark.parametrize("tables", [False, True])
async def test_the_key_follows_padding_priority_continuations_and_a_table_in_use(
    tables: bool, behind: Behind
) -> None:
    client, server = await behind.pair()
    block = b"".join(literal(name, "v", remembered=tables) for name in ("x-one", "x-two"))
    padded = bytes([5]) + b"\0\0\0\0\x10" + block[:4] + bytes(5)
    client.say(
        headers(1, padded, Flag.PADDED | Flag.PRIORITY)
        + frame(Kind.CONTINUATION, 0, 1, block[4:6])
        + frame(Kind.CONTINUATION, Flag.END_HEADERS, 1, block[6:])
    )
    came, fields = await server.request()
    assert not came.flags & (Flag.PADDED | Flag.PRIORITY)
    assert [name for name, _ in fields] == ["x-one", "x-two", "penstock-stream"]


async def test_messages_of_full_size_pass_only_when_the_call_is_approved(behind: Behind) -> None:
    client, server = await behind.pair()
    client.say(headers(1) + data(1, grpc_message(b"x" * 5000)))
    _, fields = await server.request()
    assert await server.silent()
    claimed(behind, fields).approve()
    assert (await server.frame()).payload == grpc_message(b"x" * 5000)


async def test_small_messages_pass_without_approval_but_few(behind: Behind) -> None:
    client, server = await behind.pair()
    client.say(headers(1) + data(1, grpc_message(b"x") * 100))
    claimed(behind, (await server.request())[1])
    assert len((await server.frame()).payload) < 4 * 6 + 5
    assert await server.silent()


async def test_messages_that_nobody_takes_hold_the_client_up(behind: Behind) -> None:
    client, server = await behind.pair()
    client.say(headers(1) + data(1, grpc_message(b"x") * 1000))
    _, fields = await server.request()
    stream = claimed(behind, fields)
    stream.approve()
    came = b""
    while len(came) < MAX_WAITING_MESSAGES * 6:
        came += (await server.frame()).payload
    assert len(came) < (MAX_WAITING_MESSAGES + 1) * 6
    assert await server.silent()
    while len(came) < 6000:
        stream.took()
        came += (await server.frame()).payload
    assert came == grpc_message(b"x") * 1000


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (b"\1\0\0\0\4", "compressed"),
        (b"\0\0\x10\0\1", f"{MAX_MESSAGE_BYTES + 1} bytes.*update penstock"),
        (b"\0\xff\xff\xff\xff", "4294967295 bytes"),
    ],
)
async def test_a_message_that_may_not_be_is_refused_in_words_and_the_others_go_on(
    prefix: bytes, words: str, behind: Behind
) -> None:
    client, server = await behind.pair()
    client.say(headers(1) + data(1, prefix + b"rest") + headers(3))
    _, fields = await server.request()
    stream = claimed(behind, fields)
    told: list[str] = []
    stream.on_refused = lambda: told.append("refused")
    stream.approve()
    with pytest.raises(InvalidRequestError, match=words):
        raise await refusal_of(stream)
    server.say(frame(Kind.RST_STREAM, 0, 1, bytes(4)))
    came = await server.frame()
    while came.kind != Kind.HEADERS:
        came = await server.frame()
    assert came.stream == 3


async def refusal_of(stream: RequestStream) -> Exception:
    await until(lambda: stream.refusal is not None)
    assert stream.refusal is not None
    return stream.refusal


@pytest.mark.usefixtures("frequent_sweeps")
async def test_a_message_waits_for_memory_and_is_refused_when_it_waits_too_long(
    behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = await behind.pair()
    uid = os.geteuid()
    taken = behind.memory.left(uid) - STREAM_BYTES - 100_000
    assert behind.memory.take(uid, taken)
    client.say(headers(1) + data(1, grpc_message(bytes(MIB))[:16384]))
    _, fields = await server.request()
    stream = claimed(behind, fields)
    stream.approve()
    await until(lambda: stream.starved)
    behind.memory.release(uid, taken)
    behind.gate.memory_freed()
    await until(lambda: not stream.starved)
    assert stream.messages == 1
    behind.gate._starved_seconds = 0.0
    taken = behind.memory.left(uid) - STREAM_BYTES - 200_000
    assert behind.memory.take(uid, taken)
    other, behind_other = await behind.pair()
    other.say(headers(1) + data(1, grpc_message(bytes(MIB))[:16384]))
    stream = claimed(behind, (await behind_other.request())[1])
    stream.approve()
    assert isinstance(await refusal_of(stream), TooManyLoadsError)
    behind.memory.release(uid, taken)


async def test_what_a_stream_held_comes_back_whoever_ends_it(behind: Behind) -> None:
    client, server = await behind.pair()
    client.say(b"".join(headers(number) for number in (1, 3, 5)))
    streams = [claimed(behind, (await server.request())[1]) for _ in range(3)]
    for stream in streams:
        stream.keep(MIB)
    assert behind.memory.used == CONNECTION_BYTES + 3 * (STREAM_BYTES + MIB)
    client.say(reset(1))
    server.say(frame(Kind.RST_STREAM, 0, 3, bytes(4)) + frame(Kind.HEADERS, Flag.END_STREAM, 5, b""))
    await until(lambda: behind.memory.used == CONNECTION_BYTES)
    for stream in streams:
        stream.took()
        stream.keep(1)
    assert behind.memory.used == CONNECTION_BYTES


@pytest.mark.parametrize("approved", [False, True])
async def test_answers_pass_in_large_pieces_to_calls_with_a_token_alone(
    approved: bool, behind: Behind
) -> None:
    client, server = await behind.pair()
    client.say(headers(1))
    stream = claimed(behind, (await server.request())[1])
    if approved:
        stream.approve()
    answer = data(1, bytes(range(256)) * 64)
    server.say(answer * 64)
    assert await client.reader.readexactly(64 * len(answer)) == answer * 64
    assert behind.gate.wide_connections == approved
    client.writer.close()
    await until(lambda: behind.gate.wide_connections == 0)


async def test_so_many_connections_are_passed_large_pieces_as_fit_into_their_bound(behind: Behind) -> None:
    behind.gate._wide = Quota(2, newcomers=0)
    answer = data(1, bytes(16384)) * 32
    for _ in range(3):
        client, server = await behind.pair()
        client.say(headers(1))
        claimed(behind, (await server.request())[1]).approve()
        server.say(answer)
        assert await client.reader.readexactly(len(answer)) == answer
    assert behind.gate.wide_connections == 2


async def test_calls_that_grpc_has_not_taken_wait_at_the_gate_by_user(
    behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "CALLS_TO_TAKE", 2)
    client, server = await behind.pair()
    client.say(b"".join(headers(number) for number in (1, 3, 5, 7)))
    waiting = [(await server.request())[1] for _ in range(2)]
    monkeypatch.setattr(gates, "peer", lambda connection: (1, 70001))
    other, behind_other = await behind.pair()
    other.say(headers(1))
    await behind_other.request()
    assert await server.silent()
    for _ in range(2):
        claimed(behind, waiting.pop(0))
        waiting.append((await server.request())[1])


async def test_a_reset_waits_until_grpc_has_taken_the_call_and_so_does_the_end_of_the_connection(
    behind: Behind,
) -> None:
    """gRPC keeps calls that ended before in its queue, and says of none when it is gone."""
    client, server = await behind.pair()
    client.say(headers(1) + reset(1))
    _, fields = await server.request()
    assert await server.silent()
    claimed(behind, fields)
    assert (await server.frame()).kind == Kind.RST_STREAM
    client.say(headers(3))
    _, fields = await server.request()
    client.writer.close()
    assert await server.silent()
    assert not server.reader.at_eof()
    claimed(behind, fields)
    assert await server.reader.read() == b""


async def test_calls_of_a_connection_that_breaks_a_rule_are_taken_before_it_ends(behind: Behind) -> None:
    client, server = await behind.pair()
    client.say(headers(1) + data(2, b"x"))
    _, fields = await server.request()
    assert "makes no sense" in await client.closed_with()
    claimed(behind, fields)
    assert await server.reader.read() == b""
    assert behind.closed == {"protocol": 1}


@pytest.mark.usefixtures("frequent_sweeps")
async def test_a_connection_whose_calls_are_never_taken_ends_after_a_while(behind: Behind) -> None:
    client, server = await behind.pair()
    client.say(headers(1))
    await server.request()
    client.writer.close()
    assert await server.silent()
    behind.gate._idle_seconds = -1.0
    with contextlib.suppress(OSError):
        assert await server.reader.read() == b""
    await until(lambda: not behind.memory.used)


# ---- floods --------------------------------------------------------------------------------------


@pytest.fixture
def no_second_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine that stands still for a second would let another second's frames pass."""
    monkeypatch.setattr(frame_filter, "CONTROL_PER_SECOND", 1e-6)


FLOODS = {
    "PING": ping(),
    "SETTINGS": settings({4: 70000}),
    "WINDOW_UPDATE": window_update(0, 1),
    "PRIORITY": frame(Kind.PRIORITY, 0, 1, bytes(5)),
    "unknown": frame(77, 0, 0, b""),
    "empty DATA": data(1, b""),
    "RST_STREAM": reset(1),
}


@pytest.mark.usefixtures("no_second_passes")
@pytest.mark.parametrize("kind", FLOODS)
async def test_frames_without_use_end_the_connection_when_they_are_too_many(
    kind: str, behind: Behind
) -> None:
    client, server = await behind.pair()
    client.say(headers(1))
    claimed(behind, (await server.request())[1])
    server.writer.transport.set_write_buffer_limits(0)

    async def take() -> int:
        return len(await server.reader.read(-1))

    taking = asyncio.ensure_future(take())
    with contextlib.suppress(OSError):
        for _ in range(100):
            client.say(FLOODS[kind] * 1000)
            await client.writer.drain()
            await asyncio.sleep(0)
    await client.closed_with()
    assert await taking <= (CONTROL_AT_ONCE + 500) * len(FLOODS[kind])
    assert behind.closed == {"flood": 1}


@pytest.mark.usefixtures("no_second_passes")
@pytest.mark.parametrize("flags", [0, Flag.END_STREAM])
async def test_empty_data_counts_as_a_flood_when_its_call_has_ended(flags: int, behind: Behind) -> None:
    """As that of a call without a token does at once."""
    client, server = await behind.pair()
    client.say(headers(1))
    claimed(behind, (await server.request())[1])
    server.say(frame(Kind.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, 1, b"") + reset(1))
    while (await client.frame()).kind != Kind.RST_STREAM:
        pass
    taking = asyncio.ensure_future(server.reader.read(-1))
    with contextlib.suppress(OSError):
        for _ in range(10):
            client.say(data(1, b"", flags) * 1000)
            await client.writer.drain()
    assert "too many DATA frames" in await client.closed_with()
    await taking
    assert behind.closed == {"flood": 1}


@pytest.mark.usefixtures("no_second_passes")
async def test_a_flood_is_told_why_it_ends(behind: Behind) -> None:
    client, server = await behind.pair()
    taking = asyncio.ensure_future(server.reader.read(-1))
    client.say(ping() * 3000)
    assert "too many PING frames" in await client.closed_with()
    await taking


@pytest.mark.parametrize(
    ("part", "count"), [(b"", MAX_CONTINUATIONS + 1), (b"x" * 100, MAX_CONTINUATIONS + 1), (b"x" * 9000, 2)]
)
async def test_headers_in_too_many_parts_or_bytes_never_reach_grpc(
    part: bytes, count: int, behind: Behind
) -> None:
    client, server = await behind.pair()
    client.say(headers(1, b"", 0))
    with contextlib.suppress(OSError):
        for _ in range(count):
            client.say(frame(Kind.CONTINUATION, 0, 1, part))
            await client.writer.drain()
    assert await server.reader.read(-1) == b""
    assert behind.closed == {"flood": 1}


async def test_headers_of_the_largest_size_pass(behind: Behind) -> None:
    client, server = await behind.pair()
    block = b"\x82" * MAX_HEADER_BLOCK_BYTES  # ":method: GET" by its index, over and over
    client.say(headers(1, block))
    came = await server.frame()
    assert came.payload.startswith(block)
    assert len(came.payload) <= 16384


BREACHES = {
    "a header that is not text": HELLO + headers(1, b"\x04\x02/\xff"),
    "no preface": b"GET / HTTP/1.1\r\n\r\n",
    "another preface": PREFACE[:-1] + b"x",
    "too long a frame": HELLO + frame(Kind.PING, 0, 0, b"x" * 16385),
    "DATA of no stream": HELLO + data(1, b"x"),
    "DATA of stream 0": HELLO + data(0, b"x"),
    "DATA of an even stream": HELLO + headers(3) + data(2, b"x"),
    "padded DATA": HELLO + headers(1) + data(1, b"\0x", Flag.PADDED),
    "DATA amid headers": HELLO + headers(1, b"", 0) + data(1, b"x"),
    "PING amid headers": HELLO + headers(1, b"", 0) + ping(),
    "headers amid headers": HELLO + headers(1, b"", 0) + headers(3),
    "a stray CONTINUATION": HELLO + frame(Kind.CONTINUATION, Flag.END_HEADERS, 1, b""),
    "CONTINUATION of another stream": HELLO + headers(1, b"", 0) + frame(Kind.CONTINUATION, 4, 3, b""),
    "an even stream": HELLO + headers(2),
    "a stream again": HELLO + headers(3) + headers(3),
    "an earlier stream": HELLO + headers(3) + headers(1),
    "more padding than there is": HELLO + headers(1, b"\xff123", Flag.PADDED | Flag.END_HEADERS),
    "a short PING": HELLO + frame(Kind.PING, 0, 0, b"1234567"),
    "a short RST_STREAM": HELLO + headers(1) + frame(Kind.RST_STREAM, 0, 1, b"123"),
    "RST_STREAM of no stream": HELLO + reset(1),
    "a PUSH_PROMISE": HELLO + headers(1) + frame(Kind.PUSH_PROMISE, 4, 1, bytes(8)),
    "SETTINGS of a stream": HELLO + frame(Kind.SETTINGS, 0, 1, b""),
}


@pytest.mark.parametrize("case", BREACHES)
async def test_what_breaks_http_2_ends_the_connection(case: str, behind: Behind) -> None:
    client = await behind.client(BREACHES[case])
    taking = asyncio.ensure_future(take_calls(behind, await behind.came.get()))
    await client.closed_with()
    await taking
    assert behind.closed.total() == 1
    assert set(behind.closed) <= {"protocol", "flood"}


async def test_frames_that_nobody_needs_do_not_reach_grpc(behind: Behind) -> None:
    client, server = await behind.pair()
    client.say(frame(77, 0, 0, b"x") + frame(Kind.PRIORITY, 0, 1, bytes(5)) + ping())
    assert (await server.frame()).kind == Kind.PING


@pytest.mark.usefixtures("frequent_sweeps")
async def test_a_connection_without_a_call_is_closed_after_a_while(behind: Behind) -> None:
    client, server = await behind.pair()
    busy, behind_busy = await behind.pair()
    busy.say(headers(1))
    await behind_busy.request()
    trusted, behind_trusted = await behind.pair()
    trusted.say(headers(1))
    claimed(behind, (await behind_trusted.request())[1]).approve()
    behind_trusted.say(frame(Kind.RST_STREAM, 0, 1, bytes(4)))
    assert (await trusted.frame()).kind == Kind.RST_STREAM
    behind.gate._idle_seconds = -1.0
    assert "connect again" in await client.closed_with()
    assert await server.reader.read(-1) == b""
    assert behind.closed == {"idle": 1}
    for end in (busy, trusted):
        end.say(ping())
    for end in (behind_busy, behind_trusted):
        assert (await end.frame()).kind == Kind.PING
