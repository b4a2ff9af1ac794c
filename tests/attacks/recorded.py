"""Traffic as real clients send it: the seeds of the fuzz tests.

    python -m tests.attacks.recorded        # from the repository's root; writes tests/data/fuzz

`grpc` has what one connection of the Python client sent to `penstock.sock`, `http` a request a file, `header`
and `index` what transformers writes. Tokens and directories have always the same length, so that a
replay can put its own in their place.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from penstock.client import StreamerClient

from ..e2e.support import DaemonProcess, running_daemon
from ..e2e.wire import PLACEHOLDER, make_checkpoint, raw_channel
from .http2 import PREFACE, Flag, Kind, frame, parse_frames

DATA = Path(__file__).parents[1] / "data" / "fuzz"
TOKEN = b"0123456789abcdef0123456789abcdef"
"""Stands for the token of a session."""
_DIRECTORY = PLACEHOLDER.rstrip(b"/")
_REQUESTS = {
    "probe": "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:9090\r\nUser-Agent: kube-probe/1.33\r\n"
    "Accept: */*\r\nConnection: close\r\n\r\n",
    "scrape": "GET /metrics HTTP/1.1\r\nHost: localhost:9090\r\nUser-Agent: Prometheus/3.0\r\n"
    "Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1\r\n"
    "Accept-Encoding: gzip\r\nX-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n",
    "page": "GET / HTTP/1.1\r\nHost: localhost:9090\r\nConnection: keep-alive\r\n"
    "Accept: text/html,*/*;q=0.8\r\nSec-Fetch-Mode: navigate\r\nAccept-Language: en\r\nCookie: a=b\r\n\r\n"
    "GET /status HTTP/1.1\r\nHost: localhost:9090\r\nAccept: application/json\r\n\r\n",
    "head": "HEAD /readyz HTTP/1.0\r\n\r\n",
    "post": "POST /status HTTP/1.1\r\nHost: [::1]:9090\r\nTransfer-Encoding: chunked\r\n\r\n"
    "4\r\nabcd\r\n0\r\n\r\n",
}


def seeds(kind: str) -> dict[str, bytes]:
    """The files of one kind by name, such as `grpc`."""
    return {path.stem: path.read_bytes() for path in sorted((DATA / kind).iterdir())}


def placed(seed: bytes, directory: Path, token: str) -> bytes:
    """A seed with a directory made by `make_checkpoint`, and a token."""
    return seed.replace(_DIRECTORY, str(directory).encode()).replace(TOKEN, token.encode())


class Relay:
    """Stands before a daemon's sockets and remembers what clients send to the gRPC one."""

    def __init__(self, top: Path, daemon: DaemonProcess) -> None:
        self.sent: list[bytearray] = []
        """By connection."""
        self._daemon = daemon
        (top / "handoff.sock").symlink_to(daemon.socket_dir / "handoff.sock")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(top / "penstock.sock"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                server.connect(str(self._daemon.socket_dir / "penstock.sock"))
                self.sent.append(bytearray())
                for source, target, kept in ((client, server, self.sent[-1]), (server, client, None)):
                    threading.Thread(target=self._pass, args=(source, target, kept), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, kept: bytearray | None) -> None:
        with contextlib.suppress(OSError):  # the other direction has ended
            while data := source.recv(1 << 16):
                if kept is not None:
                    kept += data
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


def record() -> None:
    """What this release's client, and its health check and reflection, say."""
    directory = make_checkpoint()
    with running_daemon("--memory-limit", "8MiB") as daemon:
        for name, talk in conversations(directory).items():
            with tempfile.TemporaryDirectory() as top:
                relay = Relay(Path(top), daemon)
                talk(Path(top))
                relay.close()
                (sent,) = relay.sent
            anonymous = without_replies(bytes(sent)).replace(str(directory).encode(), _DIRECTORY)
            keep("grpc", name, without_token(anonymous))
    shutil.rmtree(directory)
    for name, request in _REQUESTS.items():
        keep("http", name, request.encode())
    with tempfile.TemporaryDirectory() as top:
        save_model(Path(top))
        for path in sorted(Path(top).glob("*.safetensors")):
            keep("header", path.stem, header_of(path))
        keep("index", "sharded", (Path(top) / "model.safetensors.index.json").read_bytes())


def keep(kind: str, name: str, seed: bytes) -> None:
    (DATA / kind).mkdir(parents=True, exist_ok=True)
    (DATA / kind / f"{name}.bin").write_bytes(seed)


def header_of(path: Path) -> bytes:
    """The JSON of a safetensors file."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def save_model(directory: Path) -> None:
    """A tiny model in several files with an index, as transformers saves one."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="60KB")


def conversations(directory: Path) -> dict[str, Callable[[Path], object]]:
    """By name, what a client does that is given a socket directory."""
    source = directory / "one.safetensors"

    def with_client(act: Callable[[StreamerClient], object]) -> Callable[[Path], object]:
        def talk(socket_dir: Path) -> None:
            with StreamerClient(socket_dir) as client:
                act(client)

        return talk

    def health(socket_dir: Path) -> None:
        with raw_channel(socket_dir) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            stub.Check(health_pb2.HealthCheckRequest(service="live"))

    def reflection(socket_dir: Path) -> None:
        with raw_channel(socket_dir) as channel:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            list(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))

    return {
        "load": with_client(lambda client: client.load_state_dict(directory)),
        "load_chosen": with_client(lambda client: client.load_state_dict(source, tensors=["one.a", "one.c"])),
        "load_listed": with_client(lambda client: client.load_state_dict(source, tensors=lambda name: True)),
        "prefetch": with_client(lambda client: client.prefetch(source)),
        "evict": with_client(lambda client: client.evict(source)),
        "status": with_client(lambda client: client.status()),
        "health": health,
        "reflection": reflection,
    }


def without_replies(sent: bytes) -> bytes:
    """Without replies to what the daemon sent then, which a replay has to give itself: acknowledgements, and
    the reset of a call whose last message has come."""
    kept = [
        one
        for one in parse_frames(sent)
        if one.kind != Kind.RST_STREAM
        and not (one.kind in (Kind.SETTINGS, Kind.PING) and one.flags & Flag.ACK)
    ]
    return PREFACE + b"".join(frame(one.kind, one.flags, one.stream, one.payload) for one in kept)


def without_token(sent: bytes) -> bytes:
    """With `TOKEN` in place of the session's, which follows its name in a header block."""
    name = b"penstock-session"
    start = sent.find(name) + len(name) + 1
    if start <= len(name):
        return sent
    assert sent[start - 1] == len(TOKEN), "the token is not a plain string of its usual length"
    return sent.replace(sent[start : start + len(TOKEN)], TOKEN)


if __name__ == "__main__":
    record()
