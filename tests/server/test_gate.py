from __future__ import annotations

import asyncio
import shutil
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from penstock.server import gate as gates
from penstock.server.gate import Gate

MIB = 1 << 20


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not tmp_path: the path of a socket has to be short."""
    path = Path(tempfile.mkdtemp(prefix="pst-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def gate(directory: Path) -> AsyncIterator[Gate]:
    gate = Gate(directory / "outer", directory / "inner", allows=lambda uid: True)
    await gate.start()
    yield gate
    await gate.stop()


class Inner:
    """What stands behind the gate: hands out the connections that come."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "inner"
        self.came: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def __aenter__(self) -> Inner:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.came.put_nowait((reader, writer))

        self._server = await asyncio.start_unix_server(serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()


async def test_bytes_pass_both_ways_until_the_client_closes(gate: Gate, directory: Path) -> None:
    async with Inner(directory) as inner:
        reader, writer = await asyncio.open_unix_connection(directory / "outer")
        writer.write(b"question" * MIB)
        their_reader, their_writer = await inner.came.get()
        assert await their_reader.readexactly(8 * MIB) == b"question" * MIB
        their_writer.write(b"answer" * MIB)
        assert await reader.readexactly(6 * MIB) == b"answer" * MIB
        writer.close()
        assert await their_reader.read() == b""
        their_writer.close()


async def test_what_was_said_last_arrives_though_the_gate_stops(
    gate: Gate, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "FLUSH_SECONDS", 60.0)  # not the time that a machine takes for it is tested
    async with Inner(directory) as inner:
        reader, writer = await asyncio.open_unix_connection(directory / "outer")
        _, their_writer = await inner.came.get()
        their_writer.write(b"goodbye" * MIB)
        their_writer.close()
        _, said = await asyncio.gather(gate.stop(), reader.read())
        assert said == b"goodbye" * MIB
        writer.close()


async def test_a_client_that_stays_does_not_keep_the_gate_from_stopping(gate: Gate, directory: Path) -> None:
    async with Inner(directory) as inner:
        reader, writer = await asyncio.open_unix_connection(directory / "outer")
        _, their_writer = await inner.came.get()
        await gate.stop()
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
        their_writer.close()


@pytest.mark.parametrize("side", ["client", "server"])
async def test_who_sends_is_held_up_by_who_does_not_take(side: str, gate: Gate, directory: Path) -> None:
    """Or what is on the way would be memory without a bound."""
    async with Inner(directory) as inner:
        reader, writer = await asyncio.open_unix_connection(directory / "outer", limit=MIB)
        their_reader, their_writer = await inner.came.get()
        sender, taker = (writer, their_reader) if side == "client" else (their_writer, reader)
        sender.transport.set_write_buffer_limits(0)
        sender.write(bytes(64 * MIB))
        draining = asyncio.ensure_future(sender.drain())
        gone = 0
        while (left := left_in(sender)) != gone:  # until nothing moves any more
            gone = left
            for _ in range(100):
                await asyncio.sleep(0)
        assert 32 * MIB < left < 64 * MIB
        assert await taker.readexactly(64 * MIB) == bytes(64 * MIB)
        await draining
        for each in (writer, their_writer):
            each.close()


def left_in(sender: asyncio.StreamWriter) -> int:
    """Bytes that it could not get rid of yet."""
    size: int = sender.transport.get_write_buffer_size()
    return size


async def test_without_anybody_behind_it_a_connection_is_closed(gate: Gate, directory: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(directory / "outer")
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()


async def test_a_stale_socket_is_replaced_by_one_that_everybody_may_open(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(directory / "outer"))
    gate = Gate(directory / "outer", directory / "inner", allows=lambda uid: True)
    await gate.start()
    assert stat.S_IMODE((directory / "outer").stat().st_mode) == 0o666
    await gate.stop()
    assert not (directory / "outer").exists()
