"""From the JSON of a safetensors header to a table of its tensors. Pure, and as strict as the library itself.

`parse_header` accepts exactly the headers that the safetensors library accepts, but for the two bounds of
`rules.py`. It reads in one of two ways:

- plain: msgspec's typed decoding, for headers in the form that writers produce. It proves that the header
  holds nothing on which msgspec and the library's serde_json could differ, or declines.
- odd (`serde.py`): the `json` module with every token checked, for all other headers. Several times slower
  and larger.

Either way the tensors become a `TensorTable`, some 40 bytes a tensor and its name. A header of 100 MB costs
seconds and several hundred MB while it is parsed: `reading.py` decides where that happens.
"""

from __future__ import annotations

import msgspec

from .rules import METADATA, Columns, parse_header_length
from .serde import read_odd
from .table import Header, PackedMetadata


def parse_header(raw: bytes | bytearray, *, file_bytes: int) -> Header:
    """Reads a JSON header (without the 8 bytes before it) of a file of `file_bytes`.

    Raises InvalidHeaderError if the safetensors library would refuse the file.
    """
    header = parse_plain_header(raw, file_bytes=file_bytes)
    if header is not None:
        return header
    columns = Columns(8 + len(raw))
    metadata = read_odd(raw, columns)
    return Header(columns.table(file_bytes), metadata, 8 + len(raw))


def parse_plain_header(raw: bytes | bytearray, *, file_bytes: int) -> Header | None:
    """The same for headers in the form that writers produce. Returns None soon for any other header."""
    parse_header_length(len(raw).to_bytes(8, "little"), file_bytes=file_bytes)
    columns = Columns(8 + len(raw))
    metadata = _read_plain(raw, columns)
    return None if metadata is None else Header(columns.table(file_bytes), metadata, 8 + len(raw))


class _Info(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_ENTRIES = msgspec.json.Decoder(dict[str, msgspec.Raw])
_INFO = msgspec.json.Decoder(_Info)
_PAIRS = msgspec.json.Decoder(dict[str, str] | None)
_MISREAD = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, KeyError)


def _read_plain(raw: bytes | bytearray, columns: Columns) -> PackedMetadata | None:
    """Fills `columns` and returns the metadata. None for a header that is not plain, valid or not.

    msgspec and serde_json differ in two ways: msgspec keeps the last of duplicate fields and drops the others
    unseen, and it reads -0 as 0. In all else it is at least as strict.
    """
    try:
        entries = _ENTRIES.decode(raw)
        metadata_raw = bytes(entries.pop(METADATA, b""))
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
