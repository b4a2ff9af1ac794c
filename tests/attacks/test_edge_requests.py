"""What requests may make the daemon hold: with a token or without, unfinished, compressed, many,
malformed."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.v1 import streamer_pb2 as pb

from ..e2e.programs import await_go, say
from ..e2e.support import MIB, Checkpoint, Checkpoints, Nursery, wait_until
from .conftest import StartTarget
from .http2 import (
    MAX_FRAME_BYTES,
    Closed,
    Connection,
    Flag,
    Kind,
    frame,
    grpc_message,
)
from .support import MEMORY_BOUND_BYTES, RawHandoff, TargetDaemon

ANNE, BERT, CARL = 1201, 1202, 1203
IN_FLIGHT_BYTES = 32 * MIB
"""What the requests of one user may hold."""
SLACK_BYTES = 24 * MIB
"""For what Python and gRPC need besides, and do not give back at once."""


@pytest.fixture
def checkpoint(checkpoints: Checkpoints) -> Checkpoint:
    return checkpoints("edge")


@pytest.fixture
def daemon(root: None, start_target: StartTarget, checkpoint: Checkpoint) -> TargetDaemon:
    daemon = start_target("--allow", str(checkpoint[0].parent))
    daemon.assert_serves(checkpoint)
    return daemon


def connect(socket_dir: str) -> Connection:
    return Connection(Path(socket_dir) / "penstock.sock")


def with_token(handoff: RawHandoff) -> list[tuple[str, str | bytes]]:
    return [("penstock-session", handoff.token())]


def status_of(connection: Connection, stream: int) -> tuple[int, str]:
    """Of a call that the daemon ended; (-1, words) if it ended the connection."""
    try:
        return connection.finish(stream)
    except Closed:
        return -1, connection.goaway[1].decode() if connection.goaway else ""


def attempt(connection: Connection, stream: int, data: bytes) -> None:
    """Sends as much as the daemon takes."""
    with contextlib.suppress(Closed):
        connection.send_data(stream, data)


# ---- attacks, run as other users -----------------------------------------------------------------


def large_without_token(socket_dir: str, method: str, size_bytes: int) -> None:
    """A message of many empty names, which are many times its size when parsed."""
    with connect(socket_dir) as connection:
        stream = connection.open_stream(method)
        attempt(connection, stream, grpc_message(b"\x0a\x00" * (size_bytes // 2)))
        code, words = status_of(connection, stream)
        say("ended", code=code, words=words)
    await_go()


def unfinished(socket_dir: str, connections: int, size_bytes: int) -> None:
    """Many calls with a token, each with a message of which the last byte never comes."""
    with contextlib.ExitStack() as stack:
        token = with_token(stack.enter_context(RawHandoff(socket_dir)))
        for _ in range(connections):
            try:
                connection = stack.enter_context(connect(socket_dir))
                streams = [connection.open_stream("GetStatus", token) for _ in range(15)]
            except (Closed, ConnectionError):
                continue
            message = grpc_message(bytes(size_bytes))[:-1]
            for stream in streams:
                connection._window_bytes.setdefault(stream, connection._initial_window_bytes)
            left = dict.fromkeys(streams, message)
            for _ in range(200):
                moved = False
                for stream in streams:
                    part = left[stream][: max(0, connection.window_bytes(stream))][:MAX_FRAME_BYTES]
                    if not part or connection.over(stream):
                        continue
                    connection._connection_window_bytes -= len(part)
                    connection._window_bytes[stream] -= len(part)
                    left[stream] = left[stream][len(part) :]
                    moved = connection.offer(frame(Kind.DATA, 0, stream, part), seconds=0.2) > 0
                if not moved:
                    break
        say("sent")
        await_go()


def compressed(socket_dir: str, mebibytes: int) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    content = b"".join(packer.compress(bytes(MIB)) for _ in range(mebibytes)) + packer.flush()
    said = []
    with RawHandoff(socket_dir) as handoff, connect(socket_dir) as connection:
        token = with_token(handoff)
        for encoding in ("gzip", "deflate", "identity", "made-up"):
            stream = connection.open_stream("GetStatus", [*token, ("grpc-encoding", encoding)])
            attempt(connection, stream, grpc_message(content, compressed=True))
            said.append(status_of(connection, stream))
        say("ended", said=said)
    await_go()


def trickle(socket_dir: str, connections: int) -> None:
    """Tiny frames, each of which costs gRPC more than it carries."""
    with contextlib.ExitStack() as stack:
        token = with_token(stack.enter_context(RawHandoff(socket_dir)))
        opened = [stack.enter_context(connect(socket_dir)) for _ in range(connections)]
        for connection in opened:
            with contextlib.suppress(Closed):
                stream = connection.open_stream("GetStatus", token)
                connection.send_data(stream, grpc_message(bytes(MIB))[:5])
                connection.offer(frame(Kind.DATA, 0, stream, b"x") * 60_000, seconds=1)
        say("sent")
        await_go()


def half_headers(socket_dir: str, connections: int) -> None:
    """Connections with as much as may be of a header block that never ends."""
    with contextlib.ExitStack() as stack:
        for _ in range(connections):
            with contextlib.suppress(Closed, ConnectionError):
                connection = stack.enter_context(connect(socket_dir))
                connection.send(frame(Kind.HEADERS, 0, connection.next_stream(), b"\0" * 16_000))
        say("sent")
        await_go()


def open_calls(socket_dir: str, connections: int) -> None:
    """Calls with a token that never send a message."""
    with contextlib.ExitStack() as stack:
        token = with_token(stack.enter_context(RawHandoff(socket_dir)))
        for _ in range(connections):
            with contextlib.suppress(Closed, ConnectionError):
                connection = stack.enter_context(connect(socket_dir))
                for _ in range(16):
                    connection.open_stream("GetStatus", token)
        say("sent")
        await_go()


def many_messages(socket_dir: str, source: str) -> None:
    """Calls whose messages parse into many times their size, and lists of names without end."""
    ended = []
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(connect(socket_dir))
        for content in (
            # Each of these replaces the one before.
            b"\x0a\x00\x12\x00" * 200_000,
            pb.LoadRequest(open=pb.OpenLoad(sources=[""] * 500_000)).SerializeToString(),
            pb.LoadRequest(
                open=pb.OpenLoad(sources=[source], tensors=pb.SelectTensors(names=[""] * 500_000))
            ).SerializeToString(),
            pb.LoadRequest(open=pb.OpenLoad(sources=[f"{source}{'x' * 10_000}"])).SerializeToString(),
            b"\x0a\xff\xff",
        ):
            token = with_token(stack.enter_context(RawHandoff(socket_dir)))
            stream = connection.open_stream("Load", token)
            attempt(connection, stream, grpc_message(content))
            ended.append(status_of(connection, stream))
        token = with_token(stack.enter_context(RawHandoff(socket_dir)))
        stream = connection.open_stream("Load", token)
        names = pb.SelectTensors(names=["n" * 5000] * 150, more=True)
        opening = pb.LoadRequest(open=pb.OpenLoad(sources=[source], tensors=names))
        attempt(connection, stream, grpc_message(opening.SerializeToString()))
        for _ in range(100):
            if connection.over(stream):
                break
            attempt(connection, stream, grpc_message(pb.LoadRequest(select=names).SerializeToString()))
        ended.append(status_of(connection, stream))
    say("ended", ended=ended)
    await_go()


# ---- what comes of them --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["Prefetch", "Load", "GetStatus", "/grpc.health.v1.Health/Check", "/x/y"])
def test_a_call_without_a_token_costs_its_container_nothing(
    method: str, root: None, start_target: StartTarget, attackers: Nursery
) -> None:
    daemon = start_target("--allow", "/tmp", contained=True)
    before = daemon.usage().anonymous_bytes
    with daemon.watched() as watch:
        for size_bytes in (3000, 100_000, 16 * MIB):
            attacker = attackers.start(
                large_without_token,
                uid=ANNE,
                socket_dir=daemon.socket_dir,
                method=method,
                size_bytes=size_bytes,
            )
            assert attacker.hear("ended")["code"] != 0 or method.startswith("/grpc")
            attacker.kill()
    watch.assert_bounded(before + 8 * MIB)
    daemon.assert_alive()


ATTACKS: dict[str, tuple[Callable[..., None], dict[str, object]]] = {
    "unfinished": (unfinished, {"connections": 8, "size_bytes": MIB}),
    "unfinished and small": (unfinished, {"connections": 100, "size_bytes": 60_000}),
    "tiny frames": (trickle, {"connections": 6}),
    "half headers": (half_headers, {"connections": 900}),
    "open calls": (open_calls, {"connections": 300}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_one_user_has_in_flight_is_bounded_and_holds_up_nobody(
    attack: str, daemon: TargetDaemon, attackers: Nursery, checkpoint: Checkpoint
) -> None:
    program, arguments = ATTACKS[attack]
    before = daemon.usage()
    with daemon.watched() as watch:
        attacker = attackers.start(program, uid=ANNE, socket_dir=daemon.socket_dir, **arguments)
        attacker.hear("sent")
        daemon.assert_serves(checkpoint)
        other = attackers.start("load", uid=BERT, socket_dir=daemon.socket_dir, source=checkpoint[0])
        other.hear("loaded")
        attacker.kill()
    watch.assert_bounded(before.anonymous_bytes + IN_FLIGHT_BYTES + SLACK_BYTES)
    daemon.assert_comes_back(before)


def test_three_users_together_stay_within_the_bound_of_all(
    daemon: TargetDaemon, attackers: Nursery, checkpoint: Checkpoint
) -> None:
    with daemon.watched() as watch:
        users = [
            attackers.start(unfinished, uid=uid, socket_dir=daemon.socket_dir, connections=8, size_bytes=MIB)
            for uid in (ANNE, BERT, CARL)
        ]
        for user in users:
            user.hear("sent")
        daemon.assert_serves(checkpoint)
    watch.assert_bounded(MEMORY_BOUND_BYTES // 2)


def test_a_compressed_message_is_never_unpacked(
    daemon: TargetDaemon, attackers: Nursery, checkpoint: Checkpoint
) -> None:
    before = daemon.usage().anonymous_bytes
    with daemon.watched() as watch:
        attacker = attackers.start(compressed, uid=ANNE, socket_dir=daemon.socket_dir, mebibytes=60)
        said = attacker.hear("ended")["said"]
    assert all(code not in (-1, 0) for code, _ in said), said
    assert any("compressed" in words for _, words in said)
    watch.assert_bounded(before + 8 * MIB)
    daemon.assert_serves(checkpoint)


def test_messages_that_grow_when_parsed_are_refused_one_by_one(
    daemon: TargetDaemon, attackers: Nursery, checkpoint: Checkpoint
) -> None:
    before = daemon.usage().anonymous_bytes
    with daemon.watched() as watch:
        attacker = attackers.start(
            many_messages, uid=ANNE, socket_dir=daemon.socket_dir, source=str(checkpoint[0])
        )
        ended = attacker.hear("ended")["ended"]
    words = ["fields", "500000 are more", "500000 names", "path is too long", "LoadRequest", "names"]
    for (code, message), word in zip(ended, words, strict=True):
        assert code in (3, 8), (code, message)
        assert word in message
    watch.assert_bounded(before + IN_FLIGHT_BYTES + SLACK_BYTES)
    daemon.assert_serves(checkpoint)


def test_a_stream_key_of_the_client_s_own_is_not_believed(
    daemon: TargetDaemon, checkpoint: Checkpoint
) -> None:
    """Nor is a block that swallows the gate's."""
    with daemon.handoff() as handoff, daemon.connect() as connection:
        metadata = with_token(handoff)
        stream = connection.open_stream("GetStatus", [*metadata, ("penstock-stream", "0" * 32)])
        connection.send_message(stream, b"", end=True)
        assert connection.finish(stream) == (0, "")
        from .http2 import call_fields

        block = call_fields("/penstock.v1.StreamerService/GetStatus", metadata) + b"\x00\x05x-own\x31"
        stream = connection.next_stream()
        connection.send(frame(Kind.HEADERS, Flag.END_HEADERS, stream, block))
        with contextlib.suppress(Closed):
            connection.send_message(stream, b"", end=True)
        code, words = status_of(connection, stream)
        assert code != 0, words
    daemon.assert_serves(checkpoint)


