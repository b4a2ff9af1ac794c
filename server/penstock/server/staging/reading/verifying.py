"""Compares the bytes that an entry reads of each file with the file's checksum.

    a block is read --> its CRC, on the same thread --> joined for the segment --> joined for the file
    a segment is read --> SHA-256, in the order of the file, on threads of its own --> it is ready

A file is compared when its last segment was read, and before that segment becomes ready. Only files are that
are read whole; the bytes of the header count with the checksums that were made when it was parsed. The state
of segments is `filling.py`'s; this knows bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...checkpoint.files import Checkpoint
from ...checkpoint.plan import Segment
from ...errors import CheckpointCorruptError
from ...sources import SourceFile
from ...sources.checksums import SHA256, Checksum, Prefix, Runs, crc
from ...sources.kept import KeptFile
from ...sources.verification import Expected

if TYPE_CHECKING:
    from hashlib import _Hash

Views = Sequence[memoryview]
NOTHING = Expected()


@dataclass(slots=True)
class _File:
    """One that is read whole, and compared in the end."""

    uri: str
    version: str
    size_bytes: int
    checksum: Checksum
    segments: list[int]
    """With bytes, in order."""
    runs: Runs | None
    """Of a CRC: what was read so far."""
    kept_version: str = ""
    """Its version where the tier keeps it."""
    given: bool = False
    """The checksum is the user's."""
    sha256: _Hash | None = None
    followed: int = 0
    """How many of the segments SHA-256 has followed."""

    def value(self) -> str | None:
        """Of all its bytes; None while some are missing."""
        if self.runs is not None:
            whole = self.runs.of(0, self.size_bytes)
            return None if whole is None else f"{whole:0{len(self.checksum.value)}x}"
        assert self.sha256 is not None
        return self.sha256.hexdigest() if self.followed == len(self.segments) else None


