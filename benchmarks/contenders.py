"""The loaders that are compared, and the process that measures one of them once.

    python benchmarks/contenders.py CONTENDER PATH... [--socket-dir DIR]

imports torch and the loader, starts the clock, loads, touches and drops every tensor as it comes, and
prints one JSON object (`Measurement`). Touching reads one byte of every 4 KiB of every tensor and sums them:
it makes lazily mapped pages real, and the sums of all contenders must agree. A tensor counts when it was
touched. `--hold` keeps every tensor instead of dropping it, `--untouched` only takes them, and `--barrier`
lets several processes start at once (`crowd.py`): "ready" on standard output, a line on standard input before
the clock starts, and the tensors held until standard input ends.

What the peers do with memory, since it decides what they cost (read from the packages' source):

- runai-model-streamer 0.17, `stream_files(paths, owned=True)`: `owned` is True unless told otherwise. The
  limit (`RUNAI_STREAMER_MEMORY_LIMIT`, 40 GB unless set; 0 is one buffer of the largest tensor; -1 the size
  of the checkpoint) is the size of a ring of at most 18 private host buffers. With `owned=True` a drained
  buffer is given away with its tensors and a new one allocated in its place: a tensor stays valid for as long
  as it is held, what the caller holds comes on top of the limit, and every byte lands in fresh pages. With
  `owned=False` the buffers are reused, and a tensor is overwritten, silently, some time after the iteration
  went on.
- safetensors maps the file: on a CPU nothing is read or copied before a tensor is touched, and its memory is
  the page cache. `backend="pread"` reads into memory of its own.
- fastsafetensors reads whole files into one private buffer, with O_DIRECT even when they are in the page
  cache; FASTSAFETENSORS_ODIRECT=0 makes it read buffered.
"""

import argparse
import ctypes
import dataclasses
import importlib
import json
import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import bare_http

if TYPE_CHECKING:
    import torch

PAGE_BYTES = 4096
SMALL_BYTES = 64 * 1024

Tensors = Iterator[tuple[str, "torch.Tensor"]]


@dataclass(frozen=True, slots=True)
class Task:
    """What to load, paths or URIs, and where the daemon is."""

    paths: list[str]
    socket_dir: str | None
    raw_threads: int
    raw_block_bytes: int

    def require_socket_dir(self) -> str:
        if self.socket_dir is None:
            raise SystemExit("this contender needs --socket-dir")
        return self.socket_dir


@dataclass(frozen=True, slots=True)
class Measurement:
    contender: str
    tensors: int
    size_bytes: int
    checksum: int
    first_seconds: float
    last_seconds: float
    # Of this process while the clock ran, all threads.
    cpu_seconds: float
    # What counting and touching as many tensors of the same shapes costs with their bytes in the CPU's cache.
    touch_cpu_seconds: float
    # Highest resident set while the clock ran, less the resident set when it started.
    peak_rss_bytes: int
    # When the last tensor was there, on the clock that all processes of a machine share.
    finished_at: float


@dataclass(frozen=True, slots=True)
class Contender:
    """A loader and how to call it.

    `prepare` imports, outside the clock, and returns the function that is measured. `daemon` names the daemon
    of the benchmark that it needs (see `bench.py`). `environment` is added to the process's.
    """

    name: str
    label: str
    prepare: Callable[[Task], Callable[[], Tensors]]
    daemon: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    # False for a baseline that delivers no tensors: nothing to sum.
    has_checksum: bool = True


def _penstock(
    *, owned: bool, group: tuple[str, int] | None = None
) -> Callable[[Task], Callable[[], Tensors]]:
    def prepare(task: Task) -> Callable[[], Tensors]:
        from penstock.client import StreamerClient

        # StreamerClient imports these at the first load; every contender's imports are outside the clock.
        importlib.import_module("penstock.client.load")
        socket_dir = task.require_socket_dir()

        def load() -> Tensors:
            client = StreamerClient(socket_dir)
            with client.load(task.paths, owned=owned, group=group) as tensors:
                yield from tensors

        return load

    return prepare


def _runai(*, owned: bool) -> Callable[[Task], Callable[[], Tensors]]:
    def prepare(task: Task) -> Callable[[], Tensors]:
        from runai_model_streamer import SafetensorsStreamer

        def load() -> Tensors:
            with SafetensorsStreamer() as streamer:
                streamer.stream_files(task.paths, owned=owned)
                yield from streamer.get_tensors()

        return load

    return prepare


def _safetensors_open(backend: str) -> Callable[[Task], Callable[[], Tensors]]:
    def prepare(task: Task) -> Callable[[], Tensors]:
        from safetensors import safe_open

        def load() -> Tensors:
            for path in task.paths:
                with safe_open(path, framework="pt", backend=backend) as file:
                    for name in file.keys():  # noqa: SIM118 - the file is no mapping
                        yield name, file.get_tensor(name)

        return load

    return prepare


