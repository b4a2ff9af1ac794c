"""Reading a file's safetensors header, with bounded memory and time whatever the file says.

    bytes (a reader thread of the file's mount) --> parser (one thread) or child (`child.py`) --> packed table

One speculative read gets the whole header of almost every file. Then:

- a header of up to `INLINE_BYTES` in the usual form is parsed here, in at most 50 ms;
- a longer or unusual one is first gathered as a whole (`spool.py`), and then goes to a child process.

All bytes are there before anything is parsed, so storage that hangs or trickles occupies neither the parser
nor a child. Both serve users in turn: with n users at work, a header waits for about n times what the
costliest header takes.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from ...config.units import show_size
from ...errors import CheckpointInvalidError, TooManyLoadsError
from ...sources.checksums import Prefix
from . import child
from .budget import Charge
from .decode import parse_header, parse_plain_header
from .index import MAX_INDEX_BYTES, Index, InvalidIndexError, parse_index
from .keep import Keep, Kept, Parsed
from .parsers import Parsers
from .rules import InvalidHeaderError, parse_header_length
from .table import Header, PackedMetadata, TensorTable

SPECULATIVE_BYTES = 256 * 1024
"""Size of the first read. The headers of all but a few files are shorter."""

SMALL_FIRST_BYTES = 16 * 1024
"""The same when the user's share of memory is used up."""

INLINE_BYTES = 1024 * 1024
"""Longest header or index that is parsed in this process. Measured: 50 ms at most for a plain one."""

INLINE_ODD_BYTES = 64 * 1024
"""Longest unusual header that is parsed in this process. Measured: 15 ms at most; a child takes 100 ms."""

_CHUNK_BYTES = 1024 * 1024
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOSPC)


class RangeReader(Protocol):
    """A file of known size, local or remote, read at offsets. Blocking."""

    @property
    def size_bytes(self) -> int:
        """The file's size."""

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fills the views, one after the other, with the file's bytes from `offset` on, or raises."""


class _Summed:
    """Of a file that is read on, from where `prefix` ends."""

    def __init__(self, file: RangeReader, prefix: Prefix) -> None:
        self._file = file
        self._prefix = prefix

    @property
    def size_bytes(self) -> int:
        return self._file.size_bytes

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        assert offset == self._prefix.size_bytes
        self._file.read_into(offset, views)
        for view in views:
            self._prefix.add(view)


@dataclass(frozen=True, slots=True)
class Reading:
    """The user for whom a version of a file is read, and the place where the result is kept."""

    uid: int
    version: str
    keep: Keep
    parsers: Parsers
    give_up_at: float = math.inf
    """Of the monotonic clock: until when the bytes may wait for a spool."""
    on_read: Callable[[], None] = lambda: None
    """Called when all bytes are there, before they are parsed. May raise."""
    crcs: tuple[str, ...] = ()
    """Which CRCs of a header are kept with it."""

    def once(self, charge: Charge, parse: Callable[[], Parsed | None]) -> Kept | None:
        """Returns the kept result for that version, if another load has read it meanwhile. Otherwise calls
        `parse` and keeps its result. `charge` covers the bytes held on the way, and then the result."""
        kept = self.keep.find(self.uid, self.version)
        if kept is not None:
            return kept
        parsed = parse()
        return None if parsed is None else self.keep.add(self.uid, self.version, parsed, charge)


def read_header(file: RangeReader, reading: Reading) -> Kept:
    """Reads, parses and keeps the header of `file`. Blocks: call it on a worker thread.

    Raises InvalidHeaderError, also for a header that is too costly to read; TooManyLoadsError and
    CheckpointInvalidError for lack of memory, processes or descriptors; and the errors of `file.read_into`.
    """
    try:
        with _charged(reading) as charge:
            return _read_header(file, reading, charge)
    except child.RefusedError as error:
        raise InvalidHeaderError(str(error)) from None


def _read_header(file: RangeReader, reading: Reading, charge: Charge) -> Kept:
    file_bytes = file.size_bytes
    first = _read_first(file, charge)
    header_bytes = parse_header_length(bytes(first[:8]), file_bytes=file_bytes)
    prefix = Prefix(reading.crcs)
    prefix.add(first[: 8 + header_bytes])
    file = _Summed(file, prefix)
    del first[:8]
    del first[header_bytes:]

    def parse_child(spool: int, charge: Charge) -> Header:
        is_whole, (table, metadata) = child.parse_in_child(
            child.HEADER, spool, header_bytes, file_bytes, charge.resize
        )
        return Header(
            TensorTable.from_bytes(table),
            PackedMetadata.from_bytes(metadata),
            8 + header_bytes,
            metadata_omitted=not is_whole,
            prefix=prefix,
        )

    def parse_here() -> Header | None:
        header = _parse_here(first, file_bytes)
        return None if header is None else replace(header, prefix=prefix)

    try:
        return _read(file, 8, first, header_bytes, reading, charge, parse_here, parse_child)
    except child.TooCostlyError:
        raise InvalidHeaderError(f"the header is {_too_costly(header_bytes)}") from None


