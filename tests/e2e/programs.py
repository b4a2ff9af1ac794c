"""What client processes do. They speak to their test in lines of JSON: `say` to it, `await_go` for it.

Every function is one program; see `nursery.py` and `support.ClientProcess`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch

import penstock.client.load  # noqa: F401  (so that children need not import it)
from penstock.client import SafetensorsStreamer, StreamerClient, errors
from penstock.client import fetch as fetch_module
from penstock.client.system import trees
from penstock.v1 import streamer_pb2 as pb


def say(word: str, **values: Any) -> None:
    print(json.dumps({"word": word, **values}), flush=True)


def await_go() -> None:
    """Until the test says so; ends the process when the test is gone."""
    if not sys.stdin.readline():
        os._exit(3)


def digest(tensor: torch.Tensor) -> str:
    """Of dtype, shape and bytes."""
    state = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        state.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def digests(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, str]]:
    return [(name, digest(tensor)) for name, tensor in tensors]


def fetch(
    socket_dir: str,
    source: str,
    directory: str | None = None,
    cache: str | None = None,
    pause_at: str | None = None,
    reconnect_timeout: float = 60.0,
    **options: Any,
) -> None:
    """Fetches, pausing before it writes the file `pause_at`, once; says where to, or what it raised."""
    if cache is not None:
        os.environ["PENSTOCK_CACHE_DIR"] = cache
    paused: list[str] = []

    class Pausing(trees.Draft):
        def create(self, name: str) -> IO[bytes]:
            if name == pause_at and not paused:
                paused.append(name)
                say("paused")
                await_go()
            return super().create(name)

    fetch_module.Draft = Pausing  # type: ignore[attr-defined]
    try:
        client = StreamerClient(socket_dir, reconnect_timeout=reconnect_timeout)
        say("fetched", directory=str(client.fetch(source, directory, **options)), error="")
    except Exception as error:
        say("fetched", error=type(error).__name__, message=str(error))


def load(
    socket_dir: str, source: str | list[str], pause_after: int | list[int] | None = None, **options: Any
) -> None:
    """Loads, pausing after the manifest (0) or after so many tensors; says what it got, or what it raised."""
    found: list[tuple[str, str]] = []
    pauses = pause_after if isinstance(pause_after, list) else [pause_after]
    try:
        client = StreamerClient(socket_dir, reconnect_timeout=options.pop("reconnect_timeout", 60.0))
        with client.load(source, **options) as opened:
            if 0 in pauses:
                say("paused")
                await_go()
            for name, tensor in opened:
                found.append((name, digest(tensor)))
                if len(found) in pauses:
                    del tensor
                    say("paused")
                    await_go()
    except errors.PenstockError as error:
        say("failed", error=type(error).__name__, message=str(error), found=found)
        return
    say("loaded", found=found)


def hold(socket_dir: str, source: str, **options: Any) -> None:
    """Loads all, says what it holds, and once more when told to."""
    state = StreamerClient(socket_dir).load_state_dict(source, **options)
    while True:
        say("holds", found=digests(state.items()))
        await_go()


def connect_only(socket_dir: str) -> None:
    """Connects to the handoff socket and does not even read the token."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(Path(socket_dir) / "handoff.sock"))
        say("paused")
        await_go()


def session_only(socket_dir: str) -> None:
    """Has a session and asks for nothing."""
    from penstock.client.ring.rpc import Session

    with Session(Path(socket_dir)):
        say("paused")
        await_go()


def choose_for_ever(socket_dir: str, source: str) -> None:
    """Has the listing and does not answer it."""

    def choose(name: str) -> bool:
        say("paused")
        await_go()
        return False

    StreamerClient(socket_dir).load(source, tensors=choose)


def queue_up(socket_dir: str, source: str) -> None:
    """Says so before it asks for memory that is not there."""
    say("paused")
    StreamerClient(socket_dir).load(source)
    raise AssertionError("there should have been no memory")


def leave_the_slabs(socket_dir: str, source: str, **fields: Any) -> None:
    """Gets the manifest and never takes its slabs."""
    from penstock.client.ring.rpc import Session

    def requests() -> Any:
        yield pb.LoadRequest(open=pb.OpenLoad(sources=[source], **fields))
        threading.Event().wait()

    session = Session(Path(socket_dir))
    call = session.service.Load(requests(), metadata=session.metadata)
    assert next(call).HasField("manifest")
    say("paused")
    await_go()


def iterate_until_interrupted(socket_dir: str, source: str, **options: Any) -> None:
    """Stays at the first tensor for ever; KeyboardInterrupt is not caught. It comes here and not in gRPC,
    which may hang or fail otherwise when interrupted, nor in a finalizer, where Python drops it."""
    for _ in StreamerClient(socket_dir).load(source, **options):
        say("paused")
        while True:  # a single wait may begin just after the signal came, and end never
            time.sleep(0.01)