def _safetensors_load_file(task: Task) -> Callable[[], Tensors]:
    from safetensors.torch import load_file

    def load() -> Tensors:
        for path in task.paths:
            yield from load_file(path).items()

    return load


def _fastsafetensors(task: Task) -> Callable[[], Tensors]:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    def load() -> Tensors:
        loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
        try:
            loader.add_filenames({0: task.paths})
            buffers = loader.copy_files_to_device()
            try:
                for name in loader.get_keys():
                    yield name, buffers.get_tensor(name)
            finally:
                buffers.close()
        finally:
            loader.close()

    return load


def _raw_o_direct(task: Task) -> Callable[[], Tensors]:
    """What the disk gives: the files' bytes, O_DIRECT, into one reused buffer for each thread."""
    lengths = [os.path.getsize(path) for path in task.paths]
    blocks = [
        (path, offset)
        for path, length in zip(task.paths, lengths, strict=True)
        for offset in range(0, length, task.raw_block_bytes)
    ]
    # Anonymous mappings are page-aligned, and written to here so that their pages exist.
    buffers = [mmap.mmap(-1, task.raw_block_bytes) for _ in range(task.raw_threads)]
    for buffer in buffers:
        buffer[:] = b"\1" * len(buffer)

    def load() -> Tensors:
        fds = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in task.paths}
        pending = iter(blocks)
        errors: list[OSError] = []

        def read(buffer: mmap.mmap) -> None:
            for path, offset in pending:  # one `next` at a time under the interpreter's lock
                try:
                    os.preadv(fds[path], [buffer], offset)
                except OSError as error:
                    errors.append(error)
                    return

        threads = [threading.Thread(target=read, args=(buffer,)) for buffer in buffers]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for fd in fds.values():
                os.close(fd)
        if errors:
            raise errors[0]
        yield from ()

    return load


def _raw_http(task: Task) -> Callable[[], Tensors]:
    """What the server gives: the objects' bytes on as many connections as the daemon has readers."""
    loop = bare_http.Loop(task.paths, threads=task.raw_threads, block_bytes=task.raw_block_bytes)

    def load() -> Tensors:
        loop.run()
        yield from ()

    return load


def _stored_bytes(path: str) -> int:
    return bare_http.object_bytes(path) if path.startswith("s3://") else os.path.getsize(path)


# Processes of the scenario in which several load the same checkpoint.
NODE_PROCESSES = 4

_ONE_GB = {"RUNAI_STREAMER_MEMORY_LIMIT": "1000000000"}
_ZERO = {"RUNAI_STREAMER_MEMORY_LIMIT": "0"}
_BUFFERED = {"FASTSAFETENSORS_ODIRECT": "0"}

CONTENDERS = {
    contender.name: contender
    for contender in [
        Contender("penstock-1gb-views", "penstock, 1 GB, owned=False", _penstock(owned=False), "1gb"),
        Contender("penstock-1gb", "penstock, 1 GB", _penstock(owned=True), "1gb"),
        Contender("penstock-0-views", "penstock, 0, owned=False", _penstock(owned=False), "zero"),
        Contender("penstock-0", "penstock, 0", _penstock(owned=True), "zero"),
        Contender("penstock-default", "penstock, -1 (default), first load", _penstock(owned=True), "fresh"),
        Contender("penstock-again", "penstock, loaded again", _penstock(owned=True), "roomy"),
        Contender("penstock-full", "penstock, limit above the checkpoint", _penstock(owned=True), "roomy"),
        Contender(
            "penstock-1gb-group",
            "penstock, 1 GB, owned=False, group",
            _penstock(owned=False, group=("node", NODE_PROCESSES)),
            "1gb",
        ),
        Contender("runai-default", "Run:ai, 40 GB (default)", _runai(owned=True)),
        Contender("runai-1gb-views", "Run:ai, 1 GB, owned=False", _runai(owned=False), environment=_ONE_GB),
        Contender("runai-1gb", "Run:ai, 1 GB", _runai(owned=True), environment=_ONE_GB),
        Contender("runai-0-views", "Run:ai, 0, owned=False", _runai(owned=False), environment=_ZERO),
        Contender("runai-0", "Run:ai, 0", _runai(owned=True), environment=_ZERO),
        Contender("safetensors-open", "safetensors safe_open (maps)", _safetensors_open("mmap")),
        Contender("safetensors-load", "safetensors load_file (maps)", _safetensors_load_file),
        Contender("safetensors-pread", 'safetensors safe_open, "pread"', _safetensors_open("pread")),
        Contender("fastsafetensors", "fastsafetensors, CPU", _fastsafetensors),
        Contender(
            "fastsafetensors-buffered",
            "fastsafetensors, CPU, buffered",
            _fastsafetensors,
            environment=_BUFFERED,
        ),
        Contender("raw-o-direct", "raw O_DIRECT reads", _raw_o_direct, has_checksum=False),
        Contender("raw-http", "bare loop of ranged GETs", _raw_http, has_checksum=False),
    ]
}


