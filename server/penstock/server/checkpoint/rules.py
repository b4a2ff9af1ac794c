"""From safetensors headers to extents. Pure, and as strict as the safetensors library itself.

`parse_header` accepts exactly the headers that the library accepts, except for names and shapes that no
writer produces (`MAX_NAME_BYTES`, `MAX_DIMS`): it refuses these. It reads in one of two ways:

- plain: msgspec's typed decoding, for headers in the form that writers produce. It proves that the header
  holds nothing on which msgspec and the library's serde_json could differ, or declines.
- odd: the `json` module with every token checked, for all other headers. Several times slower and larger.

Either way the tensors become a `TensorTable`, some 40 bytes a tensor and its name. A header of 100 MB costs
seconds and several hundred MB while it is parsed: `header.py` decides where that happens.
"""

from __future__ import annotations

import json
from array import array
from math import isinf
from typing import NoReturn

import msgspec

from .table import (
    DTYPE_BITS,
    DTYPE_CODES,
    MAX_DIMS,
    MAX_NAME_BYTES,
    U64_MAX,
    Header,
    PackedMetadata,
    TensorTable,
    shown,
)

MAX_HEADER_BYTES = 100_000_000
"""The library's own cap (`MAX_HEADER_SIZE`)."""

_METADATA = "__metadata__"


class InvalidHeaderError(ValueError):
    """A file is no valid safetensors file. The message gives the reason, and names the tensor if there is
    one."""