def exit_without_close(socket_dir: str, source: str, **options: Any) -> None:
    """Ends in the middle of a load, with tensors of an earlier one in a global."""
    client = StreamerClient(socket_dir)
    globals()["_kept"] = client.load_state_dict(source, **options)
    globals()["_load"] = load = client.load(source, **options)
    globals()["_iterator"] = iterator = iter(load)
    globals()["_tensor"] = next(iterator)
    say("exits")


def many_loads(socket_dir: str, sources: list[str], owned: bool = True, **options: Any) -> None:
    """Loads all sources each time it is told how many rounds; then says what this process has in use."""
    client = StreamerClient(socket_dir)
    while line := sys.stdin.readline():
        failures = 0
        for _ in range(int(line)):
            for source in sources:
                try:
                    with client.load(source, owned=owned, **options) as opened:
                        for _name, _tensor in opened:
                            del _tensor  # or its lease would outlive the load
                except errors.PenstockError:
                    failures += 1
        say("done", failures=failures, fds=len(os.listdir("/proc/self/fd")), threads=threading.active_count())
    os._exit(0)


def status(socket_dir: str) -> None:
    say("status", status=StreamerClient(socket_dir).status())


def mapped_slabs(socket_dir: str, source: str, **options: Any) -> None:
    """Says the inodes of the slabs that a load maps, while it holds them."""
    with StreamerClient(socket_dir).load(source, **options) as opened:
        lines = Path("/proc/self/maps").read_text().splitlines()
        inodes = {line.split()[4] for line in lines if "memfd:penstock" in line}
        found = digests(opened)
    say("slabs", inodes=sorted(inodes), found=found)


def look_around(socket_dir: str, source: str, absent: list[str], **options: Any) -> None:
    """Says what this process can see of the system, and loads."""
    room = os.statvfs("/dev/shm")
    say(
        "sees",
        pid=os.getpid(),
        shm_bytes=room.f_blocks * room.f_frsize,
        shm_names=os.listdir("/dev/shm"),
        tmp_names=os.listdir("/tmp"),
        interfaces=[name for _, name in socket.if_nameindex()],
        present=[path for path in absent if os.path.exists(path)],
        namespaces={name: os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "ipc", "pid", "net")},
    )
    load(socket_dir, source, **options)


def flood(socket_dir: str, count: int) -> None:
    """Opens connections and keeps them; says how many were refused, and why."""
    from penstock.client.ring.handoff import Handoff

    kept, messages = [], []
    for _ in range(count):
        try:
            kept.append(Handoff.connect(Path(socket_dir)))
        except errors.PenstockError as error:
            messages.append(str(error))
    say("flooded", refused=len(messages), message=messages[0] if messages else "")
    await_go()


