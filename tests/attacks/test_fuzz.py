"""Fuzzing at the three doors: mutated traffic costs its sender a refusal, and nobody anything else.

In `make test` with few examples that are always the same, in `make stress` with many new ones.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.v1 import streamer_pb2 as pb

from ..e2e.support import Checkpoint, Checkpoints, wait_until
from ..e2e.wire import make_checkpoint, recordings
from .conftest import starting_targets
from .http2 import PREFACE, Closed, Flag, Kind, call_fields, frame, ping, reset, window_update
from .http2 import settings as settings_frame
from .mutation import mutated, mutated_frames
from .recorded import placed, seeds
from .support import TargetDaemon, Usage

# Of an example that fails: its error would be the warning, and not what failed.
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

COMMON = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
EFFORTS = pytest.mark.parametrize(
    "effort",
    [
        pytest.param(settings(COMMON, max_examples=100, derandomize=True), id="short"),
        pytest.param(
            settings(COMMON, max_examples=5000, print_blob=True),
            id="long",
            marks=[pytest.mark.stress, pytest.mark.timeout(1800)],
        ),
    ],
)
GLIMPSE_SECONDS = 0.02
"""How long an example waits for what may or may not come."""
ORDERLY = {0, 1, 3, 4, 5, 7, 8, 9, 10, 11, 12, 14, 16}
"""gRPC's status codes but UNKNOWN, INTERNAL and DATA_LOSS: how a daemon refuses what it understood."""
UNEXPECTED = re.compile("Traceback|unexpected", re.IGNORECASE)
LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z \w+ ")
"""How each line of the log begins: the daemon alone writes them."""
HTTP_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
HTTP_ORDERLY = {b"200", b"400", b"403", b"404", b"405", b"413", b"431", b"501", b"503"}
FRAMES = [
    PREFACE,
    frame(0, 0, 1, b""),
    frame(9, 4, 1, b""),
    ping(),
    reset(1),
    settings_frame({4: 0}),
    window_update(0, 0x7FFFFFFF),
    frame(7, 0, 0, bytes(8)),
]
# fmt: off
PIECES = [
    b"\x0a\x00", b"\x0a\xff\xff\xff\xff\x0f", b"\xff" * 10, b"grpc-timeout", b"1n",
    b"\x0dgrpc-encoding\x04gzip",
]
LINES = [b"\r\n", b"\r\n\r\n", b"\n", b" ", b": ", b"\0", b"Host: x\r\n", b"Content-Length: 5\r\n", b"%00"]
# fmt: on


class Examined:
    """A daemon that examples are played to, and that is looked at after each."""

    def __init__(self, daemon: TargetDaemon, honest: Checkpoint) -> None:
        self.daemon = daemon
        self._honest = honest
        self._log = daemon.log_path.open("rb")
        self._cut_off = b""
        """The beginning of a line that was being written at the last look."""
        daemon.assert_serves(honest)
        wait_until(lambda: daemon.usage().sessions == daemon.usage().connections == 0, "nobody to be there")
        self._before: Usage = daemon.usage()

    def examine(self) -> None:
        """It lives, has logged nothing that it did not expect, and serves the next honest client."""
        self.daemon.assert_alive()
        lines, newline, self._cut_off = (self._cut_off + self._log.read()).rpartition(b"\n")
        logged = (lines + newline).decode()
        assert not UNEXPECTED.search(logged), logged
        assert all(LINE.match(line) for line in logged.splitlines()), logged
        self.daemon.assert_serves(self._honest)

    def finish(self) -> None:
        """Nothing of all that is left."""
        self._log.close()
        self.daemon.assert_comes_back(self._before)


def assert_orderly(status: tuple[int, str] | None) -> None:
    """Of a call, if it has one. gRPC's core itself says INTERNAL of header blocks that it cannot read."""
    assert status is None or status[0] in ORDERLY or status[1].startswith("Failed parsing HTTP/2 ("), status


