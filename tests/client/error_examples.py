"""Every error message of the client, provoked, with its three parts marked; see tests/error_rule.py.

A new message needs an example here: the test names its place in the source until there is one.
"""
# ruff: noqa: E501 (a table, one example a line)

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import grpc
import numpy
import pytest
import torch

import penstock.client
from penstock.client import SafetensorsStreamer, StreamerClient, embedded, errors, prefetch
from penstock.client.adopt import ambient, run_ai_files, safe_parts, safe_patch, sglang, vllm, vllm_remote
from penstock.client.adopt import run_ai as streamer
from penstock.client.adopt import safe_open as opening
from penstock.client.adopt.written import every_parameter_written
from penstock.client.cli import bench, demo, health
from penstock.client.cli import commands as cli
from penstock.client.cli.arguments import parse
from penstock.client.cuda import device as cuda
from penstock.client.ring import handoff, mapping, progress, socket_dir, tensors
from penstock.client.system import descriptors, missing, sizes, trees
from penstock.v1 import streamer_pb2 as pb

from ..engines import interfaces
from ..error_rule import Example
from .fake_daemon import SLAB_BYTES, Behaviour, FakeDaemon, FakeTensor, make_slab, random_tensors

TENSORS = random_tensors(6, 400)
ARRAY = numpy.zeros((2, 3))
TWICE = [FakeTensor("twice", "F32", (1,), bytes(4))] * 2
WHERE = Path("/run/penstock-example")
LOG = "see its log, and load again when it is back"
WIRE = "upgrade the older of daemon and client"
AGAIN = "open another one"

Act = Callable[[], object]


@contextmanager
def fake(
    tensors: list[FakeTensor] = TENSORS, *, reconnect_timeout: float = 30, **behaviour: Any
) -> Iterator[StreamerClient]:
    with tempfile.TemporaryDirectory(prefix="pst-") as directory:
        daemon = FakeDaemon(Path(directory), tensors, Behaviour(**behaviour))
        try:
            yield StreamerClient(directory, reconnect_timeout=reconnect_timeout)
        finally:
            daemon.stop()


def on_fake(
    act: Callable[[StreamerClient], object], tensors: list[FakeTensor] = TENSORS, **behaviour: Any
) -> Act:
    def provoke() -> object:
        with fake(tensors, **behaviour) as client:
            return act(client)

    return provoke


def patched(act: Act, *patches: tuple[str, object], **variables: str) -> Act:
    def provoke() -> object:
        with pytest.MonkeyPatch.context() as patch:
            for target, value in patches:
                patch.setattr(target, value, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            return act()

    return provoke


def streamed(act: Callable[[SafetensorsStreamer], object]) -> Act:
    """By the drop-in, whose daemon says that it has the files /fake/a and /fake/b."""

    def by(client: StreamerClient) -> object:
        with pytest.MonkeyPatch.context() as patch, SafetensorsStreamer() as streamer:
            patch.setenv("PENSTOCK_SOCKET_DIR", os.fspath(client.socket_dir))
            return act(streamer)

    return on_fake(by)


def opened(
    act: Callable[[opening.safe_open], object],
    *,
    tamper_manifest: Callable[[pb.Manifest], object] = lambda manifest: manifest.files.pop(),
) -> Act:
    """A file that a daemon has."""
    return on_fake(
        lambda client: act(opening.safe_open("/fake/a", "pt", client=client)), tamper_manifest=tamper_manifest
    )


def use_after_close(file: opening.safe_open) -> object:
    with file:
        pass
    return file.keys()


def without_metadata(manifest: pb.Manifest) -> None:
    manifest.files.pop()
    manifest.files[0].metadata_omitted = True


def command(*arguments: str) -> Callable[[StreamerClient], object]:
    """The command line, before it makes one line of what was raised."""

    def run(client: StreamerClient) -> None:
        cli.run(parse([*arguments, "--socket-dir", os.fspath(client.socket_dir)]))

    return run


DONE = pb.FetchResponse(done=True)


def fetched(name: str, size_bytes: int, data: bytes = b"", *, unchanged: bool = False) -> pb.FetchResponse:
    file = pb.FetchedFile(name=name, size_bytes=size_bytes, version="1", unchanged=unchanged)
    return pb.FetchResponse(file=file, data=data)


def fetches(*responses: pb.FetchResponse, into: Callable[[Path], object] = lambda top: None) -> Act:
    """To a directory `out`, of a daemon that gives these answers."""

    def fetch(client: StreamerClient) -> object:
        with tempfile.TemporaryDirectory(prefix="pst-") as directory:
            out = Path(directory) / "out"
            out.mkdir()
            into(out)
            return client.fetch("/x", out)

    return on_fake(fetch, fetched=list(responses))


def mine(top: Path) -> None:
    (top / "mine").touch()


def a_file(top: Path) -> None:
    top.rmdir()
    top.touch()


def nothing_pulled() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="pst-") as directory,
        run_ai_files.ObjectStorageModel("s3://b/m", f"{directory}/m") as model,
    ):
        model.pull_files(allow_pattern=[])