def test_a_connection_has_at_most_sixteen_calls_at_the_same_time(
    daemon: TargetDaemon, checkpoint: Checkpoint
) -> None:
    with daemon.handoff() as handoff, daemon.connect() as connection:
        metadata = with_token(handoff)
        streams = [connection.open_stream("GetStatus", metadata) for _ in range(16)]
        one_more = connection.open_stream("GetStatus", metadata, end=True)
        connection.wait(lambda: connection.over(one_more), "the seventeenth call to be refused")
        assert one_more in connection.resets
        for stream in streams:
            connection.send_message(stream, b"", end=True)
            assert connection.finish(stream) == (0, "")
        next_one = connection.open_stream("GetStatus", metadata)
        connection.send_message(next_one, b"", end=True)
        assert connection.finish(next_one) == (0, "")
    daemon.assert_serves(checkpoint)


@pytest.mark.stress
def test_calls_that_never_send_their_request_end_by_themselves(
    daemon: TargetDaemon, checkpoint: Checkpoint
) -> None:
    with daemon.handoff() as handoff, daemon.connect() as connection:
        streams = [connection.open_stream(method, with_token(handoff)) for method in ("Load",)]
        streams.append(connection.open_stream("/grpc.health.v1.Health/Check"))
        for stream in streams:
            code, words = connection.finish(stream)
            assert code == 3
            assert "send it at once" in words.replace("%20", " ")
    wait_until(lambda: not daemon.usage().sessions, "the session to end")