@pytest.fixture
def directory() -> Iterator[Path]:
    made = make_checkpoint()
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def daemon() -> Iterator[TargetDaemon]:
    """For all tests here, as it has to be after each what it was before."""
    with starting_targets() as start:
        yield start(executed=True)


@pytest.fixture
def examined(daemon: TargetDaemon, checkpoints: Checkpoints) -> Iterator[Examined]:
    found = Examined(daemon, checkpoints("honest", 2))
    yield found
    found.finish()


@EFFORTS
def test_packets_of_any_kind_on_the_handoff_socket_end_that_session_only(
    effort: settings, examined: Examined
) -> None:
    frames = [message for one in recordings() for message in one.messages("handoff", Path("/tmp"))]
    packets = st.lists(st.tuples(mutated(frames, PIECES), st.integers(0, 253)), max_size=4)

    @effort
    @given(packets, st.sampled_from((None, socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)))
    def check(packets: list[tuple[bytes, int]], shut: int | None) -> None:
        read, write = os.pipe()
        try:
            with examined.daemon.handoff() as handoff:
                handoff.token()
                for data, descriptors in packets:
                    handoff.send(data, [read] * descriptors)
                if shut is not None:
                    handoff.socket.shutdown(shut)
                if packets or shut in (socket.SHUT_WR, socket.SHUT_RDWR):
                    handoff.wait_closed()
        finally:
            os.close(read)
            os.close(write)
        examined.examine()

    check()


@pytest.mark.parametrize("name", seeds("grpc"))
def test_recorded_traffic_is_answered_as_it_was(name: str, directory: Path, examined: Examined) -> None:
    """Else the mutations of it would not reach far."""
    with examined.daemon.handoff() as handoff, examined.daemon.connect(preface=b"") as connection:
        connection.send(placed(seeds("grpc")[name], directory, handoff.token()))
        assert connection.finish(1) == (0, "")
        assert connection.messages(1)
        assert connection.goaway is None
    examined.examine()


@pytest.mark.parametrize("name", [":path", "user-agent", "penstock-session", "x-y"])
def test_a_header_that_is_not_text_costs_its_connection_only(name: str, examined: Examined) -> None:
    """A path of such bytes once ended gRPC's server for good, without a token."""
    with examined.daemon.connect() as connection:
        bad = b"/\xbf\xff"
        block = call_fields(bad) if name == ":path" else call_fields("/x", [(name, bad)])
        connection.send(frame(Kind.HEADERS, Flag.END_HEADERS, 1, block))
        connection.linger(GLIMPSE_SECONDS)
    examined.examine()


def test_an_index_that_no_table_of_headers_has_costs_its_connection_only(examined: Examined) -> None:
    with examined.daemon.connect() as connection:
        block = call_fields("/penstock.v1.StreamerService/Load") + bytes([0x80 | 88])
        connection.send(frame(Kind.HEADERS, Flag.END_HEADERS, 1, block))
        connection.linger(GLIMPSE_SECONDS)
        assert_orderly(connection.grpc_status(1))
    examined.examine()


def test_the_words_of_a_goaway_do_not_reach_the_log(examined: Examined) -> None:
    """gRPC's core would print them, line breaks included."""
    with examined.daemon.connect() as connection:
        words = b"\n2026-01-01T00:00:00.000Z error forged"
        connection.send(frame(Kind.GOAWAY, payload=bytes(8) + words))
        connection.linger(GLIMPSE_SECONDS)
    examined.examine()
    assert "forged" not in examined.daemon.log()


