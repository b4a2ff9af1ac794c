"""One version of one object on the disk: which of its bytes are kept, and their reading and writing.

The order is what makes a crash harmless: a block's bytes are synced before its record is written, and the
record is synced before anybody reads the block.
"""

from __future__ import annotations

import os
import secrets
import threading

from .directory import BLOCKS, RECORDS, Directory
from .pieces import Pieces, Span
from .records import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    CRC_BYTES,
    Block,
    Identity,
    Log,
    chunk_crcs,
    crc64nvme,
    decode,
    decode_identity,
    encode_head,
    encode_record,
    head_crc,
    most_blocks,
    padded,
    whole_crc,
)

RECORD_ROOM_BYTES = 64 << 10
"""What a block may take beside its own pages: its record, and what the file system adds."""


class RottenError(Exception):
    """Bytes on the disk are not those that were written."""


class Version:
    """Every thread may use it. Methods that wait for the disk say so."""

    __slots__ = (
        "_blocks_bytes",
        "_directory",
        "_disk",
        "_head_crc",
        "_identity",
        "_lock",
        "_no_room",
        "_number",
        "_pieces",
        "_records_bytes",
        "_under_way",
        "allocated_bytes",
        "dropped",
        "key",
        "pins",
        "place",
        "stem",
        "used_at",
        "users",
    )

    def __init__(self, directory: Directory, key: str, stem: str | None = None) -> None:
        """`stem` names its files; None: there are none yet."""
        self.key = key
        self.stem = stem
        self.users = self.pins = 0
        self.used_at = 0.0
        self.allocated_bytes = 0
        """All four are the tier's, by its lock. `used_at` is 0 of one that is outdated."""
        self.dropped = False
        """Nothing of it is given or kept any more."""
        self._directory = directory
        self._lock = threading.Lock()
        self._disk = threading.Lock()
        """Held while its records are read or written."""
        self.place = ""
        """Of the file that it was opened for, in the life of this daemon."""
        self._pieces: Pieces | None = None
        self._no_room = False
        self._under_way: list[tuple[int, int]] = []
        self._identity: Identity | None = None
        self._head_crc = 0
        self._records_bytes = self._number = self._blocks_bytes = 0

    # ---- what is kept ---------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._pieces is not None

    @property
    def kept_bytes(self) -> int:
        with self._lock:
            return self._pieces.kept_bytes if self._pieces is not None else 0

    @property
    def has_room(self) -> bool:
        """Nothing that was to be written lacked room since it was opened."""
        with self._lock:
            return self._pieces is not None and not self._no_room

    def span(self, position: int, end: int) -> Span:
        """Whether the bytes from there on are kept, and how far that goes."""
        with self._lock:
            return self._pieces.at(position, end) if self._pieces is not None else Span(end, None)

    def missing(self, start: int, end: int) -> tuple[int, int] | None:
        """The first part of a range, of at most one block, that is neither kept nor being written."""
        with self._lock:
            if self._pieces is None or self._no_room or self._is_full():
                return None
            while start < end:
                span = self._pieces.at(start, end)
                if span.block is not None:
                    start = span.end
                    continue
                busy = next((last for first, last in self._under_way if first <= start < last), None)
                if busy is None:
                    later = [first for first, _ in self._under_way if first > start]
                    return start, min(span.end, start + BLOCK_BYTES, *later)
                start = busy
        return None

    def forget(self, start: int, end: int) -> None:
        """These bytes are rotten, or cannot be read."""
        with self._lock:
            if self._pieces is not None:
                self._pieces.remove(start, end)

    def drop(self) -> None:
        """From now on it gives nothing, and takes nothing."""
        with self._lock:
            self.dropped = self._no_room = True
            if self._pieces is not None:
                self._pieces = Pieces(())

    # ---- its files ------------------------------------------------------------------------------

    def open(self, identity: Identity) -> None:
        """Reads what is kept, if that is not known. Waits for the disk; raises OSError, after which nothing
        may be written. What could be read is kept all the same."""
        with self._disk:
            if self._pieces is None and self._open(identity):
                self._directory.touch(f"{self.stem}{RECORDS}")

    def open_unused(self) -> Identity | None:
        """The same for what its files say that it is, without a use of it. None: nothing is kept. Waits for
        the disk; raises OSError."""
        with self._disk:
            if self._pieces is None and self.stem is not None:
                found = decode_identity(self._directory.read_all(self.stem + RECORDS))
                if found is not None:
                    self._open(found[0])
            return self._identity if self._pieces is not None and self.stem is not None else None

    def outdate(self) -> None:
        """After a restart and a loss of power too, every other version of the same counts as later. Waits for
        the disk; raises OSError."""
        with self._disk:
            if self.stem is not None:
                self._directory.outdate(self.stem + RECORDS)

    def close(self) -> None:
        """Nobody uses it: what is known of it is read again the next time."""
        with self._lock:
            self._pieces = None

    def remove(self) -> None:
        """Records first: blocks without records are nothing. Waits for the disk; raises OSError."""
        if self.stem is not None:
            self._directory.remove(self.stem + RECORDS)
            self._directory.remove(self.stem + BLOCKS)

    def read(self, block: Block, start: int, end: int, buffer: memoryview) -> memoryview:
        """The bytes of the file from `start` on, which the block has, up to `end` or as many as fit into the
        buffer. Waits for the disk; raises OSError, and RottenError with nothing told of the bytes."""
        assert self.stem is not None
        first = (start - block.start) // CHUNK_BYTES
        last = -(-(end - block.start) // CHUNK_BYTES)
        last = min(last, first + len(buffer) // CHUNK_BYTES)
        begin, finish = first * CHUNK_BYTES, min(last * CHUNK_BYTES, block.size_bytes)
        fd = self._directory.open(self.stem + BLOCKS, os.O_RDONLY, direct=True)
        try:
            wanted = buffer[: padded(finish - begin)]
            count = self._directory.read(fd, wanted, block.position + begin)
        finally:
            os.close(fd)
        size_bytes = finish - begin
        # One call for all chunks: among many threads each call waits for its turn of the interpreter's lock.
        expected = whole_crc(block.crcs[CRC_BYTES * first : CRC_BYTES * last], size_bytes)
        if count < size_bytes or crc64nvme(buffer[:size_bytes]) != expected:
            raise RottenError
        return buffer[start - block.start - begin : min(end, block.start + finish) - block.start - begin]

    def begin_write(self, start: int, end: int) -> None:
        """From now on that range is not missing, until `end_write`."""
        with self._lock:
            self._under_way.append((start, end))

    def end_write(self, start: int, end: int, *, room: bool = True) -> None:
        """Without `room` nothing is missing any more until it is opened anew."""
        with self._lock:
            self._under_way.remove((start, end))
            self._no_room = self._no_room or not room

    def write(self, start: int, size_bytes: int, buffer: memoryview) -> int:
        """Keeps the first bytes of the buffer, which is at whole pages and long enough for the last one.
        Returns what its files have now. Waits for the disk; raises OSError."""
        crcs = chunk_crcs(buffer[:size_bytes])
        span_bytes = padded(size_bytes)
        buffer[size_bytes:span_bytes] = bytes(span_bytes - size_bytes)
        with self._disk:
            stem = self._stem()
            position = self._blocks_bytes
            self._blocks_bytes += span_bytes
        fd = self._directory.open(stem + BLOCKS, os.O_WRONLY | os.O_CREAT, direct=True)
        try:
            self._directory.write(fd, buffer[:span_bytes], position)
            self._directory.sync(fd)
            allocated_bytes = self._directory.allocated_bytes(fd)
        finally:
            os.close(fd)
        block = Block(start, size_bytes, position, crcs)
        with self._disk:
            allocated_bytes += self._append(stem, block)
        with self._lock:
            if self._pieces is not None and not self.dropped:
                self._pieces.add(block)
        return allocated_bytes

    def _is_full(self) -> bool:
        """It has, or will have, as many blocks as are kept of an object of its size."""
        assert self._identity is not None
        return self._number + len(self._under_way) >= most_blocks(self._identity.size_bytes)

    # ---- inside, with the disk's lock -----------------------------------------------------------

    def _open(self, identity: Identity) -> bool:
        """Whether anything is kept."""
        if self.stem is not None and self.place != identity.place and self._identity is not None:
            self.remove()  # another file system was mounted where the file was
            self.stem = None
        self._identity, self._head_crc, self.place = identity, head_crc(identity), identity.place
        log = self._read_records(identity) if self.stem is not None else None
        with self._lock:
            blocks = log.blocks if log is not None and not self.dropped else ()
            self._pieces, self._no_room = Pieces(blocks), self.dropped
            self._number = len(log.blocks) if log is not None else 0
        if log is not None and log.torn:
            # What follows would stand before the next record, which nobody would find then.
            self._directory.truncate(f"{self.stem}{RECORDS}", log.size_bytes)
        return log is not None

    def _read_records(self, identity: Identity) -> Log | None:
        """None: the files were of no use, and are gone."""
        assert self.stem is not None
        data = self._directory.read_all(self.stem + RECORDS)
        log = decode(data, identity, self._directory.size_bytes(self.stem + BLOCKS))
        if log is None or log.is_wasted(identity):
            self.remove()
            self.stem = None
            return None
        self._records_bytes, self._number, self._head_crc = log.size_bytes, len(log.blocks), log.head_crc
        self._blocks_bytes = log.blocks_bytes
        return log

    def _stem(self) -> str:
        """Makes the files if there are none. No two are ever called the same, or the records of one that was
        removed could come back for the blocks of another."""
        if self.stem is None:
            assert self._identity is not None
            stem = f"{self.key}-{secrets.token_hex(4)}"
            head = encode_head(self._identity)
            fd = self._directory.open(stem + BLOCKS, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.close(fd)
            fd = self._directory.open(stem + RECORDS, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                self._directory.write(fd, head, 0)
                self._directory.sync(fd)
            finally:
                os.close(fd)
            self.stem, self._records_bytes = stem, len(head)
            self._number = self._blocks_bytes = 0
        return self.stem

    def _append(self, stem: str, block: Block) -> int:
        record = encode_record(self._head_crc, self._number, block)
        fd = self._directory.open(stem + RECORDS, os.O_WRONLY)
        try:
            self._directory.write(fd, record, self._records_bytes)
            self._directory.sync(fd)
            self._records_bytes += len(record)
            self._number += 1
            if not self.used_at:  # it was outdated meanwhile, and this write made it the latest
                self._directory.outdate(stem + RECORDS)
            return self._directory.allocated_bytes(fd)
        finally:
            os.close(fd)