def raises(error: Exception) -> Callable[..., object]:
    def raising(*_: object) -> object:
        raise error

    return raising


def changed_copy() -> None:
    with tempfile.TemporaryDirectory(prefix="pst-") as name, trees.Draft(Path(name), "s") as draft:
        (Path(name) / "x").write_bytes(b"x")
        draft.copy("x", trees.Tree(Path(name), {"x": trees.Kept(1, "1", 1)}, whole=True))


def received(*packets: bytes, then: Callable[[handoff.Handoff], object] = lambda handoff: None) -> Act:
    """What a client makes of these packets on handoff.sock."""

    def provoke() -> object:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for packet in packets:
                theirs.send(packet)
            if not packets:
                theirs.shutdown(socket.SHUT_RDWR)
            opened = handoff.Handoff(ours, os.fspath(WHERE))
            try:
                return then(opened)
            finally:
                opened.close()

    return provoke


HELLO = pb.HandoffFrame(hello=pb.HandoffHello(token="token")).SerializeToString()
FAILED = pb.HandoffFrame(failed=pb.HandoffFailed()).SerializeToString()


def slabs(packets: list[list[int]], *, count: int = 1, slab_bytes: int = SLAB_BYTES) -> Act:
    def provoke() -> object:
        mapping.Mapping(
            packets, slab_count=count, slab_bytes=slab_bytes, mirrored=False, release=lambda: None
        )
        return None

    return provoke


def slab(**how: Any) -> list[int]:
    return [make_slab(**how)[0]]


def wrapped(**entry: Any) -> Act:
    return lambda: list(
        tensors.wrap_segment(
            tensors.NO_BYTES, [pb.Tensor(name="t", **entry)], start=0, size_bytes=0, copies=None
        )
    )


def on_second_manifest(change: Callable[[pb.Manifest], object]) -> Callable[[pb.Manifest], object]:
    seen: list[pb.Manifest] = []

    def tamper(manifest: pb.Manifest) -> object:
        seen.append(manifest)
        return change(manifest) if len(seen) == 2 else None

    return tamper


def health_answer(answer: bytes | None) -> object:
    """A server of grpc.health.v1 that answers so, or a socket on which nobody answers."""
    with tempfile.TemporaryDirectory(prefix="pst-") as directory, ExitStack() as stack:
        path = os.path.join(directory, "penstock.sock")
        if answer is None:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen()
        else:
            server = grpc.server(ThreadPoolExecutor(1))
            check: Any = grpc.unary_unary_rpc_method_handler(lambda request, context: answer)
            server.add_generic_rpc_handlers(
                [grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})]
            )
            server.add_insecure_port(f"unix:{path}")
            server.start()
            stack.callback(lambda: server.stop(None).wait())
        health.check(Path(directory), live=False, timeout_seconds=30 if answer else 0.2)
    return None


def device_that_fails(act: Callable[[cuda.CudaDevice], object]) -> Act:
    runtime = SimpleNamespace(cudaHostRegister=lambda *given: 2, cudaHostUnregister=lambda *given: 2)
    device = object.__new__(cuda.CudaDevice)
    device._device = torch.device("cuda", 0)
    return patched(
        lambda: act(device),
        ("penstock.client.cuda.device._cudart", lambda: runtime),
        ("penstock.client.cuda.device.CudaDevice._forget_failure", lambda self: None),
        ("torch.cuda.device", lambda device: nullcontext()),
    )


def not_ready() -> object:
    with subprocess.Popen(["sleep", "60"]) as process, tempfile.TemporaryFile() as stderr:
        try:
            embedded._await_start(process, WHERE, stderr)
            return None
        finally:
            process.kill()


