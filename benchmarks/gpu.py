"""Measures loading to a GPU: Penstock and its peers beside the raw copy, and pinning of slabs.

    python -m benchmarks.gpu                           # 4 GB, 5 rounds; prints tables
    python -m benchmarks.gpu --only register --size 1GB
    python -m benchmarks.gpu --only raw warm --size 16GB --threads 12

Every measurement runs in a process of its own. It imports, creates the CUDA context, and starts the clock.
The clock stops when all tensors are on the device and the device is idle. Tensors are kept. Afterwards they
are summed on the device, each byte weighted by its place, and the sums of all contenders must agree. If a
contender fails, it is named, and the others go on. Nothing else should use the GPU.

    raw        one pinned buffer of 256 MiB, copied again and again: the rate of the bus
    raw-setup  the same, but the time includes pinning the buffer and allocating the device's memory, as it
               does for all loaders
    warm       penstock, with the checkpoint in the staging buffer
    cached     penstock with a limit of 1 GB, with the files in the page cache
    runai      Run:ai Model Streamer, files in the page cache; its tensors are copied one by one, as it yields
               them
    safetensors  load_file(device=), files in the page cache
    register   cudaHostRegister of a sealed memfd, mapped in each way that a client could map a slab
"""

import argparse
import contextlib
import ctypes
import fcntl
import importlib
import json
import mmap
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import make_checkpoint, report, system
from benchmarks.daemons import Daemon, clean_environment
from penstock.client.cuda import transfer

_ONE_GB = 10**9
_RAW_BUFFER_BYTES = 256 << 20
_LOADERS = ["raw", "raw-setup", "warm", "cached", "runai", "safetensors"]
_RAW = ("raw", "raw-setup")
_CHECKED_BYTES = 16 << 20
_READ_ONLY = 8  # cudaHostRegisterReadOnly
_SHARED_SEALS = 0x2 | 0x4 | 0x10  # SHRINK, GROW, FUTURE_WRITE
_F_ADD_SEALS = 1033
# Name: flags of mmap, its protection, flags of cudaHostRegister, whether every page is written to before.
_MAPPINGS = {
    "shared, read-only": (mmap.MAP_SHARED, mmap.PROT_READ, 0, False),
    "shared, read-only, registered read-only": (mmap.MAP_SHARED, mmap.PROT_READ, _READ_ONLY, False),
    "private, read-only, registered read-only": (mmap.MAP_PRIVATE, mmap.PROT_READ, _READ_ONLY, False),
    "private, writable": (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, 0, False),
    "private, writable, pages written before": (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, 0, True),
    "shared, writable, memfd not sealed": (mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, 0, False),
}


@dataclass(frozen=True, slots=True)
class Loaded:
    seconds: float
    size_bytes: int
    # Of every byte; 0 for the raw copy.
    checksum: int


@dataclass(frozen=True, slots=True)
class Registered:
    # The result of cudaHostRegister; 0 is success.
    code: int
    register_seconds: float
    unregister_seconds: float
    # Of one copy to the device from the registered range.
    copy_seconds: float
    # The device got the memfd's bytes; and the mapping still has the memfd's pages.
    right: bool
    shared: bool


Tensors = Iterator[tuple[str, torch.Tensor]]


def _raw(paths: list[str], device: torch.device, socket_dir: str) -> Tensors:
    left_bytes = sum(os.path.getsize(path) for path in paths)
    source = torch.empty(min(_RAW_BUFFER_BYTES, left_bytes), dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    torch.cuda.synchronize(device)
    yield "clock", source
    while left_bytes > 0:
        part_bytes = min(left_bytes, source.nbytes)
        target[:part_bytes].copy_(source[:part_bytes], non_blocking=True)
        left_bytes -= part_bytes


def _raw_setup(paths: list[str], device: torch.device, socket_dir: str) -> Tensors:
    yield "clock", torch.empty(0)
    left_bytes = sum(os.path.getsize(path) for path in paths)
    source = torch.empty(min(_RAW_BUFFER_BYTES, left_bytes), dtype=torch.uint8, pin_memory=True)
    target = torch.empty(left_bytes, dtype=torch.uint8, device=device)
    for part in torch.split(target, source.nbytes):
        part.copy_(source[: part.nbytes], non_blocking=True)


def _penstock(paths: list[str], device: torch.device, socket_dir: str) -> Tensors:
    from penstock.client import StreamerClient

    importlib.import_module("penstock.client.load")
    client = StreamerClient(socket_dir)
    yield "clock", torch.empty(0)
    with client.load(paths, device=device) as tensors:
        yield from tensors


def _runai(paths: list[str], device: torch.device, socket_dir: str) -> Tensors:
    from runai_model_streamer import SafetensorsStreamer

    yield "clock", torch.empty(0)
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths, device=str(device))
        for name, tensor in streamer.get_tensors():
            yield name, tensor.to(device)


