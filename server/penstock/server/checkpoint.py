"""Safetensors headers to extents: pure, and as strict as the safetensors library itself.

`parse_header` accepts exactly the headers that the library accepts. It reads in one of two ways:

- plain: msgspec's typed decoding, for what writers really write. It proves that the header holds nothing
  on which msgspec and the library's serde_json could differ, or declines.
- odd: the `json` module with every token checked, for all the rest. Several times slower and larger.

Either way the tensors land in a `TensorTable`, some 40 bytes a tensor and its name. A header of 100 MB
costs seconds and several hundred MB while it is parsed: `header.py` decides where that happens.
"""

from __future__ import annotations

import json
import re
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isinf
from types import MappingProxyType
from typing import NoReturn

import msgspec

Buffer = bytes | bytearray | memoryview

MAX_HEADER_BYTES = 100_000_000
"""The library's own cap (`MAX_HEADER_SIZE`)."""

MAX_INDEX_BYTES = 32 * 1024 * 1024
"""Longest `*.index.json` that `parse_index` reads: room for some 300,000 tensors."""

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "C64": 64,
        "F64": 64,
        "I64": 64,
        "U64": 64,
    }
)
"""Every dtype of safetensors 0.8.0 and the bits of one element."""

_DTYPES = tuple(DTYPE_BITS)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_METADATA = "__metadata__"
_U64_MAX = 2**64 - 1
_SHOWN_CHARS = 200


class InvalidHeaderError(ValueError):
    """A file is no valid safetensors file. The message says why, naming the tensor where there is one."""


class InvalidIndexError(ValueError):
    """A `*.index.json` is malformed, or names a file that it must not name."""


class TensorTable:
    """The tensors of one file in file order: by start, then end, then name. Immutable.

    Columns of one buffer, read in place, so that a million tensors cost one allocation and no objects.
    Not a container of tensor objects: ask for the fields of tensor `i`.
    """

    # magic, tensors, data start, dims, bytes of names; then the columns in the order of `__init__`
    _HEAD = struct.Struct("=5Q")
    _MAGIC = 0x31656C6261546E50

    __slots__ = ("_buffer", "_data_start", "_dim_ends", "_dims", "_dtypes", "_ends", "_name_ends", "_names")

    def __init__(self, buffer: Buffer) -> None:
        """Wraps `buffer` (kept, not copied; it must not change). Use `from_bytes`."""
        view = memoryview(buffer).toreadonly()
        if len(view) < self._HEAD.size:
            raise ValueError("not a tensor table: too short")
        magic, count, data_start, dims, names_bytes = self._HEAD.unpack_from(view)
        if magic != self._MAGIC or len(view) != self._HEAD.size + 17 * count + 8 * dims + names_bytes:
            raise ValueError("not a tensor table: wrong magic or length")
        at = self._HEAD.size
        self._buffer = view
        self._data_start: int = data_start
        self._ends = view[at : (at := at + 8 * count)].cast("Q")
        self._dims = view[at : (at := at + 8 * dims)].cast("Q")
        self._dim_ends = view[at : (at := at + 4 * count)].cast("I")
        self._name_ends = view[at : (at := at + 4 * count)].cast("I")
        self._dtypes = view[at : (at := at + count)]
        self._names = view[at:]
        if count and (self._dim_ends[-1] != dims or self._name_ends[-1] != names_bytes):
            raise ValueError("not a tensor table: columns disagree")

    @classmethod
    def from_bytes(cls, data: Buffer) -> TensorTable:
        """The table that `to_bytes` gave. Keeps `data`; raises `ValueError` where it is no table.

        Checks the shape of the columns, not every value: the bytes come from a process of our own.
        """
        return cls(data)

    def to_bytes(self) -> memoryview:
        """The table as bytes for another process of this machine (native byte order). Not a copy."""
        return self._buffer

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, i: int) -> str:
        """The tensor's name."""
        return str(self._names[self._name_ends[i - 1] if i else 0 : self._name_ends[i]], "utf-8")

    def names(self) -> Iterator[str]:
        """All names, in file order."""
        return map(self.name, range(len(self)))

    def dtype(self, i: int) -> str:
        """The dtype as the file spells it, a key of `DTYPE_BITS`."""
        return _DTYPES[self._dtypes[i]]

    def shape(self, i: int) -> tuple[int, ...]:
        """The shape in elements, `()` for a scalar."""
        return tuple(self._dims[self._dim_ends[i - 1] if i else 0 : self._dim_ends[i]])

    def start(self, i: int) -> int:
        """Absolute offset in the file of the tensor's first byte."""
        # Valid files have no holes: where one tensor ends the next one starts.
        return self._ends[i - 1] if i else self._data_start

    def end(self, i: int) -> int:
        """Absolute offset in the file just after the tensor's last byte."""
        return self._ends[i]


