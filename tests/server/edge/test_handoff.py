"""The handoff socket with real connections, on a loop whose clock the tests set forward."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
import stat
import tempfile
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import pytest

from penstock.server.edge.handoff import (
    MAX_FDS_PER_PACKET,
    MAX_SESSIONS_PER_UID,
    SEND_TIMEOUT_SECONDS,
    HandoffServer,
    Session,
)
from penstock.server.edge.unix import ACCEPT_PAUSE_SECONDS
from penstock.server.errors import PenstockError, SessionRequiredError
from penstock.server.system import quota
from penstock.v1 import streamer_pb2 as pb

from ..support import advance, more_fds, on_clock_loop, open_fds, turns, until


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not tmp_path: a socket's path has to be short."""
    path = Path(tempfile.mkdtemp(prefix="pst-"))
    yield path
    shutil.rmtree(path)


@asynccontextmanager
async def serving(
    directory: Path, *, allowed: bool = True, refusals: list[PenstockError] | None = None
) -> AsyncIterator[HandoffServer]:
    """A server that must end without sessions and without a descriptor too many."""
    before = open_fds()
    told = [] if refusals is None else refusals
    server = HandoffServer(
        directory / "handoff.sock", version="1.2.3", allows=lambda uid: allowed, on_refused=told.append
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()
    assert server.sessions == 0
    assert not (directory / "handoff.sock").exists()
    assert not more_fds(before)


def connect(directory: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(str(directory / "handoff.sock"))
    client.setblocking(False)
    return client


async def receive(client: socket.socket) -> tuple[pb.HandoffFrame, list[int]]:
    """One packet; its frame and descriptors. ConnectionError at the end."""
    while True:
        try:
            data, ancillary, flags, _ = client.recvmsg(
                65536, socket.CMSG_SPACE(4 * MAX_FDS_PER_PACKET), socket.MSG_CMSG_CLOEXEC
            )
            break
        except BlockingIOError:
            await asyncio.sleep(0)
    if not data:
        raise ConnectionError("the other end closed")
    assert not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)
    fds = array("i")
    for _, _, content in ancillary:
        fds.frombytes(content)
    return pb.HandoffFrame.FromString(data), list(fds)


async def receive_for_ever(client: socket.socket) -> None:
    while True:
        await receive(client)


async def open_session(server: HandoffServer, directory: Path) -> tuple[socket.socket, Session]:
    client = connect(directory)
    frame, fds = await receive(client)
    assert not fds
    return client, server.session(frame.hello.token)


@on_clock_loop
async def test_a_client_is_told_a_token_that_opens_its_session(directory: Path) -> None:
    async with serving(directory) as server:
        with closing(connect(directory)) as client, closing(connect(directory)) as other:
            frame, _ = await receive(client)
            assert frame.WhichOneof("frame") == "hello"
            assert frame.hello.daemon_version == "1.2.3"
            assert len(bytes.fromhex(frame.hello.token)) == 16
            session = server.session(frame.hello.token)
            assert (session.uid, session.pid) == (os.geteuid(), os.getpid())
            second, _ = await receive(other)
            assert second.hello.token != frame.hello.token
            assert server.session(second.hello.token) is not session
            assert server.sessions == 2


@on_clock_loop
async def test_a_wrong_token_opens_nothing(directory: Path) -> None:
    async with serving(directory) as server:
        client, session = await open_session(server, directory)
        for token in (None, "", "0" * 32, session.token.encode(), session.token.upper() + "x"):
            with pytest.raises(SessionRequiredError, match=r"handoff\.sock"):
                server.session(token)
        client.close()
        await until(lambda: session.closed)
        with pytest.raises(SessionRequiredError):
            server.session(session.token)


@on_clock_loop
async def test_the_connections_end_releases_everything_once_in_order(directory: Path) -> None:
    async with serving(directory) as server:
        client, session = await open_session(server, directory)
        released: list[str] = []
        session.on_close(lambda: released.append("first"))
        session.on_close(lambda: released.append("second"))
        await turns()
        assert released == []
        client.close()
        await until(lambda: session.closed)
        session.close()
        await turns()
        assert released == ["first", "second"]
        assert server.sessions == 0
        session.on_close(lambda: released.append("late"))
        assert released == ["first", "second", "late"]


@pytest.mark.parametrize("how", ["shutdown", "garbage", "descriptors", "many"])
@on_clock_loop
async def test_a_client_that_breaks_the_protocol_loses_its_session_only(directory: Path, how: str) -> None:
    async with serving(directory) as server:
        client, session = await open_session(server, directory)
        other, unharmed = await open_session(server, directory)
        released: list[str] = []
        session.on_close(lambda: released.append("released"))
        if how == "shutdown":
            client.shutdown(socket.SHUT_WR)
        elif how == "garbage":
            client.send(b"\xff" * 1000)
        elif how == "descriptors":
            socket.send_fds(client, [b"take these"], [client.fileno()] * 100)
        else:
            for _ in range(100):
                try:
                    client.send(b"x")
                except BlockingIOError:
                    break
        await until(lambda: session.closed)
        assert released == ["released"]
        with pytest.raises(ConnectionError):
            await receive_for_ever(client)
        assert not unharmed.closed
        assert server.session(unharmed.token) is unharmed
        client.close()
        other.close()


@on_clock_loop
async def test_a_process_that_forks_keeps_its_session_until_the_last_copy_is_closed(directory: Path) -> None:
    async with serving(directory) as server:
        client, session = await open_session(server, directory)
        copy = client.dup()
        client.close()
        await turns()
        assert not session.closed
        copy.close()
        await until(lambda: session.closed)


@pytest.mark.parametrize("count", [0, 1, MAX_FDS_PER_PACKET, MAX_FDS_PER_PACKET + 1, 700])
@on_clock_loop
async def test_descriptors_arrive_in_order_in_as_many_packets_as_it_takes(
    directory: Path, count: int
) -> None:
    async with serving(directory) as server:
        client, session = await open_session(server, directory)
        with socket.socket() as one, socket.socket() as two:
            files = [one.fileno(), two.fileno()]
            inodes = [os.fstat(fd).st_ino for fd in files]
            pattern = [(number * number // 7) % 2 for number in range(count)]
            sending = asyncio.ensure_future(session.send_slabs([files[which] for which in pattern]))
            received: list[int] = []
            while len(received) < count:
                frame, fds = await receive(client)
                assert (frame.slabs.first, frame.slabs.count) == (len(received), len(fds))
                assert 1 <= len(fds) <= MAX_FDS_PER_PACKET
                for fd in fds:
                    received.append(inodes.index(os.fstat(fd).st_ino))
                    os.close(fd)
            await sending
            assert received == pattern
            os.fstat(files[0])  # the sender keeps its own
        with pytest.raises(BlockingIOError):
            client.recv(1)
        client.close()


def fill(session: Session) -> None:
    """Sends until nothing more fits, as if the client had been told much and had taken nothing."""
    with suppress(BlockingIOError):
        while True:
            session.send_now(pb.HandoffFrame(slabs=pb.HandoffSlabs()))


def drain(client: socket.socket) -> None:
    """Takes all that has come."""
    with suppress(BlockingIOError):
        while True:
            client.recv(65536)


@on_clock_loop
async def test_a_client_that_takes_nothing_times_out_and_stalls_nobody(directory: Path) -> None:
    async with serving(directory) as server:
        stuck, stuck_session = await open_session(server, directory)
        client, session = await open_session(server, directory)
        fill(stuck_session)
        sending = asyncio.ensure_future(stuck_session.send_slabs([stuck.fileno()]))
        await turns()
        await session.send_slabs([client.fileno()])
        _, fds = await receive(client)
        os.close(fds[0])
        advance(SEND_TIMEOUT_SECONDS - 1)
        await turns()
        assert not sending.done()
        advance(2)
        with pytest.raises(SessionRequiredError, match="is not read"):
            await sending
        assert not stuck_session.closed
        stuck.close()
        client.close()
        await until(lambda: server.sessions == 0)


@on_clock_loop
async def test_a_slow_client_gets_its_descriptors_when_it_takes_what_came_before(directory: Path) -> None:
    async with serving(directory) as server:
        client, session = await open_session(server, directory)
        fill(session)
        sending = asyncio.ensure_future(session.send_slabs([client.fileno()]))
        await turns()
        assert not sending.done()
        while True:
            _, fds = await receive(client)
            if fds:
                break
        await sending
        os.close(fds[0])
        client.close()


@on_clock_loop
async def test_a_client_that_goes_while_it_is_waited_for_ends_the_wait(directory: Path) -> None:
    async with serving(directory) as server:
        client, session = await open_session(server, directory)
        fill(session)
        sending = asyncio.ensure_future(session.send_slabs([0]))
        await turns()
        client.close()
        with pytest.raises(SessionRequiredError, match="is closed"):
            await sending
        with pytest.raises(SessionRequiredError, match="is closed"):
            await session.send_slabs([0])


@on_clock_loop
async def test_a_load_that_is_cancelled_while_it_hands_out_slabs_leaves_the_session_working(
    directory: Path,
) -> None:
    async with serving(directory) as server:
        client, session = await open_session(server, directory)
        fill(session)
        sending = asyncio.ensure_future(session.send_slabs([client.fileno()]))
        await turns()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        drain(client)
        await turns()
        await session.send_slabs([client.fileno()])
        _, fds = await receive(client)
        os.close(fds[0])
        client.close()


@on_clock_loop
async def test_who_may_load_nothing_is_told_why(directory: Path) -> None:
    refusals: list[PenstockError] = []
    async with serving(directory, allowed=False, refusals=refusals) as server:
        with closing(connect(directory)) as client:
            frame, _ = await receive(client)
            assert frame.WhichOneof("frame") == "refused"
            assert frame.refused.reason == "ACCESS_DENIED"
            assert f"uid {os.geteuid()} may load nothing" in frame.refused.message
            with pytest.raises(ConnectionError):
                await receive(client)
        assert server.sessions == 0
    assert [error.reason for error in refusals] == ["ACCESS_DENIED"]


@on_clock_loop
async def test_one_user_cannot_have_all_connections(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "is_privileged", lambda uid: False)  # this process is the daemon's own user
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * MAX_SESSIONS_PER_UID + 200:
        pytest.skip("this process may not open so many descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    clients: list[socket.socket] = []
    try:
        async with serving(directory) as server:
            while len(clients) < MAX_SESSIONS_PER_UID:
                for _ in range(64):
                    clients.append(connect(directory))
                await until(lambda: server.sessions == len(clients))
            with closing(connect(directory)) as refused:
                frame, _ = await receive(refused)
                assert frame.refused.reason == "TOO_MANY_LOADS"
                assert f"has {MAX_SESSIONS_PER_UID} connections and may have no more" in frame.refused.message
            clients.pop().close()
            await until(lambda: server.sessions == len(clients))
            clients.append(connect(directory))
            frame, _ = await receive(clients[-1])
            assert frame.hello.token
            while clients:
                clients.pop().close()
    finally:
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@on_clock_loop
async def test_running_out_of_descriptors_pauses_accepting_and_nothing_else(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(directory) as server:
        other, session = await open_session(server, directory)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        client = connect(directory)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            await turns(50)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert caplog.text.count("could not be accepted") == 1
        assert not session.closed
        await session.send_slabs([other.fileno()])
        advance(ACCEPT_PAUSE_SECONDS + 0.1)
        frame, _ = await receive(client)
        assert server.session(frame.hello.token)
        _, fds = await receive(other)
        os.close(fds[0])
        client.close()
        other.close()


@on_clock_loop
async def test_a_client_that_is_gone_before_its_first_packet_leaves_nothing(directory: Path) -> None:
    async with serving(directory) as server:
        for _ in range(100):
            connect(directory).close()
        await until(lambda: server.sessions == 0)
        client, _ = await open_session(server, directory)
        client.close()


@on_clock_loop
async def test_stopping_ends_every_session_and_releases_what_it_holds(directory: Path) -> None:
    async with serving(directory) as server:
        client, session = await open_session(server, directory)
        released: list[str] = []
        session.on_close(lambda: released.append("released"))
        server.stop()
        assert released == ["released"]
        with pytest.raises(ConnectionError):
            await receive(client)
        client.close()


@on_clock_loop
async def test_a_stale_socket_is_replaced_and_everybody_may_connect(directory: Path) -> None:
    path = directory / "handoff.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    async with serving(directory) as server:
        client, _ = await open_session(server, directory)
        assert stat.S_IMODE(path.stat().st_mode) & 0o666 == 0o666
        client.close()


@on_clock_loop
async def test_a_socket_that_took_the_place_of_its_own_is_left_alone(directory: Path) -> None:
    server = HandoffServer(
        directory / "handoff.sock", version="1", allows=lambda uid: True, on_refused=lambda error: None
    )
    server.start()
    (directory / "handoff.sock").unlink()
    (directory / "handoff.sock").write_text("another's")
    server.stop()
    assert (directory / "handoff.sock").read_text() == "another's"