def parse_header_length(first8: bytes, *, file_bytes: int) -> int:
    """The length of the JSON header in bytes, from the first 8 bytes of a file of `file_bytes`.

    Raises InvalidHeaderError: no 8 bytes, longer than `MAX_HEADER_BYTES`, or longer than the file.
    """
    if file_bytes < 8 or len(first8) < 8:
        raise InvalidHeaderError(f"the file has {file_bytes} bytes, too few for a safetensors file")
    header_bytes = int.from_bytes(first8[:8], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise InvalidHeaderError(f"the header claims {header_bytes} bytes, more than {MAX_HEADER_BYTES}")
    if header_bytes > file_bytes - 8:
        raise InvalidHeaderError(f"the header claims {header_bytes} bytes in a file of {file_bytes}")
    return header_bytes


def parse_header(raw: bytes | bytearray, *, file_bytes: int) -> Header:
    """Reads a JSON header (without the 8 bytes before it) of a file of `file_bytes`.

    Raises InvalidHeaderError if the safetensors library would refuse the file.
    """
    header = parse_plain_header(raw, file_bytes=file_bytes)
    if header is not None:
        return header
    columns = _Columns(8 + len(raw))
    metadata = _read_odd(raw, columns)
    return Header(columns.table(file_bytes), metadata, 8 + len(raw))


def parse_plain_header(raw: bytes | bytearray, *, file_bytes: int) -> Header | None:
    """The same for headers in the form that writers produce. Returns None soon for any other header."""
    parse_header_length(len(raw).to_bytes(8, "little"), file_bytes=file_bytes)
    columns = _Columns(8 + len(raw))
    metadata = _read_plain(raw, columns)
    return None if metadata is None else Header(columns.table(file_bytes), metadata, 8 + len(raw))


class _Columns:
    """Gathers tensors in the header's order, checks each, and makes the table in file order."""

    def __init__(self, data_start: int) -> None:
        self._data_start = data_start
        self._starts, self._ends, self._dims = array("Q"), array("Q"), array("Q")
        self._dim_ends, self._name_ends = array("I"), array("I")
        self._dtypes, self._names = bytearray(), bytearray()
        self._has_empty = False

    def add(self, name: str, dtype: str, shape: list[int], start: int, end: int) -> None:
        """Adds one tensor. `start` and `end` are relative to the data, all numbers within u64."""
        name_bytes = name.encode()
        if len(name_bytes) > MAX_NAME_BYTES:
            raise InvalidHeaderError(f"tensor {shown(name)}: its name has more than {MAX_NAME_BYTES} bytes")
        if len(shape) > MAX_DIMS:
            raise InvalidHeaderError(
                f"tensor {shown(name)}: it has {len(shape)} dimensions, more than {MAX_DIMS}"
            )
        count = 1
        for dim in shape:
            # One dimension at a time, as the library does: [0, 2**64-1, 2] is fine, [2**64-1, 2, 0] is not.
            count *= dim
            if count > U64_MAX:
                raise InvalidHeaderError(f"tensor {shown(name)}: its shape overflows 64 bits")
        bits = count * DTYPE_BITS[dtype]
        if bits > U64_MAX:
            raise InvalidHeaderError(f"tensor {shown(name)}: its shape times its dtype overflows 64 bits")
        if (end - start) * 8 != bits:
            raise InvalidHeaderError(
                f"tensor {shown(name)}: offsets span {end - start} bytes, shape and dtype {bits} bits"
            )
        if not bits:
            self._has_empty = True
        self._starts.append(start)
        self._ends.append(end)
        self._dims.extend(shape)
        self._dim_ends.append(len(self._dims))
        self._dtypes.append(DTYPE_CODES[dtype])
        self._names += name_bytes
        self._name_ends.append(len(self._names))

    def table(self, file_bytes: int) -> TensorTable:
        """Checks that the tensors cover the data exactly, and returns the table."""
        # Compared in C: almost every file lists its tensors in order, and has no empty ones.
        contiguous = self._starts[:1] + self._ends[:-1] == self._starts and not any(self._starts[:1])
        if not contiguous or self._has_empty:
            self._sort()
        data_bytes = self._ends[-1] if self._ends else 0
        if self._data_start + data_bytes != file_bytes:
            described_bytes = self._data_start + data_bytes
            missing = described_bytes - file_bytes
            odd = f"it is cut off, {missing} are missing" if missing > 0 else f"{-missing} are too many"
            raise InvalidHeaderError(
                f"the header describes {described_bytes} bytes, the file has {file_bytes}: {odd}"
            )
        # From here on offsets are the file's: within file_bytes they cannot overflow.
        ends = array("Q", (self._data_start + end for end in self._ends))
        return TensorTable.pack(
            data_start=self._data_start,
            ends=ends,
            dims=self._dims,
            dim_ends=self._dim_ends,
            name_ends=self._name_ends,
            dtypes=self._dtypes,
            names=self._names,
        )

    def _name(self, i: int) -> bytes:
        return bytes(self._names[self._name_ends[i - 1] if i else 0 : self._name_ends[i]])

    def _sort(self) -> None:
        """Brings the tensors into file order. Raises InvalidHeaderError if they leave a hole or overlap."""
        order = list(range(len(self._ends)))
        # The order of empty tensors at one offset is random in the library; here names decide it. Three
        # stable sorts need less memory than one by tuples.
        order.sort(key=self._name)
        order.sort(key=self._ends.__getitem__)
        order.sort(key=self._starts.__getitem__)
        at = 0
        dims, names = array("Q"), bytearray()
        dim_ends, name_ends = array("I"), array("I")
        for i in order:
            if self._starts[i] != at:
                raise InvalidHeaderError(
                    f"tensor {shown(self._name(i).decode())}: its data starts at {self._starts[i]}, "
                    f"where {at} was due: holes and overlaps are not allowed"
                )
            at = self._ends[i]
            dims += self._dims[self._dim_ends[i - 1] if i else 0 : self._dim_ends[i]]
            dim_ends.append(len(dims))
            names += self._name(i)
            name_ends.append(len(names))
        self._ends = array("Q", (self._ends[i] for i in order))
        self._dtypes = bytearray(self._dtypes[i] for i in order)
        self._dims, self._dim_ends, self._names, self._name_ends = dims, dim_ends, names, name_ends


class _Info(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_ENTRIES = msgspec.json.Decoder(dict[str, msgspec.Raw])
_INFO = msgspec.json.Decoder(_Info)
_PAIRS = msgspec.json.Decoder(dict[str, str] | None)
_MISREAD = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, KeyError)


def _read_plain(raw: bytes | bytearray, columns: _Columns) -> PackedMetadata | None:
    """Fills `columns` and returns the metadata. None for a header that is not plain, valid or not.

    msgspec and serde_json differ in two ways: msgspec keeps the last of duplicate fields and drops the others
    unseen, and it reads -0 as 0. In all else it is at least as strict.
    """
    try:
        entries = _ENTRIES.decode(raw)
        metadata_raw = bytes(entries.pop(_METADATA, b""))
        # A tensor has at least five strings: its name, three fields and the dtype. Escaped quotes, duplicate
        # tensors and duplicate fields all add quotes. So if the number is exact, the header has none of them.
        strings = 5 * len(entries) + (1 if metadata_raw else 0)
        if raw.count(b'"') != metadata_raw.count(b'"') + 2 * strings:
            return None
        decode, add = _INFO.decode, columns.add
        for name, entry in entries.items():
            info = decode(entry)
            start, end = info.data_offsets
            if (start == 0 or 0 in info.shape) and b"-" in bytes(entry):
                return None
            add(name, info.dtype, info.shape, start, end)
        return PackedMetadata.pack(_PAIRS.decode(metadata_raw) or {} if metadata_raw else {})
    except _MISREAD:
        return None


_MAX_DEPTH = 127  # serde_json's recursion limit of 128 refuses the 128th level


def _read_odd(raw: bytes | bytearray, columns: _Columns) -> PackedMetadata:
    """Fills `columns` and gives the metadata, deciding on every token as serde_json and serde do."""
    try:
        # Objects become tuples of pairs. Arrays are lists, so the types still differ.
        root = json.JSONDecoder(
            object_pairs_hook=tuple, parse_int=_integer, parse_float=_float, parse_constant=_constant
        ).decode(str(raw, "utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidHeaderError(f"the header is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InvalidHeaderError(f"the header is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise InvalidHeaderError(f"the header nests deeper than {_MAX_DEPTH} levels") from None
    if type(root) is not tuple:
        raise InvalidHeaderError("the header is not a JSON object")
    _check_values(root)
    metadata: object = None
    infos: dict[str, tuple[str, list[int], int, int]] = {}
    seen_metadata = False
    for name, value in root:
        if name != _METADATA:
            # The last of duplicate tensors counts, but the others must be well-formed too.
            infos[name] = _odd_info(name, value)
        elif seen_metadata:
            raise InvalidHeaderError(f"{_METADATA} occurs twice")
        else:
            seen_metadata, metadata = True, value
    for name, (dtype, shape, start, end) in infos.items():
        columns.add(name, dtype, shape, start, end)
    if metadata is None:
        return PackedMetadata.pack({})
    if type(metadata) is not tuple or any(type(value) is not str for _, value in metadata):
        raise InvalidHeaderError(f"{_METADATA} is not an object of strings")
    return PackedMetadata.pack(dict(metadata))


def _odd_info(name: str, value: object) -> tuple[str, list[int], int, int]:
    """Dtype, shape, start and end of one tensor; or InvalidHeaderError."""

    def refuse(why: str) -> NoReturn:
        raise InvalidHeaderError(f"tensor {shown(name)}: {why}")

    if type(value) is list:
        # serde reads a struct from an array too: ["F32", [1], [0, 4]].
        if len(value) != 3:
            refuse("its description is not an object of dtype, shape and data_offsets")
        dtype, shape, offsets = value
    elif type(value) is tuple:
        fields: dict[str, object] = {}
        for field, content in value:
            if field in fields and field in _Info.__struct_fields__:
                refuse(f"{field} occurs twice")
            fields[field] = content
        for field in _Info.__struct_fields__:
            if field not in fields:
                refuse(f"it has no {field}")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    else:
        refuse("its description is not an object of dtype, shape and data_offsets")
    if type(dtype) is tuple and len(dtype) == 1 and dtype[0][1] is None:
        dtype = dtype[0][0]  # serde reads a variant from a map too: {"F32": null}.
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        refuse(f"unknown dtype {shown(dtype) if type(dtype) is str else 'that is not a string'}")
    if type(shape) is not list or any(type(dim) is not int for dim in shape):
        refuse("its shape is not an array of integers from 0 to 2**64-1")
    if type(offsets) is not list or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        refuse("its data_offsets are not two integers from 0 to 2**64-1")
    return dtype, shape, offsets[0], offsets[1]


def _check_values(root: object) -> None:
    """Refuses nesting that is too deep and lone surrogates; `json` accepts both."""
    level = [root]
    for _ in range(_MAX_DEPTH):
        inner: list[object] = []
        for container in level:
            values: list[object]
            if type(container) is tuple:
                values = [part for pair in container for part in pair]
            else:
                assert type(container) is list
                values = container
            for value in values:
                if type(value) is str:
                    try:
                        value.isascii() or value.encode()
                    except UnicodeEncodeError:
                        raise InvalidHeaderError(f"lone surrogate in {shown(value)}") from None
                elif type(value) is list or type(value) is tuple:
                    inner.append(value)
        if not inner:
            return
        level = inner
    raise InvalidHeaderError(f"the header nests deeper than {_MAX_DEPTH} levels")


def _integer(text: str) -> int | float:
    """A u64, else a float, as serde_json reads integers beyond u64, -0, and negative ones."""
    if text[0] != "-" and len(text) <= 20 and (value := int(text)) <= U64_MAX:
        return value
    return _float(text)


def _float(text: str) -> float:
    # serde_json rounds in the last digit before infinity differently: no header comes near.
    value = float(text)
    if isinf(value):
        raise InvalidHeaderError(f"number out of range: {text[:200]}")
    return value


def _constant(text: str) -> NoReturn:
    raise InvalidHeaderError(f"the header is not JSON: {text}")
