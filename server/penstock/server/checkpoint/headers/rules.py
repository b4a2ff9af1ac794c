"""The rules that the safetensors format has for a file and for each of its tensors. Pure.

They are those of the safetensors library itself, except for names and shapes that no writer produces
(`MAX_NAME_BYTES`, `MAX_DIMS`): these are refused. `decode.py` reads headers, and adds each tensor to
`Columns`.
"""

from __future__ import annotations

from array import array

from .table import DTYPE_BITS, DTYPE_CODES, MAX_DIMS, MAX_NAME_BYTES, U64_MAX, TensorTable, shown

MAX_HEADER_BYTES = 100_000_000
"""The library's own cap (`MAX_HEADER_SIZE`)."""

METADATA = "__metadata__"


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


class Columns:
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