def on_another_byte_order() -> object:
    spec = importlib.util.spec_from_file_location("penstock.client.ring.tensors_again", tensors.__file__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return None


def plugin(**extra: Any) -> Any:
    interfaces.install()
    from vllm.config.load import LoadConfig

    from penstock.client.adopt.vllm_loader import PenstockModelLoader

    return PenstockModelLoader(LoadConfig(model_loader_extra_config=extra.pop("whole", extra)))


def load_nothing() -> None:
    with every_parameter_written(torch.nn.Linear(2, 2)):
        pass


def fetch_by_a_process_that_dies() -> object:
    from penstock.client.adopt import vllm_files

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_files, "__name__", "penstock.client.adopt")  # says nothing
        return vllm_files.fetch_apart("/s", "s3://b/m")


def ask_another_vllm() -> object:
    interfaces.install()
    from penstock.client.adopt.vllm_own import member

    return member(ModuleType("vllm.other"), "gone")


def use_closed_client(client: StreamerClient) -> object:
    client.close()
    return client.status()


def use_closed_load(client: StreamerClient) -> object:
    load = client.load("/x")
    load.close()
    return iter(load)


def close_meanwhile(client: StreamerClient) -> object:
    load = client.load("/x")
    iterator = iter(load)
    next(iterator)
    load.close()
    return next(iterator)


def receive_on_closed(opened: handoff.Handoff) -> object:
    opened._connection.close()
    return list(opened.receive_slabs(1))


def stream_twice(streamer: SafetensorsStreamer) -> None:
    for _ in range(2):
        streamer.stream_files(["/fake/a", "/fake/b"])


def embed(flag: str) -> object:
    flags: dict[str, Any] = {flag: 1}
    return StreamerClient.embedded(**flags)


def bar_without_tqdm() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tqdm.auto", None)
        return progress.Bar("load")


def refused(status: grpc.StatusCode) -> Act:
    return on_fake(
        lambda client: client.load("/x"), reconnect_timeout=0, refuse_load=(status, "", "its words")
    )


def unreached(make: Callable[[Path], object]) -> Act:
    def provoke() -> object:
        with tempfile.TemporaryDirectory(prefix="pst-") as directory:
            kept = make(Path(directory))
            try:
                return StreamerClient(Path(directory)).status()
            finally:
                del kept

    return provoke