def read_index(file: RangeReader, reading: Reading) -> Kept:
    """Reads, parses and keeps an index file. Blocks. Raises InvalidIndexError, and the errors of
    `read_header`."""
    index_bytes = file.size_bytes
    if index_bytes > MAX_INDEX_BYTES:
        raise InvalidIndexError(
            f"an index of {show_size(index_bytes)}, larger than {show_size(MAX_INDEX_BYTES)}"
        )
    try:
        with _charged(reading) as charge:
            return _read_index(file, reading, charge)
    except child.RefusedError as error:
        raise InvalidIndexError(str(error)) from None
    except child.TooCostlyError:
        raise InvalidIndexError(f"the index is {_too_costly(index_bytes)}") from None


def _read_index(file: RangeReader, reading: Reading, charge: Charge) -> Kept:
    index_bytes = file.size_bytes
    first = _read_first(file, charge)

    def parse_child(spool: int, charge: Charge) -> Index:
        _, (packed, _) = child.parse_in_child(child.INDEX, spool, index_bytes, 0, charge.resize)
        return Index(packed)

    return _read(file, 0, first, index_bytes, reading, charge, lambda: parse_index(first), parse_child)


@contextmanager
def _charged(reading: Reading) -> Iterator[Charge]:
    """A charge that an error ends now, and not only when it is forgotten."""
    charge = reading.keep.budget.charge(reading.uid)
    try:
        yield charge
    except BaseException:
        charge.resize(0)
        raise


def _read(
    file: RangeReader,
    start: int,
    first: bytearray,
    size_bytes: int,
    reading: Reading,
    charge: Charge,
    parse_here: Callable[[], Parsed | None],
    parse_child: Callable[[int, Charge], Parsed],
) -> Kept:
    """Reads `size_bytes` of the file from `start` on, of which `first` are there already, and parses them: in
    this process if they are few and `parse_here` accepts them, else in a child. `charge` is for `first`, and
    then for what takes its place."""
    if size_bytes <= INLINE_BYTES:
        _complete(file, start, first, size_bytes, charge)
        reading.on_read()
        kept = reading.parsers.here(reading.uid, lambda: reading.once(charge, parse_here))
        if kept is not None:
            return kept
    with _gathered(file, start, first, size_bytes, reading, charge) as spool:
        kept = reading.parsers.in_child(
            reading.uid, lambda: reading.once(charge, lambda: parse_child(spool, charge))
        )
    assert kept is not None
    return kept


def _parse_here(raw: bytearray, file_bytes: int) -> Header | None:
    """None for an unusual header that is long enough to need a child."""
    parse = parse_header if len(raw) <= INLINE_ODD_BYTES else parse_plain_header
    return parse(raw, file_bytes=file_bytes)


def _too_costly(size_bytes: int) -> str:
    memory, seconds = child.limits(size_bytes)
    return (
        f"too costly to read: {size_bytes} bytes did not parse within {memory} bytes of memory and {seconds} "
        "seconds; if the machine or the control group was short of memory, load it again"
    )


def _read_first(file: RangeReader, charge: Charge) -> bytearray:
    """The beginning of the file, as much as there is memory for. There may be a thousand threads that read
    one: some for each mount and store."""
    count = min(file.size_bytes, SPECULATIVE_BYTES)
    try:
        charge.resize(count)
    except (TooManyLoadsError, CheckpointInvalidError):
        count = min(count, SMALL_FIRST_BYTES)
    first = bytearray(count)
    if first:
        with memoryview(first) as view:
            file.read_into(0, [view])
    return first


def _complete(file: RangeReader, start: int, raw: bytearray, size_bytes: int, charge: Charge) -> None:
    """Reads on, until `raw` has `size_bytes` of the file from `start` on."""
    charge.resize(size_bytes)
    held = len(raw)
    if held < size_bytes:
        raw.extend(bytes(size_bytes - held))
        with memoryview(raw) as view:
            file.read_into(start + held, [view[held:]])


@contextmanager
def _gathered(
    file: RangeReader, start: int, first: bytearray, size_bytes: int, reading: Reading, charge: Charge
) -> Iterator[int]:
    """A spool with `size_bytes` of the file from `start` on. Empties `first`, the bytes that are there
    already."""
    spools = reading.parsers.spools
    try:
        with spools.open(reading.uid, size_bytes + _CHUNK_BYTES, give_up_at=reading.give_up_at) as spool:
            held = len(first)
            _write(spool, first)
            first.clear()
            charge.resize(0)
            if held < size_bytes:
                _copy(file, start, held, size_bytes, spool)
                reading.on_read()
            yield spool
    except OSError as error:
        if error.errno not in _EXHAUSTED:
            raise
        raise TooManyLoadsError(
            f"a header or index of {show_size(size_bytes)} needs a process of its own, which could not be "
            f"started: {error.strerror}; raise the limits of penstockd (open files, processes, memory), or "
            "try again later"
        ) from error


def _copy(file: RangeReader, start: int, held: int, size_bytes: int, spool: int) -> None:
    """Copies in pieces, and holds only one piece at a time."""
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, size_bytes - held)))
    for at in range(held, size_bytes, _CHUNK_BYTES):
        chunk = buffer[: min(_CHUNK_BYTES, size_bytes - at)]
        file.read_into(start + at, [chunk])
        _write(spool, chunk)


def _write(spool: int, data: bytearray | memoryview) -> None:
    with memoryview(data) as view:
        at = 0
        while at < len(view):
            at += os.write(spool, view[at:])