def _safetensors(paths: list[str], device: torch.device, socket_dir: str) -> Tensors:
    from safetensors.torch import load_file

    yield "clock", torch.empty(0)
    for path in paths:
        yield from load_file(path, device=str(device)).items()


_FUNCTIONS: dict[str, Callable[[list[str], torch.device, str], Tensors]] = {
    "raw": _raw,
    "raw-setup": _raw_setup,
    "warm": _penstock,
    "cached": _penstock,
    "runai": _runai,
    "safetensors": _safetensors,
}


def measure(name: str, paths: list[str], device: torch.device, socket_dir: str) -> Loaded:
    """In a process of its own. The clock starts at the first item that a contender yields."""
    torch.zeros(1, device=device)
    tensors = _FUNCTIONS[name](paths, device, socket_dir)
    next(tensors)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    kept = list(tensors)
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    assert all(tensor.device == device for _, tensor in kept)
    checksum = sum(zlib.crc32(name.encode()) * _checksum(tensor) for name, tensor in kept)
    size_bytes = sum(tensor.nbytes for _, tensor in kept) or sum(os.path.getsize(path) for path in paths)
    return Loaded(seconds, size_bytes, checksum)


def _checksum(tensor: torch.Tensor) -> int:
    """A weighted sum, which differs if pieces of the tensor are swapped."""
    total = 0
    for number, part in enumerate(torch.split(tensor.reshape(-1).view(torch.uint8), _CHECKED_BYTES), start=1):
        weights = torch.arange(1, part.nbytes + 1, device=part.device)
        total += number * int((part * weights).sum())
    return total


