"""The loaders that are compared, and how each is called; `measure.py` measures one.

How the peers use memory decides their cost. This was read in the packages' source:

- runai-model-streamer 0.17, `stream_files(paths, owned=True)`: `owned` is True by default. The limit
  (`RUNAI_STREAMER_MEMORY_LIMIT`: 40 GB by default, 0 for one buffer of the largest tensor, -1 for the size of
  the checkpoint) is the size of a ring of at most 18 private host buffers. With `owned=True` a drained buffer
  is given to the caller with its tensors, and a new one is allocated. So a tensor stays valid while it is
  held, memory that the caller holds comes on top of the limit, and every byte lands in fresh pages. With
  `owned=False` the buffers are reused, and a tensor is overwritten silently some time later in the iteration.
- safetensors maps the file. On a CPU nothing is read or copied before a tensor is touched, and the tensor's
  memory is the page cache. `backend="pread"` reads into private memory.
- fastsafetensors reads whole files into one private buffer, with O_DIRECT even when they are in the page
  cache. With FASTSAFETENSORS_ODIRECT=0 it reads through the page cache.
"""

import importlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks import bare_http

if TYPE_CHECKING:
    import torch

Tensors = Iterator[tuple[str, "torch.Tensor"]]


@dataclass(frozen=True, slots=True)
class Task:
    """Paths or URIs to load, and the daemon's socket directory."""

    paths: list[str]
    socket_dir: str | None
    raw_threads: int
    raw_block_bytes: int

    def require_socket_dir(self) -> str:
        if self.socket_dir is None:
            raise SystemExit("this contender loads from a daemon: name its socket directory by --socket-dir")
        return self.socket_dir


@dataclass(frozen=True, slots=True)
class Contender:
    """A loader and how to call it.

    `prepare` imports, outside the clock, and returns the function that is measured. `daemon` is the kind of
    daemon that it needs (`started` in `runner.py`). `environment` is added to the environment of its process.
    """

    name: str
    label: str
    prepare: Callable[[Task], Callable[[], Tensors]]
    daemon: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    # False for a baseline that delivers no tensors to sum.
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
    """The rate of the disk: reads the files with O_DIRECT, into one reused buffer for each thread."""
    lengths = [os.path.getsize(path) for path in task.paths]
    blocks = [
        (path, offset)
        for path, length in zip(task.paths, lengths, strict=True)
        for offset in range(0, length, task.raw_block_bytes)
    ]
    # Anonymous mappings are page-aligned. They are written to here, so their pages exist.
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
    """The rate of the server: reads the objects over as many connections as the daemon has readers."""
    loop = bare_http.Loop(task.paths, threads=task.raw_threads, block_bytes=task.raw_block_bytes)

    def load() -> Tensors:
        loop.run()
        yield from ()

    return load


# Processes of the scenario `node`, which load the same checkpoint.
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
