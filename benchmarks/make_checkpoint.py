"""Writes checkpoints for benchmarks: valid safetensors files of any size, with the same bytes every time.

    python -m benchmarks.make_checkpoint --size 4GB
    python -m benchmarks.make_checkpoint --size 4GB --shards 4
    python -m benchmarks.make_checkpoint --small-tensors 100000
    python -m benchmarks.make_checkpoint --sparse 200GB

Prints the path. Checkpoints are kept in `benchmarks/.data`, under names that say their kind and size. One
that is there with the right size is not written again. There are three kinds:

- Llama-shaped: bf16, the tensors of a Llama with grouped-query attention and a vocabulary of 32,000 words, as
  many layers as fit the size, in the order in which the safetensors library stores them. The bytes are
  pseudo-random, and no two pages are alike. So nothing on the way can merge, compress or skip them.
- small tensors: bf16 tensors of 6 KiB, named like the experts of a mixture-of-experts model.
- sparse: some hundred tensors of 250 MB each in a file that has almost no blocks on disk. One byte is set in
  each tensor, so a checksum shows whether the right bytes arrived.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

DATA_DIR = Path(__file__).resolve().parent / ".data"
# Part of every name. Raise it when the bytes that this script writes change.
GENERATION = 1

_BF16_BYTES = 2
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_BLOCK_BYTES = 32 << 20


def parse_size(text: str) -> int:
    """The number of bytes that `4000000000`, `4GB` or `1.5GiB` stands for. Raises ValueError."""
    number = text.strip().rstrip("BbGgIiKkMm")
    unit = text.strip()[len(number) :].upper()
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError):
        raise ValueError(f"{text!r} is not a size such as 4000000000, 4GB or 4GiB") from None


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _BF16_BYTES


def llama_tensors(size_bytes: int) -> list[Tensor]:
    """The tensors of a Llama of about `size_bytes`, as wide as is possible with four layers."""
    for hidden in (4096, 2048, 1024, 512, 256):
        outer = _outer_tensors(hidden)
        layer_bytes = sum(t.size_bytes for t in _layer_tensors(0, hidden))
        layers = round((size_bytes - sum(t.size_bytes for t in outer)) / layer_bytes)
        if layers >= 4:
            break
    else:
        raise ValueError(
            f"{size_bytes} bytes are too few for a Llama-shaped checkpoint; ask for at least 50 MB"
        )
    tensors = outer + [t for layer in range(layers) for t in _layer_tensors(layer, hidden)]
    return sorted(tensors, key=lambda t: t.name)


def _outer_tensors(hidden: int) -> list[Tensor]:
    vocabulary = 32_000
    return [
        Tensor("lm_head.weight", (vocabulary, hidden)),
        Tensor("model.embed_tokens.weight", (vocabulary, hidden)),
        Tensor("model.norm.weight", (hidden,)),
    ]


def _layer_tensors(layer: int, hidden: int) -> list[Tensor]:
    prefix = f"model.layers.{layer}"
    key_value = hidden // 4
    intermediate = hidden * 7 // 2
    return [
        Tensor(f"{prefix}.input_layernorm.weight", (hidden,)),
        Tensor(f"{prefix}.mlp.down_proj.weight", (hidden, intermediate)),
        Tensor(f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden)),
        Tensor(f"{prefix}.mlp.up_proj.weight", (intermediate, hidden)),
        Tensor(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
        Tensor(f"{prefix}.self_attn.k_proj.weight", (key_value, hidden)),
        Tensor(f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)),
        Tensor(f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)),
        Tensor(f"{prefix}.self_attn.v_proj.weight", (key_value, hidden)),
    ]


def small_tensors(count: int) -> list[Tensor]:
    """`count` tensors of 6 KiB. Most of them do not start at a page."""
    experts, matrices = 64, ("w1", "w2", "w3")
    tensors = []
    for index in range(count):
        expert, matrix = divmod(index, len(matrices))
        layer, expert = divmod(expert, experts)
        name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrices[matrix]}.weight"
        tensors.append(Tensor(name, (48, 64)))
    return sorted(tensors, key=lambda t: t.name)


def sparse_tensors(size_bytes: int) -> list[Tensor]:
    """Tensors of 250 MB, as many as fit into `size_bytes`."""
    rows, columns = 12_500, 10_000
    count = max(1, size_bytes // (rows * columns * _BF16_BYTES))
    return [Tensor(f"model.layers.{index:05}.weight", (rows, columns)) for index in range(count)]


def llama_checkpoint(size_bytes: int, *, shards: int = 1) -> Path:
    """A Llama-shaped checkpoint: one file, or a directory with an index if there are several shards."""
    tensors = llama_tensors(size_bytes)
    name = f"llama-{size_bytes}-g{GENERATION}"
    if shards == 1:
        path = DATA_DIR / f"{name}.safetensors"
        _write_file(path, tensors)
        return path

    directory = DATA_DIR / f"{name}-of-{shards}"
    directory.mkdir(parents=True, exist_ok=True)
    total = sum(t.size_bytes for t in tensors)
    parts: list[list[Tensor]] = [[] for _ in range(shards)]
    before = 0
    for tensor in tensors:
        parts[min(before * shards // total, shards - 1)].append(tensor)
        before += tensor.size_bytes
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05}-of-{shards:05}.safetensors"
        _write_file(directory / file_name, part, first_block=number << 20)
        weight_map |= {tensor.name: file_name for tensor in part}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    return directory


def different_checkpoints(count: int, size_bytes: int) -> list[Path]:
    """Llama-shaped checkpoints of one file each, all with different bytes."""
    tensors = llama_tensors(size_bytes)
    directory = DATA_DIR / f"different-{size_bytes}-g{GENERATION}"
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{number:03}.safetensors" for number in range(count)]
    for number, path in enumerate(paths):
        _write_file(path, tensors, first_block=number << 20)
    return paths


def small_checkpoint(count: int) -> Path:
    path = DATA_DIR / f"small-{count}-g{GENERATION}.safetensors"
    _write_file(path, small_tensors(count))
    return path


def sparse_checkpoint(size_bytes: int) -> Path:
    """A sparse checkpoint. `expected_sparse_checksum` is the checksum that a reader must get."""
    tensors = sparse_tensors(size_bytes)
    path = DATA_DIR / f"sparse-{size_bytes}-g{GENERATION}.safetensors"
    header = header_of(tensors)
    total = len(header) + sum(t.size_bytes for t in tensors)
    if _is_there(path, total):
        return path
    with _replacing(path) as file:
        file.write(header)
        file.truncate(total)
        file.flush()
        offset = len(header)
        for index, tensor in enumerate(tensors):
            os.pwrite(file.fileno(), bytes([_sparse_stamp(index)]), offset)
            offset += tensor.size_bytes
    return path


def _sparse_stamp(index: int) -> int:
    return index % 255 + 1


def expected_sparse_checksum(size_bytes: int) -> int:
    """The sum over all tensors of one byte in 4096, from the first on: the stamps, as the rest is zero."""
    return sum(_sparse_stamp(index) for index in range(len(sparse_tensors(size_bytes))))


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint that this module wrote."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def header_of(tensors: Iterable[Tensor]) -> bytes:
    """The length field and the JSON header of a file with these tensors."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size_bytes
        entries[tensor.name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    # The data starts at a multiple of 8, as in files of the safetensors library.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _is_there(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, which replaces `path` if it was written without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            # It is written back now, so no benchmark competes with that, and its pages can be dropped.
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_file(path: Path, tensors: list[Tensor], *, first_block: int = 0) -> None:
    header = header_of(tensors)
    remaining = sum(t.size_bytes for t in tensors)
    if _is_there(path, len(header) + remaining):
        return
    base = np.random.Generator(np.random.PCG64(GENERATION)).integers(
        0, 2**64, size=_BLOCK_BYTES // 8, dtype=np.uint64
    )
    block = np.empty_like(base)
    number = first_block
    with _replacing(path) as file:
        file.write(header)
        while remaining:
            # The factor is odd, so any two blocks differ in each of their words.
            np.add(base, np.uint64(number * 0x9E3779B97F4A7C15 % 2**64), out=block)
            size_bytes = min(remaining, _BLOCK_BYTES)
            file.write(block.view(np.uint8).data[:size_bytes])
            remaining -= size_bytes
            number += 1


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=parse_size, default=4 * 10**9, help="bytes of a Llama-shaped one (4GB)"
    )
    parser.add_argument("--shards", type=int, default=1, help="files of a Llama-shaped one (1)")
    parser.add_argument(
        "--small-tensors", type=int, metavar="COUNT", help="write one of small tensors instead"
    )
    parser.add_argument("--sparse", type=parse_size, metavar="SIZE", help="write a sparse one instead")
    options = parser.parse_args(arguments)
    if options.small_tensors:
        print(small_checkpoint(options.small_tensors))
    elif options.sparse:
        print(sparse_checkpoint(options.sparse))
    else:
        print(llama_checkpoint(options.size, shards=options.shards))


if __name__ == "__main__":
    main(sys.argv[1:])