@EFFORTS
@pytest.mark.parametrize("how", ["bytes", "frames"])
def test_mutated_grpc_traffic_costs_its_connection_only(
    effort: settings, how: str, directory: Path, examined: Examined
) -> None:
    recorded = list(seeds("grpc").values())
    streams = mutated(recorded, FRAMES + PIECES) if how == "bytes" else mutated_frames(recorded, PIECES)

    @effort
    @given(streams, st.booleans())
    def check(sent: bytes, answers: bool) -> None:
        with contextlib.suppress(Closed), contextlib.ExitStack() as held:
            token = held.enter_context(examined.daemon.handoff()).token()
            connection = held.enter_context(examined.daemon.connect(preface=b"", answers=answers))
            connection.send(placed(sent, directory, token))
            connection.linger(GLIMPSE_SECONDS)
            for stream in {came.stream for came in connection.frames}:
                assert_orderly(connection.grpc_status(stream))
        examined.examine()

    check()


@EFFORTS
@pytest.mark.parametrize("method", ["Load", "Prefetch", "Fetch", "Evict", "GetStatus"])
def test_mutated_messages_are_served_or_refused_in_order(
    effort: settings, method: str, directory: Path, examined: Examined
) -> None:
    recorded = [
        placed(message, directory, "")
        for one in recordings()
        for message in one.messages(f"{method}.request", directory)
    ]

    @effort
    @given(st.lists(mutated([*recorded, *messages(method, directory)], PIECES), min_size=1, max_size=3))
    def check(sent: list[bytes]) -> None:
        with examined.daemon.handoff() as handoff, examined.daemon.connect() as connection:
            stream = connection.open_stream(method, [("penstock-session", handoff.token())])
            with contextlib.suppress(Closed):
                for number, message in enumerate(sent):
                    connection.send_message(stream, message, end=number == len(sent) - 1)
            # A load may wait, as for a choice that does not come.
            connection.linger(GLIMPSE_SECONDS, until=lambda: connection.over(stream))
            assert_orderly(connection.grpc_status(stream))
        examined.examine()

    check()


def messages(method: str, directory: Path) -> list[bytes]:
    """Requests with every field set that the recorded ones have not."""
    source = f"{directory}/one.safetensors"
    names = pb.SelectTensors(names=["one.a", "one.b"])
    made: dict[str, list[Any]] = {
        "Load": [
            pb.LoadRequest(
                open=pb.OpenLoad(
                    sources=[source],
                    tensors=names,
                    memory_limit_bytes=1,
                    group=pb.LoadGroup(name="g", size=1),
                    skip_tensors=1,
                    client_name="fuzz",
                )
            ),
            pb.LoadRequest(open=pb.OpenLoad(sources=[source], list_tensors=True)),
            pb.LoadRequest(select=names),
            pb.LoadRequest(release=pb.Release(segments=1)),
        ],
        "Prefetch": [pb.PrefetchRequest(sources=[source], tensors=names, pin=True)],
        "Fetch": [
            pb.FetchRequest(
                source=str(directory),
                allow=["*", "[a-z]*/"],
                ignore=["*.x"],
                have=[pb.FetchedFile(name="one.safetensors", version="1")],
                max_bytes=1 << 40,
                max_files=100,
                client_name="fuzz",
                more=True,
            ),
            pb.FetchRequest(source=str(directory), list_only=True),
        ],
        "Evict": [pb.EvictRequest()],
        "GetStatus": [pb.GetStatusRequest()],
    }
    return [bytes(message.SerializeToString()) for message in made[method]]


@EFFORTS
def test_mutated_http_requests_get_orderly_answers(effort: settings, examined: Examined) -> None:
    @effort
    @given(mutated(list(seeds("http").values()), LINES), st.booleans())
    def check(sent: bytes, ends: bool) -> None:
        with examined.daemon.http_socket() as connection:
            with contextlib.suppress(OSError):  # of one that is closed already, shutdown says ENOTCONN
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR if ends else socket.SHUT_RD)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while ends and (data := connection.recv(1 << 16)):
                    answer += data
        assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:100]
        assert set(HTTP_STATUS.findall(answer)) <= HTTP_ORDERLY, answer[:1000]
        examined.examine()

    check()
