"""What a `.records` file says: which object and version this is, and a record for each block. Pure.

    head    magic, length of the identity, identity (JSON), CRC of all that
    record  number, start, size, position, a CRC for each chunk, CRC of the record

Each record's CRC begins with that of the head and each has a number, so a record of another file, or one in
the wrong place, is none. Records are believed up to the first that is not whole. CRCs are CRC64NVME.
"""

from __future__ import annotations

import itertools
import json
import struct
from dataclasses import asdict, dataclass, replace
from typing import Final

from ..sources.resuming import same_place

MAGIC: Final = b"PSTTIER1"
CHUNK_BYTES: Final = 256 << 10
"""What one CRC covers, from the start of the block on; the last chunk of a block may be shorter. A read that
begins or ends within a chunk reads all of it."""
BLOCK_BYTES: Final = 8 << 20
"""The most that one record covers, and one write writes."""
PAGE_BYTES: Final = 4096
"""Positions of blocks are multiples of this, as direct I/O needs."""
MAX_RECORDS_BYTES: Final = 256 << 20
"""No object needs more: 5 TiB in whole blocks take 180 MiB."""

MIN_BLOCKS: Final = 64
USUAL_BLOCK_BYTES: Final = 4 << 20
"""Half of a whole block."""

_LENGTH = struct.Struct("<I")
_RECORD = struct.Struct("<QQQQ")
_CRC = struct.Struct("<Q")
CRC_BYTES: Final = _CRC.size
_MAX_IDENTITY_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Identity:
    """What the bytes are of."""

    uri: str
    version: str
    """As `SourceFile.version` says it; of a local file `LocalVersion.lasting_version`."""
    size_bytes: int
    place: str = ""
    """Of a local file, as `LocalVersion.place` says it."""

    def continues(self, kept: Identity) -> bool:
        """What was kept as that is of the same bytes."""
        return replace(kept, place=self.place) == self and same_place(kept.place, self.place)


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of the object, from `start` on, at `position` of the `.blocks` file."""

    start: int
    size_bytes: int
    position: int
    crcs: bytes
    """Of each chunk, packed: numbers would take four times as much memory, which open objects have of all
    their blocks."""

    @property
    def end(self) -> int:
        return self.start + self.size_bytes

    @property
    def span_bytes(self) -> int:
        """What it takes of the file: whole pages."""
        return padded(self.size_bytes)

    def parts(self, start: int, end: int, part_bytes: int) -> list[tuple[int, int]]:
        """That range of the object as consecutive ranges whose whole chunks have at most so many bytes."""
        first = self.start + (start - self.start) // CHUNK_BYTES * CHUNK_BYTES
        edges = [start, *range(first + part_bytes, end, part_bytes), end]
        return list(itertools.pairwise(edges))


def padded(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def most_blocks(size_bytes: int) -> int:
    """How many blocks are kept of an object of that size. Each takes some memory while the object is open,
    however small it is, and loads that select tensors here and there make very small ones."""
    return MIN_BLOCKS + size_bytes // USUAL_BLOCK_BYTES


def crc64nvme(data: bytes | memoryview, before: int = 0) -> int:
    """Releases the interpreter's lock while it works. Its library is imported with the first call: a daemon
    without a tier does not need it."""
    from awscrt import checksums

    return int(checksums.crc64nvme(data, before))


def chunk_crcs(data: memoryview) -> bytes:
    """Of each chunk, `CRC_BYTES` long."""
    return b"".join(
        _CRC.pack(crc64nvme(data[at : at + CHUNK_BYTES])) for at in range(0, len(data), CHUNK_BYTES)
    )


def whole_crc(crcs: bytes, size_bytes: int) -> int:
    """The CRC of so many bytes, from those of their chunks as `chunk_crcs` gives them."""
    from awscrt import checksums

    crc = at = 0
    for (of_chunk,) in _CRC.iter_unpack(crcs):
        crc = checksums.combine_crc64nvme(crc, of_chunk, min(CHUNK_BYTES, size_bytes - at))
        at += CHUNK_BYTES
    return int(crc)


def encode_head(identity: Identity) -> bytes:
    raw = json.dumps(asdict(identity)).encode()
    head = MAGIC + _LENGTH.pack(len(raw)) + raw
    return head + _CRC.pack(crc64nvme(head))


def encode_record(head_crc: int, number: int, block: Block) -> bytes:
    fields = _RECORD.pack(number, block.start, block.size_bytes, block.position)
    body = fields + block.crcs
    return body + _CRC.pack(crc64nvme(body, head_crc))


def head_crc(identity: Identity) -> int:
    """What every record of that version begins its CRC with."""
    return int(_CRC.unpack(encode_head(identity)[-_CRC.size :])[0])


def decode_identity(data: bytes) -> tuple[Identity, int] | None:
    """The identity, and where the records begin. None where the head is not whole."""
    start = len(MAGIC) + _LENGTH.size
    if len(data) < start or data[: len(MAGIC)] != MAGIC:
        return None
    (length,) = _LENGTH.unpack_from(data, len(MAGIC))
    end = start + length
    if length > _MAX_IDENTITY_BYTES or len(data) < end + _CRC.size:
        return None
    if crc64nvme(data[:end]) != _CRC.unpack_from(data, end)[0]:
        return None
    try:
        return Identity(**json.loads(data[start:end])), end + _CRC.size
    except (TypeError, ValueError):  # written by another version of this program
        return None


@dataclass(frozen=True, slots=True)
class Log:
    """What can be believed of a `.records` file."""

    blocks: tuple[Block, ...]
    size_bytes: int
    """How far that goes."""
    head_crc: int
    """What the CRC of each record begins with."""
    torn: bool
    """Something follows that was not written whole, or is rotten."""

    def is_wasted(self, identity: Identity) -> bool:
        """It has as many blocks as may be, and less than half of the object: it is better kept anew."""
        full = len(self.blocks) >= most_blocks(identity.size_bytes)
        return full and 2 * sum(block.size_bytes for block in self.blocks) < identity.size_bytes

    @property
    def blocks_bytes(self) -> int:
        """How far the blocks go in their file."""
        return max((block.position + block.span_bytes for block in self.blocks), default=0)


def decode(data: bytes, identity: Identity, blocks_bytes: int) -> Log | None:
    """`blocks_bytes` is the size of the `.blocks` file. None where the file is of another identity."""
    found = decode_identity(data)
    if found is None or not identity.continues(found[0]):
        return None
    at, crc = found[1], head_crc(found[0])
    blocks: list[Block] = []
    most = most_blocks(identity.size_bytes)
    while (block := _decode_record(data, at, crc, len(blocks))) is not None:
        if (
            len(blocks) == most
            or block.end > identity.size_bytes
            or block.position + block.span_bytes > blocks_bytes
        ):
            break
        blocks.append(block)
        at += _record_bytes(block.size_bytes)
    return Log(tuple(blocks), at, crc, at < len(data))


def _record_bytes(size_bytes: int) -> int:
    return _RECORD.size + (-(-size_bytes // CHUNK_BYTES) + 1) * _CRC.size


def _decode_record(data: bytes, at: int, head: int, number: int) -> Block | None:
    if len(data) < at + _RECORD.size:
        return None
    told, start, size_bytes, position = _RECORD.unpack_from(data, at)
    if told != number or not 0 < size_bytes <= BLOCK_BYTES or position % PAGE_BYTES:
        return None
    end = at + _record_bytes(size_bytes) - _CRC.size
    if len(data) < end + _CRC.size or crc64nvme(data[at:end], head) != _CRC.unpack_from(data, end)[0]:
        return None
    return Block(start, size_bytes, position, data[at + _RECORD.size : end])
