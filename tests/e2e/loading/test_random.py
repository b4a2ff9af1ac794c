"""Random checkpoints through random buffers, compared bit for bit with the safetensors library."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.client.ring.tensors import DTYPES

from ..programs import digest
from ..support import DaemonProcess, running_daemon

# The bits of one value, where the library and torch know the dtype.
LIBRARY_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# The library's own torch reader lacks these; their bytes are compared with the file's.
OTHER_BITS = {name: bits for name, bits in (("F8_E8M0", 8), ("F4", 4)) if name in DTYPES}
BITS = {**LIBRARY_BITS, **OTHER_BITS}

LIMITS = ["0", "-1", "2MiB", "3MB", "10MiB", "64MiB"]
BLOCKS = ["64KiB", "1MiB"]


@dataclass(frozen=True)
class Spec:
    """One tensor of a file to be made."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count * BITS[self.dtype] // 8


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    dtype = draw(st.sampled_from(sorted(BITS)))
    kind = draw(st.sampled_from(["small", "small", "scalar", "empty", "medium", "large"]))
    top = {"small": 300, "medium": 200_000, "large": 1_800_000, "scalar": 0, "empty": 0}[kind] * 8
    if kind == "scalar" and dtype != "F4":
        return Spec(dtype, ())
    if kind == "empty":
        return Spec(dtype, draw(st.sampled_from([(0,), (3, 0), (0, 2)])))
    if dtype == "F4":
        return Spec(dtype, (draw(st.integers(1, 5)), 2 * draw(st.integers(1, max(1, top // 40)))))
    count = draw(st.integers(1, max(1, top // BITS[dtype])))
    return Spec(dtype, draw(st.sampled_from([(count,), (1, count), (count, 1, 1)])))


FILES = st.lists(st.lists(specs(), max_size=8), min_size=1, max_size=3)


def write_file(path: Path, prefix: str, tensors: list[Spec], *, padding: int, seed: int) -> dict[str, Spec]:
    """Written by hand, so that nothing is aligned unless `padding` makes it so."""
    header: dict[str, Any] = {"__metadata__": {"made": "by hand"}}
    offset = 0
    named = {f"{prefix}.{number}": spec for number, spec in enumerate(tensors)}
    for name, spec in named.items():
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.size_bytes],
        }
        offset += spec.size_bytes
    raw = json.dumps(header).encode() + b" " * padding
    generator = random.Random(seed)
    data = b"".join(
        bytes(value & 1 for value in generator.randbytes(spec.size_bytes))
        if spec.dtype == "BOOL"
        else generator.randbytes(spec.size_bytes)
        for spec in tensors
    )
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return named


def expected_digests(path: Path, named: dict[str, Spec]) -> dict[str, str]:
    if all(spec.dtype in LIBRARY_BITS for spec in named.values()):
        return {name: digest(tensor) for name, tensor in safetensors.torch.load(path.read_bytes()).items()}
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    found = {}
    for name, spec in named.items():
        begin, end = (start + offset for offset in header[name]["data_offsets"])
        known = DTYPES[spec.dtype]
        shape = list(spec.shape)
        if known.packed != 1:
            shape[-1] //= known.packed
        flat = torch.frombuffer(bytearray(raw[begin:end]) or bytearray(8), dtype=torch.uint8)[: end - begin]
        found[name] = digest(flat.clone().view(known.torch).reshape(shape))
    return found


@pytest.fixture(scope="module")
def daemons() -> Iterator[dict[tuple[str, str], DaemonProcess]]:
    """One for every limit and block size, started when first needed by an example."""
    with contextlib.ExitStack() as stack:
        yield _Daemons(stack)


class _Daemons(dict[tuple[str, str], DaemonProcess]):
    def __init__(self, stack: Any) -> None:
        self._stack = stack

    def __missing__(self, key: tuple[str, str]) -> DaemonProcess:
        limit, block = key
        flags = ("--memory-limit", limit, "--block-size", block, "--concurrency", "3")
        daemon: DaemonProcess = self._stack.enter_context(running_daemon(*flags))
        self[key] = daemon
        return daemon


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
@given(data=st.data(), files=FILES)
def test_random_checkpoints_come_out_bit_for_bit(
    data: st.DataObject, files: list[list[Spec]], daemons: dict[tuple[str, str], DaemonProcess]
) -> None:
    daemon_limit = data.draw(st.sampled_from(LIMITS))
    daemon = daemons[daemon_limit, data.draw(st.sampled_from(BLOCKS))]
    with tempfile.TemporaryDirectory() as directory:
        paths, want, order = [], {}, []
        for number, tensors in enumerate(files):
            path = Path(directory) / f"{number}.safetensors"
            padding, seed = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 2**32))
            named = write_file(path, f"f{number}", tensors, padding=padding, seed=seed)
            want.update(expected_digests(path, named))
            paths.append(path)
            order += list(named)
        names: list[str] | None = None
        selects: bool = data.draw(st.booleans())
        if order and selects:
            names = data.draw(st.lists(st.sampled_from(order), unique=True))
        least = "64MiB" if daemon_limit == "-1" else "2MiB"  # one slab
        limit = data.draw(st.sampled_from([None, 0, least, "1GiB"]))
        for owned in data.draw(st.sampled_from([[True], [False], [True, False]])):
            kept = []
            found = {}
            with daemon.client().load(paths, tensors=names, memory_limit=limit, owned=owned) as load:
                for name, tensor in load:
                    assert name not in found
                    found[name] = digest(tensor)
                    if owned:
                        kept.append((name, tensor))
                    del tensor
            assert found == {name: want[name] for name in (order if names is None else names)}
            assert {name: digest(tensor) for name, tensor in kept} == (found if owned else {})
            kept.clear()
    daemon.wait_idle()
    status = daemon.status()["staging"]
    if status["limit_bytes"]:
        assert status["peak_bytes"] <= status["limit_bytes"]