def abandoned_socket(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(os.fspath(directory / "handoff.sock"))


NO_DAEMON = "no penstock daemon answers in"
START = "Start one with `penstockd --socket-dir"

# fmt: off
EXAMPLES = [
    Example("attribute", lambda: penstock.client.Nothing, "module 'penstock.client'", "has no attribute", "see its __all__"),
    Example("credentials", patched(lambda: ambient.ambient_client(ambient.S3Credentials("k", "s")), PENSTOCK_SOCKET_DIR="/run/x"),
        "s3_credentials", "cannot be given to the penstock daemon in /run/x", "set AWS_ACCESS_KEY_ID"),
    Example("no such tensors", on_fake(command("load", "/x", "--no-progress", "--tensors", "no*")),
        "--tensors no*", "has no tensor of such a name", "give a pattern"),
    Example("nothing to evict", on_fake(command("evict", "/x"), evicts=False), "/x", "nothing is staged of it", "see `penstock status`"),
    Example("closed client", on_fake(use_closed_client), "this client", "is closed", "make another one"),
    Example("empty socket_dir", lambda: StreamerClient(""), "socket_dir (--socket-dir)", "is empty", "name a directory"),
    Example("twice in a dict", on_fake(lambda client: client.load_state_dict("/x"), TWICE), "a tensor 'twice'", "two files", "iterate load()"),
    Example("twice in a module", on_fake(lambda client: client.load_into(holder("twice"), "/x"), TWICE),
        "a tensor 'twice'", "two files", "remove the superseded one"),
    Example("no CUDA", patched(lambda: cuda.open_device(torch.device("cuda", 0)), ("torch.cuda.is_available", lambda: False)),
        "device 'cuda:0'", "finds no CUDA device", "install a CUDA build"),
    Example("no such CUDA device", patched(lambda: cuda.open_device(torch.device("cuda", 7)), ("torch.cuda.is_available", lambda: True),
        ("torch.cuda.device_count", lambda: 1)), "device 'cuda:7'", "sees 1 CUDA devices", "use one of these"),
    Example("not pinned", device_that_fails(lambda device: device.pin(4096)), "4096 bytes of host memory", "CUDA cannot pin", "set PENSTOCK_PINNED_BYTES"),
    Example("not unpinned", device_that_fails(lambda device: device.unpin(torch.zeros(8, dtype=torch.uint8))),
        "8 pinned bytes", "CUDA cannot give", "restart this process"),
    Example("no model for the demo", patched(demo.find_model, ("penstock.client.cli.demo.MODEL_PACKAGE", "no_such_package")),
        "the demo's model", "is not installed", "pip install"),
    Example("demo lacks tensors", lambda: demo._check({}, {"t": torch.ones(1)}), "the demo's tensors ['t']", "are missing or too many", "report it"),
    Example("demo differs", lambda: demo._check({"t": torch.zeros(1)}, {"t": torch.ones(1)}), "tensor 't'", "differs", "report it"),
    Example("open files", lambda: descriptors.too_few(3), "this process may have", "too many open files", "Raise its limit to"),
    Example("no socket directory", patched(embedded._make_socket_dir, ("tempfile.tempdir", "/" + "x" * 120),
        ("penstock.client.embedded._SHORT_DIRECTORIES", ("/nowhere",)), XDG_RUNTIME_DIR=""),
        "no directory for the sockets", "none can be made", "set TMPDIR"),
    Example("daemon ended", lambda: StreamerClient.embedded(no_such_flag=3), "the embedded daemon", "ended with exit code 2", "see what it said"),
    Example("daemon not ready", patched(not_ready, ("penstock.client.embedded._START_SECONDS", 0.0)),
        "the embedded daemon", "was not ready", "try again when the machine is less busy"),
    *(Example(f"refused flag {name}", partial(embed, name), name, wrong, remedy)
        for name, wrong, remedy in (
            ("socket_dir", "an embedded daemon takes no", "leave it out"), ("exit_with_stdin", "an embedded daemon takes no", "leave it out"),
            ("help", "starts nothing", "run `penstockd --help`"), ("version", "starts nothing", "run `penstockd --version`"))),
    Example("refused flag memory-limit", partial(embed, "memory-limit"), "memory-limit", "takes no", "give it as the argument"),
    Example("no directory", lambda: StreamerClient("/no/such/directory").status(), NO_DAEMON, "there is no such directory here", START),
    Example("empty directory", unreached(lambda directory: None), NO_DAEMON, "no daemon has started in it", START),
    Example("stopped daemon", unreached(lambda directory: (directory / "penstockd.lock").touch()), NO_DAEMON, "has stopped", START),
    Example("dead daemon", unreached(abandoned_socket), NO_DAEMON, "has ended", START),
    Example("forbidden directory", lambda: errors.unreachable("/run/x", PermissionError()), NO_DAEMON, "this user may not enter", START),
    Example("other trouble", lambda: errors.unreachable("/run/x", OSError(5, "it broke")), NO_DAEMON, "it broke", START),
    Example("call failed", lambda: errors.from_rpc(grpc.RpcError("no call"), where="/run/x"), "the call to the daemon in /run/x", "failed", "try again"),
    Example("went away", on_fake(lambda client: client.load("/x"), reconnect_timeout=0, die_queued=1), "the daemon in", "went away (Socket closed)", LOG),
    Example("no connection", refused(grpc.StatusCode.UNAVAILABLE), "the daemon in", "does not take this connection", "close clients that are not in use"),
    Example("no answer", refused(grpc.StatusCode.DEADLINE_EXCEEDED), "the daemon in", "does not answer", "see `penstock health --live`"),
    Example("unknown call", refused(grpc.StatusCode.UNIMPLEMENTED), "the daemon in", "does not know this call", "upgrade the older of the two"),
    Example("unknown status", refused(grpc.StatusCode.INTERNAL), "the daemon in", "answered INTERNAL", "see its log"),
    Example("fork", lambda: errors.forked("this load", 1), "this load", "belongs to process 1", "start processes that load by `spawn`"),
    Example("long path", lambda: socket_dir.socket_path(Path("/" + "x" * 120), "handoff.sock"), "the socket path /x", "and Linux allows 107", "use a shorter"),
    Example("no token", received(pb.HandoffFrame(slabs=pb.HandoffSlabs()).SerializeToString()),
        "the first packet on handoff.sock", "is not a session token", "upgrade the older of the two"),
    Example("no slabs", received(HELLO, HELLO, then=lambda opened: list(opened.receive_slabs(1))), "slabs 0 to 1", "got 0 file descriptors", WIRE),
    Example("silent handoff", patched(received(HELLO, then=lambda opened: list(opened.receive_slabs(1))), ("penstock.client.ring.handoff.TIMEOUT_SECONDS", 0.05)),
        "the daemon in", "does not answer on handoff.sock", "see `penstock health --live`"),
    Example("broken handoff", received(HELLO, then=receive_on_closed),
        "the daemon in", "went away", LOG),
    Example("large packet", received(bytes(70_000)), "a packet on handoff.sock", "is over 65536 bytes", WIRE),
    Example("closed handoff", received(), "the daemon in", "closed the handoff connection", LOG),
    Example("failure without a reason", received(HELLO, FAILED, then=lambda opened: list(opened.receive_slabs(1))),
        "a failure without a reason", "was sent on handoff.sock", WIRE),
    Example("no frame", received(b"\xff\xff"), "a packet on handoff.sock", "is not a HandoffFrame", WIRE),
    Example("no health", lambda: health_answer(None), "the daemon in", "does not answer", "restart it"),
    Example("not ready", lambda: health_answer(b"\x08\x02"), "the daemon in", "is not ready", "see `penstock status`"),
    *(Example(f"interpreter {wrong}", patched(lambda: StreamerClient.embedded("32MiB"), patch), "this program", wrong, "Start a daemon beside it")
        for wrong, patch in (("interpreter is unknown", ("sys.executable", "")), ("is frozen", ("sys.frozen", True)),
            ("cannot be run", ("sys.executable", "/gone/python")))),
    Example("pickled load", on_fake(lambda client: pickle.dumps(client.load("/x"))), "load load-1", "cannot be pickled", "send the client and the source"),
    Example("iterated twice", on_fake(lambda client: (list(load := client.load("/x")), iter(load))), "this load", "was iterated before", AGAIN),
    Example("closed load", on_fake(use_closed_load), "this load", "is closed", AGAIN),
    Example("closed meanwhile", on_fake(close_meanwhile),
        "the load", "was closed, perhaps by another thread", AGAIN),
    Example("other version", on_fake(lambda client: list(client.load("/x")), die_after=[1],
        tamper_manifest=on_second_manifest(lambda manifest: setattr(manifest, "version", "v9"))), "/x", "changed while the daemon was away", "load it again"),
    Example("other rest", on_fake(lambda client: list(client.load("/x")), die_after=[1],
        tamper_manifest=on_second_manifest(lambda manifest: setattr(manifest, "tensor_count", 9))), "9 tensors left", "does not keep to the protocol", WIRE),
    Example("too few tensors", on_fake(lambda client: list(client.load("/x")), tamper_manifest=lambda manifest: setattr(manifest, "tensor_count", 7)),
        "6 of 7 tensors were sent", "does not keep to the protocol", WIRE),
    Example("no memory", lambda: mapping.map_anonymous(1 << 62), f"{1 << 62} bytes", "cannot map", "load less at a time"),
    Example("odd ring", slabs([], slab_bytes=100), "a ring of 1 slabs of 100 bytes", "cannot be mapped", WIRE),
    Example("too many slabs", lambda: slabs([slab(), slab()])(), "slabs were sent", "more than 1", WIRE),
    Example("too few slabs", lambda: slabs([slab()], count=2)(), "slabs were sent", "instead of 2", WIRE),
    Example("small slab", lambda: slabs([slab(size_bytes=4096)])(), "a slab", "has 4096 bytes instead of", WIRE),
    Example("unsealed slab", lambda: slabs([slab(seals=0)])(), "a slab", "is not sealed against change", WIRE),
    Example("slab that is none", lambda: slabs([[ordinary_file()]])(), "a slab", "is not a memfd", WIRE),
    Example("not installed", patched(lambda: missing.need("tqdm"), ("penstock.client.system.missing._is_there", lambda module: False)),
        "tqdm", "is not installed", "pip install 'penstock[client]'"),
    Example("two not installed", patched(lambda: missing.need("tqdm", "torch"), ("penstock.client.system.missing._is_there", lambda module: False)),
        "tqdm and torch", "are not installed", "pip install 'penstock[client]'"),
    Example("other module", on_fake(lambda client: client.load_into(torch.nn.Linear(2, 2), "/x")), "loading state_dict for Linear", "Missing key(s)", "Load a checkpoint of this module"),
    Example("unfinished prefetch", lambda: prefetch.follow(silent_session(), pb.PrefetchRequest(), None), "Prefetch", "ended before it was done", WIRE),
    *(Example(f"fetch {what}", fetches(*responses), thing, wrong, WIRE) for what, thing, wrong, responses in (
        ("unfinished", "Fetch", "ended before it was done", ()),
        ("too long", "'x'", "has more bytes than its size", (fetched("x", 1, b"12"),)),
        ("too short", "'x'", "has fewer bytes than its size", (fetched("x", 3, b"12"), DONE)),
        ("not had", "'x'", "is called unchanged and was not there", (fetched("x", 3, unchanged=True), DONE)),
        ("elsewhere", "the daemon names a file '../x'", "which cannot be made", (fetched("../x", 0), DONE)),
        ("twice", "the daemon names a file 'x'", "twice", (fetched("x", 0), fetched("x", 0), DONE)))),
    Example("fetch over files", fetches(DONE, into=mine), "/out", "is not empty", "name another directory"),
    Example("fetch over a file", fetches(DONE, into=a_file), "/out", "is a file", "name a directory"),
    Example("fetch over a mount", on_fake(lambda client: client.fetch("/x", "/proc")), "/proc", "is a mount point", "name a directory in it"),
    Example("fetch without a right", patched(fetches(fetched("x", 0), DONE), ("os.rename", raises(PermissionError(1, "Not permitted")))), "/out", "cannot be written there (Not permitted)", "set PENSTOCK_CACHE_DIR"),
    Example("changed copy", changed_copy, "/x", "was changed while it was copied", "fetch again"),
    Example("state dict", on_fake(lambda client: client.from_pretrained(dict, "/x", state_dict={"x": 1})), "state_dict", "is given", "leave it out"),
    Example("pulled path", lambda: run_ai_files.pull_files("/m", "/x"), "pull_files of '/m'", "is not implemented", "call StreamerClient.fetch"),
    Example("model of a path", lambda: run_ai_files.ObjectStorageModel("/m", "/x"), "model_path '/m'", "is no URI of an object store", "give one"),
    Example("nothing pulled", nothing_pulled, "no files of s3://b/m/", "were copied to", "check the URI"),
    Example("no patterns", on_fake(lambda client: client.fetch("/x", allow=[])), "allow", "is an empty list", "give patterns"),
    Example("odd pattern", on_fake(lambda client: client.fetch("/x", ignore=[5])), "ignore: 5", "is no pattern", "give a str"),  # type: ignore[list-item]
    Example("several to fetch", on_fake(lambda client: client.fetch(["/x"])), "source=['/x']", "is no source", "give a path or a URI"),  # type: ignore[arg-type]
    Example("size", lambda: sizes.parse_size("max_bytes", "much"), "max_bytes='much'", "is not a size", "write bytes"),
    Example("no bar", bar_without_tqdm, "progress=True", "needs tqdm", "pip install tqdm"),
    Example("group", on_fake(lambda client: client.load("/x", group=5)), "group=5", "is no name with a number", "give both"),  # type: ignore[arg-type]
    Example("verify", on_fake(lambda client: client.load("/x", verify="yes")), "verify='yes'", "is no way to verify", "give 'off'"),
    Example("digests", on_fake(lambda client: client.load("/x", digests=["ab"])), "digests=['ab']", "is no mapping of names to digests", "give SHA-256"),  # type: ignore[arg-type]
    Example("no checksums", on_fake(lambda client: client.load("/x", verify="require"), tamper_manifest=lambda manifest: manifest.ClearField("verify")),
        "the daemon in", "does not know checksums", "upgrade the daemon"),
    Example("files that differ", patched(on_fake(command("verify", "/x", "--no-progress")), ("penstock.client.cli.verify.verify", lambda *_, **__: 2)),
        "/x", "2 files are corrupt or could not be read", "fetch or upload them again"),
    Example("nothing to measure", lambda: bench.bench(["/x"], seconds=0, most_bytes=1, memory_limit=-1, progress=False),
        "--seconds and --bytes", "leave nothing to measure", "give both more than 0"),
    Example("gone while measured", lambda: bench._cpu_seconds(1 << 30), "the private daemon, pid", "went away while it was measured", "see its log"),
    Example("variant", on_fake(lambda client: client.load("/x", variant="")), "variant=''", "is no name of a variant", "give one"),
    Example("one name", on_fake(lambda client: client.load("/x", tensors="t")), "tensors='t'", "is one name", "give a collection"),
    Example("memory_limit", lambda: sizes.parse_memory_limit(1.5), "memory_limit=1.5", "is no size", "give an int"),  # type: ignore[arg-type]
    Example("memory limit", lambda: sizes.parse_memory_limit("much"), "memory_limit='much'", "is not a memory limit", "write -1"),
    Example("pinned bytes", patched(sizes.pinned_bytes, PENSTOCK_PINNED_BYTES="3"), "PENSTOCK_PINNED_BYTES='3'", "is not a size", "write bytes"),
    Example("source", lambda: sizes.absolute_sources(5), "source=5", "is no source", "give a path"),  # type: ignore[arg-type]
    Example("no source", lambda: sizes.absolute_sources([]), "source", "is an empty list", "name a file"),
    Example("bytes path", lambda: sizes.absolute_sources([BytesPath()]), "the source", "is a path of bytes", "give a str"),  # type: ignore[list-item]
    Example("empty source", lambda: sizes.absolute_sources(""), "the source ''", "is no path", "name a file"),
    Example("not UTF-8", lambda: sizes.absolute_sources("/\udcff"), "the path", "is not valid UTF-8", "rename it"),
    Example("unended stream", on_fake(lambda client: list(client.load("/x")), finish=False), "the end of the call", "does not keep to the protocol", WIRE),
    Example("no variants", on_fake(lambda client: client.load("/x", variant="fp16"), tamper_manifest=lambda manifest: manifest.ClearField("variant")),
        "the daemon in", "does not know variants", "upgrade the daemon"),
    Example("one tensor name", streamed(lambda streamer: streamer.stream_file("/fake/a", tensor_names="t")), "tensor_names='t'", "is one name", "give a collection"),
    Example("no tensor names", streamed(lambda streamer: streamer.stream_file("/fake/a", tensor_names=[])), "tensor_names", "is empty", "give None"),
    Example("odd tensor names", streamed(lambda streamer: streamer.stream_file("/fake/a", tensor_names=[5])), "[5]", "not found in checkpoint", "give names as str"),  # type: ignore[list-item]
    Example("names and no paths", streamed(lambda streamer: streamer.stream_files([], tensor_names=["t"])), "['t']", "not found in checkpoint", "name the files"),
    Example("one path", streamed(lambda streamer: streamer.stream_files("/fake/a")), "paths='/fake/a'", "is one path", "give a list"),
    Example("odd path", streamed(lambda streamer: streamer.stream_files([Path("/fake/a")])), "'/fake/a'", "is a PosixPath", "give a str"),  # type: ignore[list-item]
    Example("kinds", streamed(lambda streamer: streamer.stream_files(["/fake/a", "s3://b/k"])), "2 paths", "of several kinds", "stream those of each kind"),
    Example("directory", streamed(lambda streamer: streamer.stream_file("/fake/")), "'/fake/'", "is no path of a file", "name a safetensors file"),
    Example("upper case", streamed(lambda streamer: streamer.stream_file("S3://b/k")), "'S3://b/k'", "has its scheme in upper case", "write s3://"),
    Example("other file", streamed(lambda streamer: streamer.stream_file("/x")), "/x", "is no safetensors file", "call list_safetensors()"),
    Example("fewer files", streamed(lambda streamer: streamer.stream_files(["/fake/a", "/fake/b", "/fake/c"])), "the 3 paths", "name 2 files", "give the files themselves"),
    Example("names twice", streamed(lambda streamer: streamer.stream_files(["/fake/a", "/fake/b"], tensor_names=["no"])), "tensor_names has 1 names", "the files have 0 tensors", "name the files that"),
    Example("not open", lambda: SafetensorsStreamer().stream_file("/x"), "this SafetensorsStreamer", "is not open", "use it in a with statement"),
    Example("not open for tensors", lambda: next(SafetensorsStreamer().get_tensors()), "this SafetensorsStreamer", "is not open", "use it in a with statement"),
    Example("not exhausted", streamed(stream_twice),
        "the tensors of the stream before", "were not all taken", "exhaust or close"),
    Example("RUNAI_STREAMER_DIST", patched(streamer._distribution_wanted, RUNAI_STREAMER_DIST="2"), "RUNAI_STREAMER_DIST='2'", "is not understood", "set it to 0, 1 or auto"),
    Example("byte order", patched(on_another_byte_order, ("sys.byteorder", "big")), "penstock.client", "cannot map safetensors", "use a little-endian one"),
    Example("dtype", wrapped(dtype="F128"), "tensor 't'", "which torch", "upgrade torch"),
    Example("odd dimension", wrapped(dtype="F4", shape=[3]), "tensor 't'", "is no multiple of 2", "leave the tensor out"),
    Example("outside", wrapped(dtype="F32", shape=[3], size_bytes=12), "tensor 't'", "does not fit its segment", WIRE),
    Example("huge shape", wrapped(dtype="F32", shape=[1 << 63, 0]), "tensor 't'", "which torch cannot represent", "leave it out"),
    Example("several files", opened(lambda file: None, tamper_manifest=lambda manifest: None), "/fake/a", "means 2 files", "name a safetensors file"),
    Example("much metadata", opened(lambda file: None, tamper_manifest=without_metadata), "/fake/a", "more metadata than", "load its tensors by"),
    Example("file name", lambda: opening.safe_open(5, "pt"), "filename=5", "is no path", "give a str"),  # type: ignore[arg-type]
    Example("framework", lambda: opening.safe_open("/x", "mlx"), "framework 'mlx'", "is not read through a daemon", "use 'pt' or 'np'"),
    Example("open a directory", lambda: opening.safe_open("/", "pt"), "/", "is a directory", "name a file in it"),
    Example("closed file", opened(use_after_close), "/fake/a", "is closed", "open it again"),
    Example("tensor's name", opened(lambda file: file.get_tensor(5)), "name=5", "is no name", "give a str"),  # type: ignore[arg-type]
    Example("no such tensor", opened(lambda file: file.get_tensor("x")), "/fake/a", "does not contain tensor x", "see keys()"),
    Example("pickled file", opened(pickle.dumps), "/fake/a", "cannot be pickled", "open it in the other"),
    Example("list of indexes", lambda: safe_parts.numpy_part(ARRAY, [0, 1]), "a list ([0, 1])", "cannot select", "use slices"),
    Example("many indexes", lambda: safe_parts.numpy_part(ARRAY, (0, 0, 0)), "(0, 0, 0)", "does not fit a tensor of shape [2, 3]", "give at most"),
    Example("odd index", lambda: safe_parts.numpy_part(ARRAY, (0, slice(-1, None))), "slice(-1, None, None)", "does not select from a dimension of 3", "give an integer"),
    Example("PENSTOCK_PATCH_SAFETENSORS", patched(safe_patch.patch_as_asked, PENSTOCK_PATCH_SAFETENSORS="maybe"), "PENSTOCK_PATCH_SAFETENSORS='maybe'", "is neither yes nor no", "set 1"),
    Example("changed meanwhile", lambda: safe_patch._changed("/m/f"), "/m/f", "changed while it was read", "load it again"),
    Example("weights that are missing", load_nothing, "Linear has parameters", "the checkpoint has nothing: bias, weight", "load a complete checkpoint"),
    Example("SGLang's other loaders", lambda: sglang.refuse_other_loaders("IncModelLoader", quantized_already=False), "this model", "by its IncModelLoader, which cannot load through", "give a model that is quantized already"),
    Example("another vLLM", ask_another_vllm, "vLLM", "has no vllm.other.gone", "use a version"),
    Example("fetch apart", fetch_by_a_process_that_dies, "s3://b/m: the process that fetches", "ended with 1", "see what it wrote"),
    Example("revision apart", lambda: vllm_remote._fetch("/s", "hf://o/r", "v2"), "the revision 'v2'", "would not count", "leave it out"),
    Example("PENSTOCK_REPLACE_RUNAI", patched(vllm.replaces_runai, PENSTOCK_REPLACE_RUNAI="yes"), "PENSTOCK_REPLACE_RUNAI='yes'", "is neither 0 nor 1", "set it"),
    Example("extra config", lambda: plugin(whole=[1]), "model_loader_extra_config", "is a list and no dict", "give a JSON object"),
    Example("concurrency", lambda: plugin(concurrency=4), "concurrency", "the daemon's, not a load's", "leave it out here"),
    Example("unknown key", lambda: plugin(sorce="x"), "['sorce']", "does not know", "use ["),
    *(Example(f"key {name}", partial(plugin, **{name: value}), f"{name}={value!r}", "makes no sense", "give ")
        for name, value in (("source", ""), ("socket_dir", 5), ("device", "tpu"), ("distributed", "no"), ("enable_weights_track", "no"))),
    Example("limit of the plugin", lambda: plugin(memory_limit=1.5), "memory_limit=1.5", "is no size", "give an int"),
    Example("draft", lambda: plugin(source="/m").get_all_weights(SimpleNamespace(model="/d", runner="draft"), None), "the draft model /d", "may be its own or the target model's", "leave source out"),
    Example("reload", lambda: plugin(source="/m").get_all_weights(SimpleNamespace(model="/d"), None), "weights of /d", "loaded no model before", "give reload_weights the path"),
]
# fmt: on


class BytesPath(os.PathLike[bytes]):
    def __fspath__(self) -> bytes:
        return b"/x"


def holder(name: str) -> torch.nn.Module:
    module = torch.nn.Module()
    module.register_buffer(name, torch.zeros(1))
    return module


def ordinary_file() -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(SLAB_BYTES)
        return os.dup(file.fileno())


def silent_session() -> Any:
    return SimpleNamespace(service=SimpleNamespace(Prefetch=lambda request, metadata: iter(())), metadata=())
