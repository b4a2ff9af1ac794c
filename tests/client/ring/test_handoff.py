from __future__ import annotations

import array
import contextlib
import fcntl
import os
import resource
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.client import errors
from penstock.client.ring.handoff import Handoff
from penstock.v1 import streamer_pb2 as pb

from ...e2e.support import open_fds
from ..fake_daemon import send_frame

HELLO = pb.HandoffFrame(hello=pb.HandoffHello(token="secret", daemon_version="1.2"))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(daemon's end, client's end); the test's Handoff owns the second."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ours, theirs
    ours.close()
    theirs.close()


def slabs(first: int, count: int) -> pb.HandoffFrame:
    return pb.HandoffFrame(slabs=pb.HandoffSlabs(first=first, count=count))


def our_fds() -> int:
    """Those of `some_fds`, wherever they were sent: gRPC closes sockets of earlier tests when it likes."""
    return open_fds(os.getpid()).count(os.devnull)


def some_fds(count: int) -> list[int]:
    return [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def test_connects_over_a_real_listener_and_takes_the_token(socket_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(os.fspath(socket_dir / "handoff.sock"))
        listener.listen()

        # The packet waits in the socket: connecting does not need the daemon to run.
        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                send_frame(connection, HELLO)
                connection.recv(1)

        server = threading.Thread(target=serve)
        server.start()
        handoff = Handoff.connect(socket_dir)
        assert (handoff.token, handoff.daemon_version) == ("secret", "1.2")
        handoff.close()
        handoff.close()
        server.join(60)
        assert not server.is_alive()


def test_where_many_connections_wait_to_be_accepted_it_waits_too(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, connects = os.fspath(socket_dir / "handoff.sock"), threading.Event()

    class Watched(socket.socket):
        def connect(self, address: str) -> None:  # type: ignore[override]
            connects.set()
            super().connect(address)

    def packets(kind: type[socket.socket] = socket.socket) -> socket.socket:
        return stack.enter_context(kind(socket.AF_UNIX, socket.SOCK_SEQPACKET))

    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        listener, crowd, one_more = packets(), packets(), packets()
        listener.bind(path)
        listener.listen(0)
        crowd.connect(path)
        one_more.setblocking(False)
        with pytest.raises(BlockingIOError):
            one_more.connect(path)
        monkeypatch.setattr("penstock.client.system.unix.socket.socket", Watched)
        connecting = pool.submit(Handoff.connect, socket_dir)
        assert connects.wait(60)
        thread = Path(f"/proc/self/task/{next(iter(pool._threads)).native_id}/stat")
        while thread.read_text().rpartition(")")[2].split()[0] != "S" and not connecting.done():
            pass
        assert not connecting.done(), connecting.exception()
        monkeypatch.undo()
        for token in ("crowd", "secret"):
            accepted = stack.enter_context(listener.accept()[0])
            send_frame(accepted, pb.HandoffFrame(hello=pb.HandoffHello(token=token)))
        handoff = connecting.result(60)
        assert handoff.token == "secret"
        handoff.close()


def test_no_daemon_says_where_it_looked_and_how_to_start_one(socket_dir: Path) -> None:
    with pytest.raises(errors.DaemonUnavailableError) as caught:
        Handoff.connect(socket_dir)
    assert str(socket_dir) in str(caught.value)
    assert "penstockd --socket-dir" in str(caught.value)


def test_what_is_wrong_with_the_directory_is_said(socket_dir: Path) -> None:
    def message(directory: Path) -> str:
        with pytest.raises(errors.DaemonUnavailableError) as caught:
            Handoff.connect(directory)
        return str(caught.value)

    assert "no such directory here. In a container, mount" in message(socket_dir / "absent")
    assert "no daemon has started in it" in message(socket_dir)
    (socket_dir / "penstockd.lock").touch()
    assert "the daemon that ran there has stopped" in message(socket_dir)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(socket_dir / "handoff.sock"))
    assert "has ended" in message(socket_dir)
    assert "may not enter" in str(
        errors.unreachable("/run/penstock", PermissionError(13, "Permission denied"))
    )
    assert "Too many open files" in str(errors.unreachable("/run", OSError(24, "Too many open files")))


def test_a_refusal_raises_its_reason(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    refused = pb.HandoffRefused(reason="TOO_MANY_LOADS", message="256 connections")
    send_frame(ours, pb.HandoffFrame(refused=refused))
    with pytest.raises(errors.TooManyLoadsError, match="256 connections"):
        Handoff(theirs, "here")
    assert theirs.fileno() == -1


@pytest.mark.parametrize(
    ("packet", "error"),
    [
        (b"\xff\xff\xff", errors.ProtocolError),
        (slabs(0, 1).SerializeToString(), errors.ProtocolError),
        (
            pb.HandoffFrame(hello=pb.HandoffHello(daemon_version="1")).SerializeToString(),
            errors.ProtocolError,
        ),
        (b"\0" * 70_000, errors.ProtocolError),
    ],
)
def test_a_first_packet_that_is_no_token_is_refused(
    pair: tuple[socket.socket, socket.socket], packet: bytes, error: type[Exception]
) -> None:
    ours, theirs = pair
    ours.send(packet)
    with pytest.raises(error):
        Handoff(theirs, "here")
    assert theirs.fileno() == -1


def test_a_daemon_that_hangs_up_is_unavailable(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.close()
    with pytest.raises(errors.DaemonUnavailableError, match="closed the handoff connection"):
        Handoff(theirs, "here")


def test_slabs_come_in_packets_as_close_on_exec_descriptors(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    send_frame(ours, HELLO)
    handoff = Handoff(theirs, "here")
    fds = some_fds(253)
    send_frame(ours, slabs(0, 253), fds)
    send_frame(ours, slabs(253, 2), fds[:2])
    close(fds)
    before = our_fds()
    sizes = []
    for packet in handoff.receive_slabs(255):
        assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in packet)
        sizes.append(len(packet))
        close(packet)
    assert sizes == [253, 2]
    assert our_fds() == before
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):  # the lease is still held
        ours.recv(1)
    handoff.close()
    handoff.close()
    assert ours.recv(1) == b""


@pytest.mark.parametrize(
    ("frame", "fd_count"),
    [
        (slabs(1, 1), 1),  # a hole before it
        (slabs(0, 2), 1),  # fewer than promised
        (slabs(0, 1), 2),  # more than promised
        (slabs(0, 3), 3),  # more than the ring has
        (slabs(0, 0), 0),
        (HELLO, 0),
        (HELLO, 1),
    ],
)
def test_slabs_that_do_not_add_up_are_refused_and_closed(
    pair: tuple[socket.socket, socket.socket], frame: pb.HandoffFrame, fd_count: int
) -> None:
    ours, theirs = pair
    send_frame(ours, HELLO)
    handoff = Handoff(theirs, "here")
    fds = some_fds(fd_count)
    send_frame(ours, frame, fds)
    close(fds)
    before = our_fds()
    with pytest.raises(errors.ProtocolError, match="expected slabs 0 to 2"):
        list(handoff.receive_slabs(2))
    assert our_fds() == before
    handoff.close()


def test_descriptors_lost_on_the_way_are_fatal_and_the_others_closed(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    send_frame(ours, HELLO)
    handoff = Handoff(theirs, "here")
    fds = some_fds(20)
    send_frame(ours, slabs(0, 20), fds)
    lowest = min(fds)
    close(fds)
    before = our_fds()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 2, hard))
    try:
        with pytest.raises(errors.PenstockError, match="ulimit -n"):
            list(handoff.receive_slabs(20))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert our_fds() == before
    handoff.close()


def test_descriptors_on_the_first_packet_are_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    before = our_fds()
    fds = some_fds(1)
    ours.sendmsg([HELLO.SerializeToString()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    close(fds)
    with pytest.raises(errors.ProtocolError):
        Handoff(theirs, "here")
    assert our_fds() == before
    assert theirs.fileno() == -1
