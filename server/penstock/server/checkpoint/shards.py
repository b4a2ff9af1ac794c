"""Opens the files of a checkpoint, and reads their headers and index files.

    a file's place --opening.py: a worker thread--> open file --headers/reading.py--> header, kept

Blocks. Costs are bounded before they arise: descriptors and the seconds that storage may take for each file
(`opening.py`), the memory of headers and indexes (`headers/keep.py`), and the parsing (`headers/reading.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ..config.units import show_size
from ..errors import CheckpointInvalidError, CheckpointNotFoundError
from ..sources import Access, RetryingReader, Source, SourceFile
from ..sources.kept import HasFirstBytes
from ..system.quota import Quota
from .files import NAMING_BYTES, Checkpoint, files_bytes
from .headers.budget import Parts
from .headers.index import InvalidIndexError
from .headers.keep import PARSED_BYTES, Keep, Kept
from .headers.parsers import Parsers
from .headers.reading import Reading, read_header, read_index
from .headers.refusal import refused_header, refused_index
from .headers.rules import InvalidHeaderError
from .opening import Descriptors, Opening, open_together

HEADERS_AT_ONCE = 64
HEADER_BYTES = PARSED_BYTES
"""Most bytes of the headers of one load, each counted as often as it is named: some 1,300,000 tensors."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file of a checkpoint that is not open yet."""

    source: Source
    location: str
    index: str | None
    """The location of the index that names the file, if one does."""


@dataclass(frozen=True, slots=True)
class IndexFile:
    """An index that was read, as it was in one version of its file."""

    location: str
    version: str
    kept: Kept

    @property
    def files(self) -> Sequence[str]:
        """The names of the files that it names."""
        return self.kept.index.files

    def names(self, number: int) -> Iterator[str]:
        """The names of the tensors in file `number`, as it says."""
        return self.kept.index.names(number)


class ShardOpener:
    """Keeps the headers of unchanged files, so a warm load reads none. Thread-safe."""

    def __init__(self, descriptors: Quota, keep: Keep, parsers: Parsers) -> None:
        """`descriptors` is the quota of descriptors for open files."""
        self._descriptors = descriptors
        self._keep = keep
        self._parsers = parsers

    def open(
        self, sources: tuple[str, ...], members: Sequence[Member], access: Access, lists: Parts
    ) -> Checkpoint:
        """The open files of `members`, which `sources` mean. `lists` is charged with them, and is the
        checkpoint's. Raises as `Catalog.resolve` does, and leaves nothing open then."""
        times = Counter((member.source.kind, member.location) for member in members)
        unique = {(member.source.kind, member.location): member for member in members}
        characters = sum(len(location) for _, location in unique)
        lists.set("files", files_bytes(len(unique), characters) + NAMING_BYTES * len(members))
        needed = sum(member.source.descriptors_per_file for member in unique.values())
        descriptors = Descriptors(self._descriptors, access.uid)
        opened: dict[tuple[str, str], tuple[SourceFile, Kept]] = {}
        total_bytes = 0
        keys = iter(unique)
        try:
            descriptors.take(needed, len(unique))
            # Many at a time, since the latencies of hundreds of shards must not add up.
            while some := list(islice(keys, HEADERS_AT_ONCE)):
                openings = [self._opening(unique[key], access) for key in some]
                opened.update(zip(some, open_together(openings, descriptors), strict=True))
                total_bytes += sum(times[key] * opened[key][1].parsed.size_bytes for key in some)
                if total_bytes > HEADER_BYTES:
                    raise CheckpointInvalidError(
                        f"the headers of the first {len(opened)} of {len(unique)} files take "
                        f"{show_size(total_bytes)}, more than the {show_size(HEADER_BYTES)} that one load "
                        "may have; load fewer files at a time"
                    )
        except BaseException:
            for file, _ in opened.values():
                file.close()
            descriptors.release()
            raise
        ordered = [opened[member.source.kind, member.location] for member in members]
        return Checkpoint(
            sources,
            tuple(file for file, _ in ordered),
            tuple(kept.header for _, kept in ordered),
            kept=tuple(kept for _, kept in opened.values()),
            descriptors=descriptors,
            lists=lists,
        )

    def read_index(self, source: Source, location: str, access: Access) -> IndexFile:
        """Raises as `Catalog.resolve` does."""
        descriptors = Descriptors(self._descriptors, access.uid)
        descriptors.take(source.descriptors_per_file, 1)
        try:
            (found,) = open_together(
                [
                    Opening(
                        source.workers(location, access.uid),
                        lambda opening: self._index(source, location, access, opening),
                        lambda found: None,
                        location,
                        patience_seconds=source.patience_seconds,
                        descriptors=source.descriptors_per_file,
                    )
                ],
                descriptors,
            )
        finally:
            descriptors.release()
        return found

    def _opening(self, member: Member, access: Access) -> Opening[tuple[SourceFile, Kept]]:
        return Opening(
            member.source.workers(member.location, access.uid),
            lambda opening: self._open(member, access, opening),
            lambda found: found[0].close(),
            member.location,
            patience_seconds=member.source.patience_seconds,
            descriptors=member.source.descriptors_per_file,
        )

    def _open(
        self, member: Member, access: Access, opening: Opening[tuple[SourceFile, Kept]]
    ) -> tuple[SourceFile, Kept]:
        file = _open_file(member, access)
        try:
            kept = self._header(file, access.uid, opening.give_up_at, opening.read)
            if isinstance(file, HasFirstBytes):
                file.drop_first_bytes()
            return file, kept
        except BaseException:
            file.close()
            raise

    def _header(self, file: SourceFile, uid: int, give_up_at: float, on_read: Callable[[], None]) -> Kept:
        crcs = tuple(checksum.algorithm for checksum in file.checksums if checksum.is_crc)[:1]
        kept = self._keep.find(uid, file.version)
        if kept is not None:
            prefix = kept.header.prefix
            if prefix is not None and prefix.crcs.keys() >= set(crcs):
                return kept
            self._keep.forget(file.version)  # its store said no checksum yet when it was read

        def read() -> None:
            file.check_unchanged()
            on_read()

        reading = Reading(uid, file.version, self._keep, self._parsers, give_up_at, read, crcs)
        try:
            return read_header(RetryingReader(file, give_up_at), reading)
        except InvalidHeaderError as error:
            raise refused_header(file, error, give_up_at) from error

    def _index(self, source: Source, location: str, access: Access, opening: Opening[IndexFile]) -> IndexFile:
        file = source.open(location, access)

        def read() -> None:
            file.check_unchanged()
            opening.read()

        try:
            version = f"index {file.version}"
            kept = self._keep.find(access.uid, version)
            if kept is None:
                give_up_at = opening.give_up_at
                reading = Reading(access.uid, version, self._keep, self._parsers, give_up_at, read)
                kept = read_index(RetryingReader(file, give_up_at), reading)
            return IndexFile(location, version, kept)
        except InvalidIndexError as error:
            raise refused_index(file, error, opening.give_up_at) from error
        finally:
            file.close()


def _open_file(member: Member, access: Access) -> SourceFile:
    try:
        return member.source.open(member.location, access)
    except CheckpointNotFoundError as error:
        if member.index is None:
            raise
        name = member.source.name(member.location)
        raise CheckpointInvalidError(
            f"{member.index} names {name}, which {error.missing}: the index is stale, or a download did not "
            "end; fetch the file, or delete the index if the checkpoint was saved again in other files",
            file=member.index,
        ) from error
