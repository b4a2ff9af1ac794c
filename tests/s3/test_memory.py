"""An object larger than memory may be streams through a small buffer, and nothing else of it is kept."""

from __future__ import annotations

import json
from pathlib import Path

from ..e2e.conftest import StartDaemon
from . import faults
from .proxy import FaultProxy, asks
from .support import MIB, environment

SIZE_MIB = 600
BEYOND_SLABS_KIB = 200_000


def test_what_streams_through_is_not_kept(
    start_daemon: StartDaemon, proxy: FaultProxy, tmp_path: Path
) -> None:
    """With large blocks and many connections, which is when a buffer of any kind would show."""
    path = tmp_path / "large.safetensors"
    names = [f"layer.{number:02}" for number in range(SIZE_MIB // 4)]
    write_large(path, names)
    proxy.on(asks(bucket="large"), faults.serve_file(path), times=None)
    flags = ("--memory-limit", "32MiB", "--object-block-size", "4MiB")
    daemon = start_daemon(*flags, environment=environment(proxy.endpoint))
    found = []
    peak_kib = 0
    with daemon.client() as client, client.load("s3://large/one.safetensors", owned=False) as load:
        for name, tensor in load:
            found.append((name, int(tensor[0]), int(tensor[-1]), tensor.nbytes))
            del tensor
            resident = daemon.memory_kib("RssAnon") + daemon.memory_kib("RssFile")
            peak_kib = max(peak_kib, resident)
    assert found == [(name, number + 1, 255 - number, 4 * MIB) for number, name in enumerate(names)]
    assert peak_kib < BEYOND_SLABS_KIB
    assert daemon.status()["staging"]["peak_bytes"] <= 32 * MIB


def write_large(path: Path, names: list[str]) -> None:
    """Tensors of 4 MiB, almost all of it holes in the file; the first and the last byte of each say which."""
    size_bytes = 4 * MIB
    entries = {
        name: {"dtype": "U8", "shape": [size_bytes], "data_offsets": [at * size_bytes, (at + 1) * size_bytes]}
        for at, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    data_start = 8 + len(header)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(data_start + len(names) * size_bytes)
        for number in range(len(names)):
            start = data_start + number * size_bytes
            file.seek(start)
            file.write(bytes([number + 1]))
            file.seek(start + size_bytes - 1)
            file.write(bytes([255 - number]))
