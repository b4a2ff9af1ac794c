"""Bytes of a segment to torch tensors.

A tensor is a view of the mapping and keeps it alive. It is a copy if the caller asks for copies, or if its
address is no multiple of the dtype's size.

The table holds every dtype that the safetensors library maps to torch. Torch packs two F4 values into
one element of a byte; as in safetensors, the last dimension is halved for it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple

import torch

from penstock.v1 import streamer_pb2 as pb

from .. import errors
from .copies import CopyPool


class _Dtype(NamedTuple):
    torch: torch.dtype
    item_bytes: int
    # Values of the file's dtype in one element of torch's.
    packed: int = 1


_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
# Older torch versions lack some.
DTYPES = {
    name: _Dtype(getattr(torch, attribute), getattr(torch, attribute).itemsize)
    for name, attribute in _NAMES.items()
    if hasattr(torch, attribute)
}
if hasattr(torch, "float4_e2m1fn_x2"):
    DTYPES["F4"] = _Dtype(torch.float4_e2m1fn_x2, 1, packed=2)

# The memory to wrap if every tensor has size zero.
NO_BYTES = (ctypes.c_ubyte * 0)()

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError(
        "penstock.client cannot map safetensors, which are little-endian, on this machine, which is not: use "
        "a little-endian one"
    )


def without_bytes(entry: pb.Tensor) -> torch.Tensor:
    """The tensor on the meta device, with the dtype and shape that the delivered tensor will have.

    Raises UnsupportedDtypeError, and CheckpointInvalidError for a shape that torch cannot represent.
    """
    known = DTYPES.get(entry.dtype)
    if known is None:
        raise _unknown(entry)
    shape = entry.shape[:] if known.packed == 1 else _packed_shape(entry, known.packed)
    return _empty(entry, shape, known.torch, device="meta")


def wrap_segment(
    array: ctypes.Array[ctypes.c_ubyte],
    entries: Iterable[pb.Tensor],
    *,
    start: int,
    size_bytes: int,
    copies: CopyPool | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) for every tensor of the segment that lies at `start` in `array`.

    The caller has checked that the segment lies within the array. Views of `array`, or tensors
    with memory of their own from `copies`. Raises ProtocolError for a tensor that leaves the segment
    or is not as long as its dtype and shape say, UnsupportedDtypeError for an unknown dtype.
    """
    frombuffer, dtypes = torch.frombuffer, DTYPES
    address = ctypes.addressof(array)
    for entry in entries:
        known = dtypes.get(entry.dtype)
        if known is None:
            raise _unknown(entry)
        dtype, item_bytes, packed = known
        shape = entry.shape[:] if packed == 1 else _packed_shape(entry, packed)
        count = prod(shape)
        bytes_, offset = entry.size_bytes, entry.offset
        if count * item_bytes != bytes_ or offset + bytes_ > size_bytes:
            raise errors.broken(
                f"tensor {entry.name!r} ({entry.dtype} {list(entry.shape)}, {bytes_} bytes at {offset}) "
                f"does not fit its segment of {size_bytes} bytes"
            )
        offset += start
        if not bytes_:
            yield entry.name, _empty(entry, shape, dtype)
            continue
        if copies is not None:
            tensor = copies.copy(shape, dtype, address + offset, bytes_)
            yield entry.name, tensor
        elif (address + offset) % item_bytes:
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            ctypes.memmove(tensor.data_ptr(), address + offset, bytes_)
            yield entry.name, tensor
        else:
            tensor = frombuffer(array, dtype=dtype, count=count, offset=offset)
            if len(shape) != 1:
                # torch parses numbers in a third of the time that it takes for a list of them.
                tensor = tensor.view(*shape) if shape else tensor.view(())
            yield entry.name, tensor
        del tensor  # or it would live on while the next one is made


def _unknown(entry: pb.Tensor) -> errors.UnsupportedDtypeError:
    return errors.UnsupportedDtypeError(
        f"tensor {entry.name!r} has dtype {entry.dtype}, which torch {torch.__version__} lacks: upgrade "
        "torch, or leave the tensor out"
    )


def _packed_shape(entry: pb.Tensor, packed: int) -> list[int]:
    shape = entry.shape[:]
    if not shape or shape[-1] % packed:
        raise errors.UnsupportedDtypeError(
            f"tensor {entry.name!r} has dtype {entry.dtype} and shape {shape}: torch {torch.__version__} "
            f"packs {packed} values into one, but the last dimension is no multiple of {packed}; leave the "
            "tensor out"
        )
    shape[-1] //= packed
    return shape


def _empty(entry: pb.Tensor, shape: list[int], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise errors.CheckpointInvalidError(
            f"tensor {entry.name!r} has the shape {list(entry.shape)}, which torch cannot represent; leave "
            "it out"
        ) from error