class Verifier:
    """Of one entry. `block` and what it returns are used on reader threads, and `follow` on one thread for
    each file; all else on the event loop."""

    def __init__(self, checkpoint: Checkpoint, segments: Sequence[Segment]) -> None:
        """The checkpoint with its headers."""
        self.verified: set[int] = set()
        """Numbers of files whose bytes were all compared."""
        self.verified_bytes = 0
        self._segments = segments
        self._lock = threading.Lock()
        self._parts: dict[int, Runs] = {}
        """Of segments that are being read."""
        self._versions: dict[str, int] = {}
        self._prefixes: dict[str, Prefix] = {}
        self._files = self._watched(checkpoint)

    def _watched(self, checkpoint: Checkpoint) -> dict[int, _File]:
        found: dict[int, _File] = {}
        by_file: dict[int, list[int]] = {}
        for index, segment in enumerate(self._segments):
            by_file.setdefault(segment.file, []).append(index)
        for number, (file, header) in enumerate(zip(checkpoint.files, checkpoint.headers, strict=True)):
            prefix = header.prefix
            if prefix is None:
                continue
            self._prefixes[file.version] = prefix
            expected = checkpoint.expected[number] if checkpoint.expected else NOTHING
            checksum = expected.checksum
            indices = [index for index in by_file.get(number, []) if self._segments[index].size_bytes]
            if checksum is None or not self._whole(indices, prefix.size_bytes, file.size_bytes):
                continue
            one = _File(
                file.uri,
                file.version,
                file.size_bytes,
                checksum,
                indices,
                None,
                kept_version=_kept_version(file),
                given=expected.given,
            )
            if checksum.algorithm == SHA256:
                one.sha256 = prefix.sha256()
            elif checksum.algorithm in prefix.crcs:
                one.runs = Runs(checksum.algorithm)
                one.runs.add(0, prefix.size_bytes, prefix.crcs[checksum.algorithm])
            else:
                continue
            found[number] = one
            self._versions[file.version] = number
        return found

    def _whole(self, indices: Sequence[int], start: int, end: int) -> bool:
        """The segments follow each other from `start` to `end`."""
        for index in indices:
            if self._segments[index].start != start:
                return False
            start = self._segments[index].end
        return start == end and bool(indices)

    # ---- what it knows --------------------------------------------------------------------------

    def verifies(self, version: str, checksum: Checksum) -> bool:
        """It compares, or has compared, that version of a file with that checksum."""
        number = self._versions.get(version)
        return number is not None and self._files[number].checksum == checksum

    def has_verified(self, version: str) -> bool:
        return self._versions.get(version) in self.verified

    def damaged_header(self, checkpoint: Checkpoint) -> CheckpointCorruptError | None:
        """Another load's header of the same version of a file was parsed from other bytes."""
        for file, header in zip(checkpoint.files, checkpoint.headers, strict=True):
            mine, theirs = self._prefixes.get(file.version), header.prefix
            if mine is not None and theirs is not None and mine is not theirs and mine.differs(theirs):
                return corrupt(
                    file.uri,
                    file.version,
                    _kept_version(file),
                    f"its header arrived in two ways, {mine.sha256().hexdigest()} and "
                    f"{theirs.sha256().hexdigest()} by SHA-256",
                )
        return None

    # ---- while it is read -----------------------------------------------------------------------

    def begin(self, index: int) -> None:
        """The segment is read from its beginning, perhaps once more."""
        file = self._files.get(self._segments[index].file)
        if file is not None and file.runs is not None:
            with self._lock:
                self._parts[index] = Runs(file.checksum.algorithm)

    def block(self, index: int, start: int) -> BlockSum | None:
        """For what one thread reads of the segment, from `start` on. None if no CRC is needed."""
        runs = self._parts.get(index)
        return None if runs is None else BlockSum(runs, self._lock, start)

    def in_order(self, index: int) -> bool:
        """The segment is ready only when `follow` was called with it, after the segments before it."""
        file = self._files.get(self._segments[index].file)
        return file is not None and file.sha256 is not None and self._segments[index].size_bytes > 0

    def next_to_follow(self, number: int) -> int | None:
        """The segment of that file with which `follow` is to be called."""
        file = self._files.get(number)
        if file is None or file.sha256 is None or file.followed == len(file.segments):
            return None
        return file.segments[file.followed]

    def follow(self, index: int, views: Views) -> None:
        """Takes a while. Holds no lock."""
        file = self._files.get(self._segments[index].file)
        if file is not None and file.sha256 is not None:
            for view in views:
                file.sha256.update(view)

    def finish(self, index: int) -> CheckpointCorruptError | None:
        """All bytes of the segment are there. An error if its file has been read whole and is not what its
        checksum says."""
        number = self._segments[index].file
        file = self._files.get(number)
        if file is None or not self._segments[index].size_bytes:
            return None
        if file.runs is None:
            file.followed += 1
        else:
            segment = self._segments[index]
            value = self._parts.pop(index).of(segment.start, segment.end)
            assert value is not None
            file.runs.add(segment.start, segment.end, value)
        found = file.value()
        if found is None:
            return None
        if found != file.checksum.value:
            algorithm = file.checksum.algorithm
            return corrupt(
                file.uri,
                file.version,
                file.kept_version,
                f"{algorithm} of the {file.size_bytes} bytes that arrived is {found}, and should be "
                f"{file.checksum.value}",
                given=file.given,
                algorithm=algorithm,
                expected=file.checksum.value,
                found=found,
            )
        self.verified.add(number)
        self.verified_bytes += file.size_bytes
        return None

    def lost(self, index: int) -> None:
        """The segment will not be read: nobody needs it. Its file cannot be compared any more."""
        number = self._segments[index].file
        file = self._files.pop(number, None)
        if file is not None:
            del self._versions[file.version]
            with self._lock:
                for one in file.segments:
                    self._parts.pop(one, None)


class BlockSum:
    """The CRC of consecutive bytes of a file. It is computed by the thread that reads them, piece by piece,
    while they are in its cache: of bytes that are not, it takes almost three times as long."""

    __slots__ = ("_lock", "_runs", "_start", "_value", "reached")

    def __init__(self, runs: Runs, lock: threading.Lock, start: int) -> None:
        self.reached = start
        self._runs = runs
        self._lock = lock
        self._start = start
        self._value = 0

    def add(self, end: int, views: Views) -> None:
        """The views have the bytes from `reached` to `end`."""
        self._value = crc(self._runs.algorithm, views, self._value)
        self.reached = end

    def finish(self) -> None:
        """Joins it with those of the other blocks."""
        with self._lock:
            self._runs.add(self._start, self.reached, self._value)


def _kept_version(file: SourceFile) -> str:
    return file.kept_version if isinstance(file, KeptFile) else ""


def corrupt(
    uri: str, version: str, kept_version: str, wrong: str, *, given: bool = False, **details: str
) -> CheckpointCorruptError:
    error = CheckpointCorruptError(
        f"{uri}: {wrong}; load it again, and if that fails too, fetch or upload the file again",
        file=uri,
        **details,
    )
    error.uri, error.version, error.kept_version, error.given = uri, version, kept_version, given
    return error
