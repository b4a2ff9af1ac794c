"""Web servers that are made to cost much. Any user whom a prefix allows a host can have one there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ..e2e.support import Checkpoint, Checkpoints, Nursery
from ..server.objects import Asked, ObjectServer
from .conftest import StartTarget
from .support import TargetDaemon, Usage
from .test_files_costs import bounded, loads, start_crowd

ANNE, BERT = 1201, 1202
FIRST_BYTES = 256 << 10
"""What comes with the answer that says a file's version."""
KEPT_CONNECTIONS = 32
"""As many as --object-concurrency."""
PATIENCE_SECONDS = 150.0
"""All this takes seconds, and on a busy machine more than a client has otherwise."""
FLOOD_BYTES = 1 << 30
"""What a server sends where it is let."""


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    server = ObjectServer()
    yield server
    server.close()


@pytest.fixture
def small(tmp_path: Path) -> Checkpoint:
    directory = tmp_path / "models"
    directory.mkdir()
    return Checkpoints(directory)("small")


@pytest.fixture
def start(start_target: StartTarget, server: ObjectServer, small: Checkpoint) -> Callable[..., TargetDaemon]:
    """A daemon that lets all users load from that server, and files."""

    def start(**options: object) -> TargetDaemon:
        allowed = ("--allow", f"{server.url}/", "--allow", str(small[0].parent))
        return start_target(*allowed, "--object-retries", "2", **options)

    return start


def serve(asked: Asked, content: bytes, *, heads: bool = True) -> bool:
    """Without `heads` it refuses HEAD."""
    etag = f'"{hash(asked.target):x}"'
    if asked.method == "HEAD":
        asked.answer(200 if heads else 405, ETag=etag, Content_Length=str(len(content)))
        return True
    start, last = asked.range
    body = content[start : last + 1]
    span = f"bytes {start}-{start + len(body) - 1}/{len(content)}"
    asked.answer(206, body, Content_Range=span, ETag=etag)
    return True


def file_of(name: str, size_bytes: int = 0) -> bytes:
    """With one tensor of that name."""
    tensor = {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}
    header = json.dumps({name: tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size_bytes)


def usage_of(daemon: TargetDaemon) -> Usage:
    """Its usage, and the connections that it may keep to the server."""
    usage = daemon.usage()
    return replace(usage, descriptors=usage.descriptors + KEPT_CONNECTIONS)


def number_of(asked: Asked) -> str:
    """Of a target such as /12.safetensors."""
    return asked.target.rpartition("/")[2].partition(".")[0]


def test_first_bytes_of_many_files_are_not_held_for_as_long_as_a_load_takes(
    root: None,
    start: Callable[..., TargetDaemon],
    attackers: Nursery,
    server: ObjectServer,
    small: Checkpoint,
) -> None:
    """A server that refuses HEAD gives each file's first bytes again, though its header is known."""
    server.hooks.append(lambda asked: serve(asked, file_of(number_of(asked), FIRST_BYTES), heads=False))
    daemon = start()
    before = usage_of(daemon)
    with bounded(daemon):
        for count in (1, 2):
            url = f"{server.url}/#.safetensors"
            ask = start_crowd(attackers, daemon, ANNE, url, count, files=400, list_tensors=True)
            ask.hear("begun")
            ask.go()
            assert ask.hear("ended", patience_seconds=PATIENCE_SECONDS)["outcomes"] == {"listing": count}
        assert loads(attackers, daemon, BERT, small)
    attackers.end_all()
    daemon.assert_comes_back(before)


def test_an_index_of_long_locations_costs_its_user_and_not_the_daemon(
    root: None,
    start: Callable[..., TargetDaemon],
    attackers: Nursery,
    server: ObjectServer,
    small: Checkpoint,
) -> None:
    """A request of eight kilobytes makes hundreds of locations of eight kilobytes."""
    index = json.dumps({"weight_map": {f"{n}": f"{n}.safetensors" for n in range(500)}}).encode()

    def hook(asked: Asked) -> bool:
        return serve(asked, index if asked.target.endswith(".json") else file_of(number_of(asked)))

    server.hooks.append(hook)
    daemon = start()
    before = usage_of(daemon)
    url = f"{server.url}/{'x' * 7900}/model.safetensors.index.json"
    with bounded(daemon):
        ask = start_crowd(attackers, daemon, ANNE, url, 10, list_tensors=True)
        ask.hear("begun")
        ask.go()
        outcomes = ask.hear("ended", patience_seconds=PATIENCE_SECONDS)["outcomes"]
        assert outcomes.pop("listing") > 0
        assert all("lists and plans need" in text for text in outcomes), outcomes
        assert outcomes, "there was memory for all"
        assert loads(attackers, daemon, BERT, small)
    attackers.end_all()
    daemon.assert_comes_back(before)


def flood(asked: Asked, beginning: bytes, part: bytes) -> bool:
    asked.handler.close_connection = True
    sent = 0
    with contextlib.suppress(OSError):
        asked.handler.wfile.write(beginning)
        while sent < FLOOD_BYTES:
            asked.handler.wfile.write(part)
            sent += len(part)
    return True


@pytest.mark.parametrize(
    ("beginning", "part"),
    [
        (b"HTTP/1.1 404 x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", b"x" * 65_536),
        (b"HTTP/1.1 200 x\r\n", b"X-Long: " + b"x" * 60_000 + b"\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    ],
    ids=["a chunk of less than no bytes", "headers", "interim answers"],
)
def test_answers_without_end_cost_an_error_each(
    beginning: bytes,
    part: bytes,
    root: None,
    start: Callable[..., TargetDaemon],
    attackers: Nursery,
    server: ObjectServer,
    small: Checkpoint,
) -> None:
    server.hooks.append(lambda asked: flood(asked, beginning, part))
    daemon = start()
    before = usage_of(daemon)
    with bounded(daemon):
        url = f"{server.url}/#.safetensors"
        # Five times as many files as there are connections.
        ask = start_crowd(attackers, daemon, ANNE, url, 20, files=8)
        ask.hear("begun")
        ask.go()
        outcomes = ask.hear("ended", patience_seconds=PATIENCE_SECONDS)["outcomes"]
        # What is known is asked for by HEAD, whose answer has no body.
        said = ("answered no valid HTTP", "the server says HTTP 404")
        assert all(any(words in text for words in said) for text in outcomes), outcomes
        assert loads(attackers, daemon, BERT, small)
    attackers.end_all()
    daemon.assert_comes_back(before)