class PackedMetadata(Mapping[str, str]):
    """The `__metadata__` of one file: a read-only mapping over one buffer, sorted by key.

    Packed because hostile metadata may hold millions of pairs, which as a `dict` would cost the daemon
    hundreds of MB and a long hold of the GIL.
    """

    _HEAD = struct.Struct("=Q")

    __slots__ = ("_buffer", "_ends", "_text")

    def __init__(self, buffer: Buffer) -> None:
        """Wraps `buffer` (kept, not copied; it must not change). Use `from_bytes`."""
        view = memoryview(buffer).toreadonly()
        count = self._HEAD.unpack_from(view)[0] if len(view) >= self._HEAD.size else _U64_MAX
        text_at = self._HEAD.size + 8 * count  # two ends of 4 bytes a pair
        if len(view) < text_at:
            raise ValueError("not packed metadata: too short")
        self._buffer = view
        self._ends = view[self._HEAD.size : text_at].cast("I")
        self._text = view[text_at:]
        if (self._ends[-1] if count else 0) != len(self._text):
            raise ValueError("not packed metadata: wrong length")

    @classmethod
    def pack(cls, pairs: Mapping[str, str]) -> PackedMetadata:
        """Copies `pairs`."""
        ends = array("I")
        text = bytearray()
        for key in sorted(pairs):
            text += key.encode()
            ends.append(len(text))
            text += pairs[key].encode()
            ends.append(len(text))
        return cls(b"".join((cls._HEAD.pack(len(pairs)), ends, text)))

    @classmethod
    def from_bytes(cls, data: Buffer) -> PackedMetadata:
        """The mapping that `to_bytes` gave. Keeps `data`; raises `ValueError` where it is none."""
        return cls(data)

    def to_bytes(self) -> memoryview:
        """The mapping as bytes for another process of this machine. Not a copy."""
        return self._buffer

    def _string(self, i: int) -> str:
        return str(self._text[self._ends[i - 1] if i else 0 : self._ends[i]], "utf-8")

    def __len__(self) -> int:
        return len(self._ends) // 2

    def __iter__(self) -> Iterator[str]:
        return map(self._string, range(0, len(self._ends), 2))

    def __getitem__(self, key: str) -> str:
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            found = self._string(2 * middle)
            if found == key:
                return self._string(2 * middle + 1)
            low, high = (middle + 1, high) if found < key else (low, middle)
        raise KeyError(key)

    def __repr__(self) -> str:
        return f"PackedMetadata({len(self)} pairs, {len(self._text)} bytes)"


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors header says: tensors, metadata (empty where absent), and where the data starts."""

    tensors: TensorTable
    metadata: PackedMetadata
    data_start: int
    """Absolute offset of the data in the file: 8 plus the header's bytes."""
    metadata_omitted: bool = False
    """There is more metadata than is worth keeping; `metadata` is empty."""

    @property
    def size_bytes(self) -> int:
        """What it costs to keep, its objects included."""
        return len(self.tensors.to_bytes()) + len(self.metadata.to_bytes()) + 2048


def parse_header_length(first8: bytes, *, file_bytes: int) -> int:
    """The bytes of the JSON header, from the first 8 bytes of a file of `file_bytes`.

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

    Raises InvalidHeaderError where the safetensors library would refuse the file.
    """
    parse_header_length(len(raw).to_bytes(8, "little"), file_bytes=file_bytes)
    columns = _Columns(8 + len(raw))
    metadata = _read_plain(raw, columns)
    if metadata is None:
        columns = _Columns(8 + len(raw))
        metadata = _read_odd(raw, columns)
    return Header(columns.table(file_bytes), metadata, 8 + len(raw))


