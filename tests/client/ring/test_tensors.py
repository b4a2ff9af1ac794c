from __future__ import annotations

import ctypes
import json
import struct
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from penstock.client.errors import CheckpointInvalidError, ProtocolError, UnsupportedDtypeError
from penstock.client.ring.copies import CopyPool
from penstock.client.ring.tensors import DTYPES, wrap_segment
from penstock.v1 import streamer_pb2 as pb

# Every dtype of the format, and its bits.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32,
    "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
SHAPES: tuple[list[int], ...] = ([], [1], [16], [2, 8], [3, 2, 4], [0], [4, 0, 2])


def wrap(data: bytes, *entries: pb.Tensor, copy: bool = False, shift: int = 0) -> dict[str, torch.Tensor]:
    """Wraps a segment that starts `shift` bytes after an address that suits every dtype."""
    array = (ctypes.c_ubyte * (len(data) + 64 + shift))()
    start = -ctypes.addressof(array) % 64 + shift
    ctypes.memmove(ctypes.addressof(array) + start, data, len(data))
    return dict(
        wrap_segment(array, entries, start=start, size_bytes=len(data), copies=CopyPool() if copy else None)
    )


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist() if tensor.numel() else []


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    # The bits of a tensor in a file are whole bytes.
    [(dtype, shape) for dtype in BITS for shape in SHAPES if prod(shape) * BITS[dtype] % 8 == 0],
    ids=str,
)
def test_every_dtype_equals_what_safetensors_gives(
    dtype: str, shape: list[int], shift: int, copy: bool, tmp_path: Path
) -> None:
    size = prod(shape) * BITS[dtype] // 8
    data = bytes((7 * i + 1) % (2 if dtype == "BOOL" else 256) for i in range(size))
    header = json.dumps({"t": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path = tmp_path / "one.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    try:
        with safe_open(path, "pt") as file:
            expected = file.get_tensor("t")
    except Exception:
        expected = None
    entry = pb.Tensor(name="t", dtype=dtype, shape=shape, size_bytes=size)
    if expected is None:
        with pytest.raises(UnsupportedDtypeError, match="'t'"):
            wrap(data, entry, copy=copy, shift=shift)
        return
    got = wrap(data, entry, copy=copy, shift=shift)["t"]
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.stride() == expected.stride()
    assert raw(got) == raw(expected) == list(data)
    assert got.data_ptr() % got.element_size() == 0


def test_views_share_memory_and_copies_do_not() -> None:
    array = (ctypes.c_ubyte * 64)()
    entry = pb.Tensor(name="t", dtype="U8", shape=[8], size_bytes=8)
    view = dict(wrap_segment(array, [entry], start=0, size_bytes=8, copies=None))["t"]
    copy = dict(wrap_segment(array, [entry], start=0, size_bytes=8, copies=CopyPool()))["t"]
    array[3] = 9
    assert view[3] == 9
    assert copy[3] == 0
    assert view.untyped_storage().nbytes() == 8  # saving a tensor must not save the ring


def test_tensors_lie_where_the_offset_says() -> None:
    got = wrap(
        bytes(range(16)),
        pb.Tensor(name="a", dtype="U8", shape=[2, 2], offset=4, size_bytes=4),
        pb.Tensor(name="b", dtype="U16", shape=[1], offset=14, size_bytes=2),
    )
    assert got["a"].tolist() == [[4, 5], [6, 7]]
    assert got["b"].tolist() == [14 + 15 * 256]


@pytest.mark.parametrize(
    "entry",
    [
        pb.Tensor(name="t", dtype="F32", shape=[4], offset=4, size_bytes=16),
        pb.Tensor(name="t", dtype="F32", shape=[4], offset=2**63, size_bytes=16),
        pb.Tensor(name="t", dtype="F32", shape=[4], size_bytes=8),
        pb.Tensor(name="t", dtype="F32", shape=[2], size_bytes=16),
        pb.Tensor(name="t", dtype="F32", shape=[2**62, 4], size_bytes=16),
        pb.Tensor(name="t", dtype="F32", shape=[2**64 - 1, 2**64 - 1], size_bytes=2**64 - 1),
        pb.Tensor(name="t", dtype="U8", shape=[0], offset=17, size_bytes=0),
        pb.Tensor(name="t", dtype="F4", shape=[16], size_bytes=16),
    ],
    ids=str,
)
@pytest.mark.parametrize("copy", [False, True])
def test_tensors_that_leave_their_segment_are_refused(entry: pb.Tensor, copy: bool) -> None:
    with pytest.raises(ProtocolError, match="does not fit"):
        wrap(bytes(16), entry, copy=copy)


def test_an_unknown_dtype_names_tensor_dtype_and_torch() -> None:
    with pytest.raises(UnsupportedDtypeError) as caught:
        wrap(bytes(16), pb.Tensor(name="layer.w", dtype="F2_E1", shape=[4], size_bytes=1))
    assert "'layer.w'" in str(caught.value)
    assert "F2_E1" in str(caught.value)
    assert torch.__version__ in str(caught.value)


def test_odd_rows_of_packed_values_are_refused() -> None:
    with pytest.raises(UnsupportedDtypeError, match="multiple of 2"):
        wrap(bytes(3), pb.Tensor(name="t", dtype="F4", shape=[2, 3], size_bytes=3))


def test_an_empty_shape_beyond_torch_is_an_invalid_checkpoint() -> None:
    with pytest.raises(CheckpointInvalidError, match="cannot represent"):
        wrap(b"", pb.Tensor(name="t", dtype="U8", shape=[0, 2**63], size_bytes=0))


def test_this_torch_knows_every_dtype_of_the_table() -> None:
    assert set(BITS) - set(DTYPES) == {"F6_E2M3", "F6_E3M2"}


@pytest.mark.parametrize("copy", [False, True])
def test_the_caller_s_default_device_and_dtype_do_not_matter(copy: bool) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = wrap(
                bytes(range(16)),
                pb.Tensor(name="a", dtype="U8", shape=[2, 8], size_bytes=16),
                pb.Tensor(name="b", dtype="F32", shape=[0], size_bytes=0),
                copy=copy,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    assert got["a"].flatten().tolist() == list(range(16))
    assert got["b"].device.type == "cpu"
