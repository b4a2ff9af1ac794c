"""Reads a safetensors header as the library's serde_json and serde do, whatever form it has. Pure.

The `json` module reads it, and every token is checked: the library accepts some forms that no writer
produces, and refuses some that `json` accepts.
"""

from __future__ import annotations

import json
from math import isinf
from typing import NoReturn

from .rules import METADATA, Columns, InvalidHeaderError
from .table import DTYPE_BITS, U64_MAX, PackedMetadata, shown

_FIELDS = ("dtype", "shape", "data_offsets")
_MAX_DEPTH = 127  # serde_json's recursion limit of 128 refuses the 128th level


def read_odd(raw: bytes | bytearray, columns: Columns) -> PackedMetadata:
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
        if name != METADATA:
            # The last of duplicate tensors counts, but the others must be well-formed too.
            infos[name] = _odd_info(name, value)
        elif seen_metadata:
            raise InvalidHeaderError(f"{METADATA} occurs twice")
        else:
            seen_metadata, metadata = True, value
    for name, (dtype, shape, start, end) in infos.items():
        columns.add(name, dtype, shape, start, end)
    if metadata is None:
        return PackedMetadata.pack({})
    if type(metadata) is not tuple or any(type(value) is not str for _, value in metadata):
        raise InvalidHeaderError(f"{METADATA} is not an object of strings")
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
            if field in fields and field in _FIELDS:
                refuse(f"{field} occurs twice")
            fields[field] = content
        for field in _FIELDS:
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