def flood_grpc(socket_dir: str, count: int) -> None:
    """Opens connections past the handoff and says nothing on them; says how many gRPC greets."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kept = []
    for _ in range(count):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(Path(socket_dir) / "penstock.sock"))
        with contextlib.suppress(ConnectionResetError):
            if connection.recv(1):
                kept.append(connection)
                continue
        connection.close()
    say("flooded", kept=len(kept))
    await_go()


def wrong_tokens(socket_dir: str, source: str) -> None:
    """Each time it is told how many: loads with made-up tokens, each on a channel of its own."""
    import grpc

    from penstock.client.ring.rpc import Session

    while line := sys.stdin.readline():
        failures = 0
        for number in range(int(line)):
            with Session(Path(socket_dir)) as session:
                opening = pb.LoadRequest(open=pb.OpenLoad(sources=[source]))
                metadata = (("penstock-session", f"{number:032x}"),)
                try:
                    list(session.service.Load(iter([opening]), metadata=metadata))
                except grpc.RpcError:
                    failures += 1
        say("done", failures=failures, fds=len(os.listdir("/proc/self/fd")), threads=threading.active_count())
    os._exit(0)


def call(socket_dir: str, method: str, **arguments: Any) -> None:
    """Calls a method of StreamerClient; says what it returned or raised."""
    try:
        result = getattr(StreamerClient(socket_dir), method)(**arguments)
    except errors.PenstockError as error:
        say("failed", error=type(error).__name__, message=str(error))
        return
    say("returned", result=dataclasses.asdict(result))


def fork_with_tensors(socket_dir: str, source: str) -> None:
    """A forked child has the tensors too; told to, this process drops its own, then ends the child."""
    context = multiprocessing.get_context("fork")
    state = StreamerClient(socket_dir).load_state_dict(source)
    look, end = context.Event(), context.Event()

    def child() -> None:
        say("child", pid=os.getpid(), found=digests(state.items()))
        look.wait()
        say("child", pid=os.getpid(), found=digests(state.items()))
        end.wait()

    process = context.Process(target=child)
    process.start()
    await_go()
    state.clear()
    say("dropped")
    await_go()
    look.set()
    await_go()
    end.set()
    process.join()
    say("joined", code=process.exitcode)
    await_go()


def fork_in_mid_load(socket_dir: str, source: str, how: str, **options: Any) -> None:
    """Forks with the load open; the child stays, or ends in the way told, while this process goes on."""
    found: list[tuple[str, str]] = []
    with StreamerClient(socket_dir).load(source, **options) as opened:
        for name, tensor in opened:
            found.append((name, digest(tensor)))
            if len(found) == 3:
                pid = os.fork()
                if not pid:
                    child_in_mid_load(opened, how)
                if how != "stays":
                    _, status = os.waitpid(pid, 0)
                    assert os.waitstatus_to_exitcode(status) == 0
                say("forked", pid=pid)
    del tensor, opened
    say("loaded", found=found)
    await_go()


def go_on_in_a_fork(socket_dir: str, source: str, how: str, **options: Any) -> None:
    """A forked child tries to go on where this process is in mid-load, and says what comes of it."""
    client = StreamerClient(socket_dir)
    opened = client.load(source, **options)
    unbegun = client.load(source, **options)
    iterator = iter(opened)
    found = digests([next(iterator)])
    os.environ["PENSTOCK_SOCKET_DIR"] = socket_dir
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(source)
        streamed = streamer.get_tensors()
        found_streamed = digests([next(streamed)])
        ways: dict[str, Callable[[], object]] = {
            "iterates": lambda: list(iterator),
            "iterates another": lambda: list(unbegun),
            "streams": lambda: list(streamed),
            "streams more": lambda: anew().stream_file(source),
            "loads": lambda: client.load(source),
            "loads into a module": lambda: client.load_into(torch.nn.Linear(2, 2), source),
            "prefetches": lambda: client.prefetch(source),
            "asks by a client of its own": lambda: StreamerClient(socket_dir).status(),
        }
        pid = os.fork()
        if not pid:
            try:
                ways[how]()
            except Exception as error:
                say(
                    "raised", error=type(error).__name__, message=str(error), pids=[os.getppid(), os.getpid()]
                )
            opened.close()
            unbegun.close()
            client.close()
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        found_streamed += digests(streamed)
    say("ended", code=os.waitstatus_to_exitcode(status))
    say("loaded", found=[found + digests(iterator), digests(unbegun), found_streamed])


def anew() -> SafetensorsStreamer:
    return SafetensorsStreamer().__enter__()


def child_in_mid_load(opened: Any, how: str) -> None:
    if how == "stays":
        threading.Event().wait()
    if how == "closes":
        opened.close()
        os._exit(0)
    sys.exit(0)  # runs finalizers


def spawn_with_tensors(socket_dir: str, source: str) -> None:
    """A spawned child gets the tensors as arguments; then this process drops its own."""
    import torch.multiprocessing

    context = torch.multiprocessing.get_context("spawn")
    state = StreamerClient(socket_dir).load_state_dict(source)
    go_on = context.Event()
    process = context.Process(target=spawned, args=(state, go_on))
    process.start()
    state.clear()
    await_go()
    go_on.set()
    process.join()
    say("joined", code=process.exitcode)


def spawned(state: dict[str, torch.Tensor], go_on: Any) -> None:
    say("child", pid=os.getpid(), found=digests(state.items()))
    go_on.wait()
    say("child", pid=os.getpid(), found=digests(state.items()))


def stream_as_rank(
    socket_dir: str, rank: int, world_size: int, store: str, paths: list[str], **options: Any
) -> None:
    """One rank of a gloo job that streams through the drop-in, after all of them are there."""
    import torch.distributed as dist

    from penstock.client import SafetensorsStreamer

    os.environ["PENSTOCK_SOCKET_DIR"] = socket_dir
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths, is_distributed=True, **options)
        say("streamed", tensors=digests(streamer.get_tensors()))
    dist.destroy_process_group()


def fill_module(socket_dir: str, source: str, layers: int, meta: bool) -> None:
    """Says by how much the process grew at most, of what the kernel counts as its memory."""
    with torch.device("meta" if meta else "cpu"):
        module = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(layers)))
    client = StreamerClient(socket_dir)
    client.load_state_dict(source, tensors=[])  # imports what a load needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory_kib("VmRSS")
    client.load_into(module, source)
    grown_bytes = (_memory_kib("VmHWM") - before) * 1024
    say(
        "filled",
        grown_bytes=grown_bytes,
        sum=float(sum(value.double().sum() for value in module.parameters())),
    )


def _memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