def measure(
    contender: Contender,
    task: Task,
    *,
    touched: bool = True,
    held: "list[torch.Tensor] | None" = None,
    barrier: Callable[[], None] = lambda: None,
) -> Measurement:
    """Runs the contender once. `held` gets every tensor; `barrier` returns when the clock may start."""
    if contender.has_checksum:
        import torch

        torch.set_num_threads(1)
    load = contender.prepare(task)
    first_seconds = 0.0
    tally = Tally(touched=touched)

    barrier()
    _reset_peak_rss()
    rss_before = _status_bytes("VmRSS")
    cpu_before = _cpu_seconds()
    start = time.perf_counter()
    for _, tensor in load():
        tally.take(tensor)
        if held is not None:
            held.append(tensor)
        if tally.tensors == 1:
            first_seconds = time.perf_counter() - start
    # A generator that ran to its end has given everything back: the clock covers that too.
    last_seconds = time.perf_counter() - start
    finished_at = time.monotonic()
    cpu_seconds = _cpu_seconds() - cpu_before
    peak_rss_bytes = _status_bytes("VmHWM") - rss_before

    return Measurement(
        contender=contender.name,
        tensors=tally.tensors,
        size_bytes=tally.size_bytes or sum(map(_stored_bytes, task.paths)),
        checksum=tally.checksum,
        first_seconds=first_seconds,
        last_seconds=last_seconds,
        cpu_seconds=cpu_seconds,
        touch_cpu_seconds=_touch_cpu_seconds(tally.shapes) if tally.tensors >= 1000 else 0.0,
        peak_rss_bytes=peak_rss_bytes,
        finished_at=finished_at,
    )


class Tally:
    """What the benchmark does with every tensor."""

    def __init__(self, *, touched: bool) -> None:
        self._touched = touched
        self.tensors = self.size_bytes = self.checksum = 0
        self.shapes: dict[tuple[torch.Size, torch.dtype], int] = {}

    def take(self, tensor: "torch.Tensor") -> None:
        if self._touched:
            self.checksum += touch(tensor)
        self.tensors += 1
        self.size_bytes += tensor.nbytes
        key = (tensor.shape, tensor.dtype)
        self.shapes[key] = self.shapes.get(key, 0) + 1


def touch(tensor: "torch.Tensor") -> int:
    """The sum of one byte of every page."""
    import torch

    if tensor.nbytes <= SMALL_BYTES and tensor.is_cpu and tensor.is_contiguous():
        begin = tensor.data_ptr()  # a fifth of what the calls below cost
        pages = range(begin, begin + tensor.nbytes, PAGE_BYTES)
        return sum([ctypes.c_ubyte.from_address(page).value for page in pages])
    return int(tensor.reshape(-1).view(torch.uint8).numpy()[::PAGE_BYTES].sum(dtype="u8"))


def _touch_cpu_seconds(shapes: "dict[tuple[torch.Size, torch.dtype], int]") -> float:
    import torch

    seconds = 0.0
    for (shape, dtype), count in shapes.items():
        tensor = torch.zeros(shape, dtype=dtype)
        repeats = min(count, 20_000)
        tally = Tally(touched=True)
        before = time.thread_time()
        for _ in range(repeats):
            tally.take(tensor)
        seconds += (time.thread_time() - before) * count / repeats
    return seconds


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _reset_peak_rss() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    raise LookupError(name)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contender", choices=sorted(CONTENDERS))
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--socket-dir")
    parser.add_argument("--raw-threads", type=int, default=16)
    parser.add_argument("--raw-block-bytes", type=int, default=8 << 20)
    parser.add_argument("--hold", action="store_true", help="keep every tensor")
    parser.add_argument("--untouched", action="store_true", help="read no byte of any tensor")
    parser.add_argument("--barrier", action="store_true", help="wait for a line, and for the end of input")
    options = parser.parse_args(arguments)
    task = Task(options.paths, options.socket_dir, options.raw_threads, options.raw_block_bytes)
    held: list[torch.Tensor] = []
    measurement = measure(
        CONTENDERS[options.contender],
        task,
        touched=not options.untouched,
        held=held if options.hold else None,
        barrier=_wait_for_line if options.barrier else lambda: None,
    )
    print(json.dumps(dataclasses.asdict(measurement)), flush=True)
    if options.barrier:
        sys.stdin.read()


def _wait_for_line() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(sys.argv[1:])