def register(name: str, size_bytes: int, device: torch.device) -> Registered:
    """In a process of its own, because a failed call leaves an error that the next call raises."""
    flags, protection, register_flags, written = _MAPPINGS[name]
    size_bytes = -(-size_bytes // (2 << 20)) * (2 << 20)
    fd = os.memfd_create("slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    daemon = mmap.mmap(fd, size_bytes)
    pattern = os.urandom(1 << 20)
    for start in range(0, size_bytes, len(pattern)):
        daemon[start : start + len(pattern)] = pattern
    if "not sealed" not in name:
        fcntl.fcntl(fd, _F_ADD_SEALS, _SHARED_SEALS)
    address = _map(fd, size_bytes, flags, protection)
    if written:
        for offset in range(0, size_bytes, mmap.PAGESIZE):
            page = ctypes.c_ubyte.from_address(address + offset)
            page.value = page.value  # a private copy of the page
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    target = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    start_seconds = time.perf_counter()
    code = int(cudart.cudaHostRegister(address, size_bytes, register_flags))
    register_seconds = time.perf_counter() - start_seconds
    if code:
        return Registered(code, register_seconds, 0, 0, right=False, shared=False)
    source = torch.frombuffer((ctypes.c_ubyte * size_bytes).from_address(address), dtype=torch.uint8)
    start_seconds = time.perf_counter()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    copy_seconds = time.perf_counter() - start_seconds
    repeated = torch.frombuffer(bytearray(pattern), dtype=torch.uint8).to(device)
    right = bool((target.view(-1, len(pattern)) == repeated).all())
    # If the mapping does not show this write of the daemon, its pages are copies.
    daemon[0] = daemon[0] ^ 0xFF
    shared = ctypes.c_ubyte.from_address(address).value == daemon[0]
    start_seconds = time.perf_counter()
    cudart.cudaHostUnregister(address)
    unregister_seconds = time.perf_counter() - start_seconds
    return Registered(code, register_seconds, unregister_seconds, copy_seconds, right=right, shared=shared)


def _map(fd: int, size_bytes: int, flags: int, protection: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_ssize_t,
    )
    address = libc.mmap(None, size_bytes, protection, flags, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return int(address)


def compare_loaders(options: argparse.Namespace) -> None:
    path = make_checkpoint.llama_checkpoint(options.size)
    paths = [str(file) for file in make_checkpoint.checkpoint_files(path)]
    names = [name for name in _LOADERS if name in options.only]
    found: dict[str, list[Loaded]] = {name: [] for name in names}
    failed: set[str] = set()
    limits = {"warm": str(options.size * 21 // 20 + _ONE_GB), "cached": str(_ONE_GB)}
    with contextlib.ExitStack() as stack:
        daemons = {}
        for name in set(names) & set(limits):
            daemons[name] = stack.enter_context(Daemon("--memory-limit", limits[name]))
            daemons[name].wait_until_populated()
        if "warm" in daemons:
            daemons["warm"].prefetch(path)
        for turn in range(options.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                system.fill_page_cache(paths)
                socket_dir = daemons[name].socket_dir if name in daemons else ""
                said = None if name in failed else _in_process(options, "load", name, socket_dir, *paths)
                if said is None:
                    failed.add(name)
                    continue
                found[name].append(Loaded(**said))
                print(f"round {turn + 1} {name} {found[name][-1].seconds:.3f} s", file=sys.stderr, flush=True)
    found = {name: runs for name, runs in found.items() if name not in failed}
    sums = {run.checksum for name, runs in found.items() if name not in _RAW for run in runs}
    if len(sums) > 1:
        raise SystemExit(f"the loaders put different bytes on the device: {found}")
    seconds = {name: [run.seconds for run in runs] for name, runs in found.items()}
    rows = []
    for name, runs in found.items():
        rate = max(runs[0].size_bytes / run.seconds for run in runs) / 1e9
        rows.append([name, report.spread(seconds[name], 3), f"{rate:.1f}"])
    print("\n".join(report.markdown_table(["loader", "seconds", "best GB/s"], rows)))
    print()
    # Aims: at least 0.85 and at least 2.
    for raw in _RAW:
        if {raw, "warm"} <= set(seconds):
            share = report.ratios(seconds[raw], seconds["warm"])
            print(f"- penstock warm: {share} of the rate of {raw} in the same round")
    for name in ("warm", "cached"):
        for other in ("runai", "safetensors"):
            if {name, other} <= set(seconds):
                times = report.ratios(seconds[other], seconds[name])
                print(f"- penstock {name}: {times} times as fast as {other}")


def compare_mappings(options: argparse.Namespace) -> None:
    size_bytes = min(options.size, 2 * _ONE_GB)
    rows = []
    for name in _MAPPINGS:
        said = _in_process(options, "register", name, str(size_bytes))
        if said is None:
            continue
        run = Registered(**said)
        per_gb = 1e9 / size_bytes
        if run.code:
            rows.append([name, f"refused, error {run.code}", "", "", "", ""])
            continue
        rows.append(
            [
                name,
                f"{run.register_seconds * per_gb:.3f}",
                f"{run.unregister_seconds * per_gb:.3f}",
                f"{size_bytes / run.copy_seconds / 1e9:.1f}",
                "yes" if run.right else "no",
                "yes" if run.shared else "no",
            ]
        )
    head = [
        "mapping",
        "register s/GB",
        "unregister s/GB",
        "copy GB/s",
        "bytes right",
        "still the slab's pages",
    ]
    print("\n".join(["", *report.markdown_table(head, rows)]))


def _in_process(options: argparse.Namespace, *arguments: str) -> dict[str, Any] | None:
    """Runs a measurement as a program. None if it failed."""
    command = [sys.executable, str(Path(__file__)), "--device", str(options.device)]
    if options.threads:
        command += ["--threads", str(options.threads)]
    command += ["--measure", *arguments]
    finished = subprocess.run(
        command, env=clean_environment(), stdout=subprocess.PIPE, text=True, check=False
    )
    if finished.returncode:
        print(f"- {' '.join(arguments[:2])} failed, exit code {finished.returncode}", flush=True)
        return None
    answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return answer


def _device(text: str) -> torch.device:
    device = torch.device(text)
    return torch.device(device.type, device.index or 0)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*_LOADERS, "register"]
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--size", type=make_checkpoint.parse_size, default=4 * _ONE_GB, help="bytes of the checkpoint (4GB)"
    )
    parser.add_argument("--device", type=_device, default=torch.device("cuda:0"))
    parser.add_argument("--threads", type=int, help="threads of Penstock's copies, instead of its default")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit(f"this benchmark needs a GPU, and torch {torch.__version__} finds no CUDA device")
    if options.threads:
        transfer.MOST_THREADS = options.threads
    if options.measure:
        kind, name, *rest = options.measure
        if kind == "load":
            answer = asdict(measure(name, rest[1:], options.device, rest[0]))
        else:
            answer = asdict(register(name, int(rest[0]), options.device))
        print(json.dumps(answer), flush=True)
        return
    print("\n".join([*system.describe(), f"- GPU: {torch.cuda.get_device_name(options.device)}", ""]))
    if set(options.only) & set(_LOADERS):
        compare_loaders(options)
    if "register" in options.only:
        compare_mappings(options)


if __name__ == "__main__":
    main(sys.argv[1:])