def _shown(name: str) -> str:
    """A name fit for a message: printable and of bounded length."""
    return repr(name) if len(name) <= _SHOWN_CHARS else f"{name[:_SHOWN_CHARS]!r}... ({len(name)} characters)"


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
        count = 1
        for dim in shape:
            # One dimension at a time, as the library does: [0, 2**64-1, 2] is fine, [2**64-1, 2, 0] is not.
            count *= dim
            if count > _U64_MAX:
                raise InvalidHeaderError(f"tensor {_shown(name)}: its shape overflows 64 bits")
        bits = count * DTYPE_BITS[dtype]
        if bits > _U64_MAX:
            raise InvalidHeaderError(f"tensor {_shown(name)}: its shape times its dtype overflows 64 bits")
        if (end - start) * 8 != bits:
            raise InvalidHeaderError(
                f"tensor {_shown(name)}: offsets span {end - start} bytes, shape and dtype {bits} bits"
            )
        if not bits:
            self._has_empty = True
        self._starts.append(start)
        self._ends.append(end)
        self._dims.extend(shape)
        self._dim_ends.append(len(self._dims))
        self._dtypes.append(_CODES[dtype])
        self._names += name.encode()
        self._name_ends.append(len(self._names))

    def table(self, file_bytes: int) -> TensorTable:
        """The table, once the tensors are known to cover the data exactly."""
        # Compared in C: almost every file lists its tensors in order, and has no empty ones.
        contiguous = self._starts[:1] + self._ends[:-1] == self._starts and not any(self._starts[:1])
        if not contiguous or self._has_empty:
            self._sort()
        data_bytes = self._ends[-1] if self._ends else 0
        if self._data_start + data_bytes != file_bytes:
            raise InvalidHeaderError(
                f"the header describes {self._data_start + data_bytes} bytes, the file has {file_bytes}"
            )
        # From here on offsets are the file's: within file_bytes they cannot overflow.
        ends = array("Q", (self._data_start + end for end in self._ends))
        head = TensorTable._HEAD.pack(
            TensorTable._MAGIC, len(ends), self._data_start, len(self._dims), len(self._names)
        )
        return TensorTable(
            b"".join((head, ends, self._dims, self._dim_ends, self._name_ends, self._dtypes, self._names))
        )

    def _name(self, i: int) -> bytes:
        return bytes(self._names[self._name_ends[i - 1] if i else 0 : self._name_ends[i]])

    def _sort(self) -> None:
        """Brings the tensors into file order; InvalidHeaderError where they leave a hole or overlap."""
        order = list(range(len(self._ends)))
        # The library leaves empty tensors at one offset to chance; here names settle it. Three stable sorts
        # keep less in memory than one by tuples.
        order.sort(key=self._name)
        order.sort(key=self._ends.__getitem__)
        order.sort(key=self._starts.__getitem__)
        at = 0
        dims, names = array("Q"), bytearray()
        dim_ends, name_ends = array("I"), array("I")
        for i in order:
            if self._starts[i] != at:
                raise InvalidHeaderError(
                    f"tensor {_shown(self._name(i).decode())}: its data starts at {self._starts[i]}, "
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
    """Fills `columns` and gives the metadata; None for a header that is not plain, valid or not.

    Where msgspec and serde_json differ: msgspec keeps the last of duplicate fields and drops the others
    unseen, and reads -0 as 0. All else it is at least as strict about.
    """
    try:
        entries = _ENTRIES.decode(raw)
        metadata_raw = bytes(entries.pop(_METADATA, b""))
        # A tensor has at least five strings: its name, three fields and the dtype. Escaped quotes, duplicate
        # tensors and duplicate fields all add quotes: if there are just this many, then there are none.
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
        # Objects become tuples of pairs: arrays are lists, so that types still tell them apart.
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
        raise InvalidHeaderError(f"tensor {_shown(name)}: {why}")

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
        refuse(f"unknown dtype {_shown(dtype) if type(dtype) is str else 'that is not a string'}")
    if type(shape) is not list or any(type(dim) is not int for dim in shape):
        refuse("its shape is not an array of integers from 0 to 2**64-1")
    if type(offsets) is not list or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        refuse("its data_offsets are not two integers from 0 to 2**64-1")
    return dtype, shape, offsets[0], offsets[1]


def _check_values(root: object) -> None:
    """Refuses nesting too deep and lone surrogates, which `json` lets through."""
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
                        raise InvalidHeaderError(f"lone surrogate in {_shown(value)}") from None
                elif type(value) is list or type(value) is tuple:
                    inner.append(value)
        if not inner:
            return
        level = inner
    raise InvalidHeaderError(f"the header nests deeper than {_MAX_DEPTH} levels")


def _integer(text: str) -> int | float:
    """A u64, else a float: what serde_json makes of integers beyond u64 and of -0 and below."""
    if text[0] != "-" and len(text) <= 20 and (value := int(text)) <= _U64_MAX:
        return value
    return _float(text)


def _float(text: str) -> float:
    # serde_json rounds in the last digit before infinity differently: no header comes near.
    value = float(text)
    if isinf(value):
        raise InvalidHeaderError(f"number out of range: {text[:_SHOWN_CHARS]}")
    return value


def _constant(text: str) -> NoReturn:
    raise InvalidHeaderError(f"the header is not JSON: {text}")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


_INDEX = msgspec.json.Decoder(_Index)
_CLIMBS = re.compile(r"(?:^|/)\.\.(?:/|$)")


def parse_index(raw: bytes) -> dict[str, tuple[str, ...]]:
    """Reads a Hugging Face `*.index.json`: file name to its tensors' names, files by first appearance.

    File names are relative to the index. Raises InvalidIndexError: longer than `MAX_INDEX_BYTES`, not an
    object with a `weight_map` of strings, no tensor at all, or a file name that is empty, absolute, holds
    NUL or climbs with `..`.
    """
    if len(raw) > MAX_INDEX_BYTES:
        raise InvalidIndexError(f"the index has {len(raw)} bytes, more than {MAX_INDEX_BYTES}")
    try:
        weight_map = _INDEX.decode(raw).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidIndexError(f"malformed index: {str(error)[:_SHOWN_CHARS]}") from None
    if not weight_map:
        raise InvalidIndexError("the index names no tensor")
    files: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        files.setdefault(file, []).append(tensor)
    for file in files:
        if not file or file.startswith("/") or "\0" in file or _CLIMBS.search(file):
            raise InvalidIndexError(f"the index names a file it must not name: {_shown(file)}")
    return {file: tuple(tensors) for file, tensors in files.items()}
