"""From the sources that a client names to open files with parsed headers.

A source is a safetensors file, an index file, or a directory. `layout.py` decides which files of a directory
are loaded. `sources/` knows how each kind of storage names and opens them. Everything here blocks and runs on
worker threads.

Costs are bounded before they arise: descriptors (`descriptors`, a quota by user), the memory of headers and
indexes (`keep.py`), the parsing (`header.py`), and the seconds that storage may take for each file
(`opening.py`).
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice

from ..config.units import show_size
from ..errors import CheckpointInvalidError, CheckpointNotFoundError, InvalidRequestError, PenstockError
from ..sources import Access, RetryingReader, Source, SourceFile, choose, parent, verification
from ..sources.kept import HasFirstBytes
from ..sources.resuming import MountSet
from ..sources.verification import OFF, Expected, Wish
from ..system.quota import Quota
from ..system.statx import root_mount
from . import plan, recognise, sums
from .budget import Parts
from .duplicates import Claims, Shard, delivered
from .expand import expand, settle
from .header import Parsers, Reading, read_header, read_index
from .index import MAX_FILES, Index, InvalidIndexError
from .keep import PARSED_BYTES, Keep, Kept
from .opening import Descriptors, Opening, open_together
from .plan import Indices, Segment, Selection
from .rules import InvalidHeaderError
from .table import Header, TensorTable

MAX_SOURCES = 2_000
HEADERS_AT_ONCE = 64
HEADER_BYTES = PARSED_BYTES
"""Most bytes of the headers of one load, each counted as often as it is named: some 1,300,000 tensors."""
CHECKED_INDEXES = 1_000
"""How many indexes are remembered as compared with their files."""
REMEMBERED_DISTINCT = 1_000
"""How many checkpoints are remembered as having no tensor in two files."""
MAX_WARNINGS = 8
MAX_WARNING_CHARACTERS = 1_000
DEFAULT_DESCRIPTORS = 65_536
_NAMES_AT_ONCE = 100_000
_NAMING_BYTES = 64
"""Bytes that each naming of a file takes, beside what the file takes once."""
_FILE_BYTES = 2048
"""What an open file takes as objects, besides its location. Measured: 1600 bytes."""
SELECTION_TIMES = 3
"""So often a load has the tensors that it selects: as such, and in its segments or its slices of them; and
once more when a group goes on."""
_LOCATION_TIMES = 4
"""So often an open object has its location: as such, as its URI, in its version, and in parts."""


@dataclass(frozen=True)
class Checkpoint:
    """Files loaded together, in order, and open. The owner must `close` it.

    A file that was named twice is there twice, and open once.
    """

    sources: tuple[str, ...]
    files: tuple[SourceFile, ...]
    headers: tuple[Header, ...]
    delivered: tuple[Indices, ...] | None = None
    """For each file the tensors that are delivered. None: all of them, as no tensor is in two files."""
    warnings: tuple[str, ...] = ()
    """Oddities of the files, for the log and the caller."""
    kept: tuple[Kept, ...] = ()
    """The charges for the headers, held as long as this object lives."""
    descriptors: Descriptors | None = None
    expected: tuple[Expected, ...] = ()
    """What each file is verified by; empty for none."""
    lists: Parts | None = None
    """The charge for the objects of its files, and for the lists of tensors and segments that are made of it,
    held as long as this object lives."""

    def segments_within(self, selection: Selection, capacity_bytes: int) -> list[Segment]:
        """The segments of `plan.segments_within`. Takes a while for very many tensors. Raises as
        `Charge.resize` does."""
        if self.lists is None:
            return plan.segments_within(self.tables, selection, capacity_bytes)
        reserve = partial(self.lists.set, "segments")
        return plan.segments_within(self.tables, selection, capacity_bytes, reserve)

    def charge_selection(self, selection: Selection) -> None:
        """Charges what a load keeps of a selection of its tensors. Raises as `Charge.resize` does."""
        if self.lists is not None:
            self.lists.set("selection", SELECTION_TIMES * plan.listed_bytes(selection.files))

    @property
    def tables(self) -> tuple[TensorTable, ...]:
        return tuple(header.tensors for header in self.headers)

    @cached_property
    def version(self) -> str:
        """Identifies the bytes: for every file its place and version, which of its tensors are delivered, and
        the mounts behind them. `continues` compares it with the version of another daemon."""
        state = hashlib.sha256()
        for file in self.files:
            state.update(f"{file.uri}\0{file.portable_version}\0".encode())
        if self.delivered is not None:
            state.update(Selection(self.delivered).digest().encode())
        root = root_mount()
        mounts = MountSet.of(f"{root.id:x}" if root.id else "", [file.mount for file in self.files])
        return f"{state.hexdigest()[:32]}{mounts}"

    def without_headers(self) -> Checkpoint:
        """The same files without their headers. Closing either object closes both."""
        return replace(self, headers=(), kept=())

    def close(self) -> None:
        """Closes the files. A second call does nothing."""
        for file in set(self.files):
            file.close()
        if self.descriptors is not None:
            self.descriptors.release()


@dataclass(frozen=True, slots=True)
class _Member:
    """A file of the checkpoint, not yet open, and the index that names it."""

    source: Source
    location: str
    index: str | None


@dataclass(frozen=True, slots=True)
class _Named:
    """The files that one source means."""

    members: tuple[_Member, ...]
    warnings: tuple[str, ...] = ()
    index: Kept | None = None
    index_version: str = ""


NO_WISH = Wish(OFF)


class Catalog:
    """Resolves sources. Keeps the headers of unchanged files, so a warm load reads none."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        descriptors: Quota | None = None,
        keep: Keep | None = None,
        parsers: Parsers | None = None,
    ) -> None:
        """Each of `sources` has the URIs of its schemes; the first has paths too. `resolve` must not run on
        the workers of any source. `descriptors` is the quota of descriptors for open files."""
        self._sources = tuple(sources)
        self.descriptors = descriptors if descriptors is not None else Quota(DEFAULT_DESCRIPTORS)
        self.keep = keep if keep is not None else Keep()
        self.parsers = parsers if parsers is not None else Parsers()
        self._lock = threading.Lock()
        self._checked: OrderedDict[str, None] = OrderedDict()
        self._distinct: OrderedDict[str, None] = OrderedDict()

    def shutdown(self) -> None:
        """Parses nothing more. Does not wait."""
        self.parsers.shutdown()

    def location(self, source: str) -> str:
        """The canonical spelling of `source`. Raises InvalidRequestError."""
        return choose(self._sources, source).location(source)

    def resolve(
        self, sources: Sequence[str], access: Access, variant: str = "", wish: Wish = NO_WISH
    ) -> Checkpoint:
        """Opens every file that the sources name, and reads its header. `variant` chooses between those that
        a directory holds; `wish` says which of them are to be verified.

        Raises CheckpointNotFoundError, CheckpointInvalidError, CheckpointChangedError, AccessDeniedError,
        InvalidRequestError, SourceUnavailableError, or TooManyLoadsError if others hold memory or descriptors
        that it needs. Nothing stays open then.
        """
        if not sources:
            raise InvalidRequestError("sources: there are none; name at least one file, directory or URI")
        if len(sources) > MAX_SOURCES:
            raise InvalidRequestError(
                f"sources: {len(sources)} are more than {MAX_SOURCES}; name fewer at a time"
            )
        named: dict[str, _Named] = {}
        members: list[_Member] = []
        indexed: list[tuple[_Named, int]] = []
        lists, names = Parts(self.keep.budget.charge(access.uid)), self.keep.budget.charge(access.uid)
        access = replace(access, listing=access.listing.charged(names.resize))
        try:
            lists.set("sources", sum(map(sys.getsizeof, sources)))
            for source in sources:
                if source not in named:
                    named[source] = self._name(source, access, variant, lists)
                    access.listing.release()
                if named[source].index is not None:
                    indexed.append((named[source], len(members)))
                members += named[source].members
                if len(members) > MAX_FILES:
                    raise CheckpointInvalidError(
                        f"{source[:200]} makes it more than {MAX_FILES} files; load fewer at a time"
                    )
            warnings = _few(warning for one in named.values() for warning in one.warnings)
            opened = self._open_all(tuple(sources), members, access, lists)
        except BaseException:
            lists.clear()  # now, and not only when the error is forgotten
            access.listing.release()
            raise
        checkpoint = replace(opened, warnings=warnings)
        try:
            for one, first in indexed:
                self._check(one, checkpoint, first, access.uid)
            checkpoint = self._once_each(checkpoint, indexed, access.uid)
            return replace(checkpoint, expected=self._expected(checkpoint, access, wish))
        except BaseException:
            checkpoint.close()
            lists.clear()
            raise

    def _expected(self, checkpoint: Checkpoint, access: Access, wish: Wish) -> tuple[Expected, ...]:
        """What each file is verified by. Raises as `verification.given` and `expected` do."""
        if wish.mode == OFF and not wish.digests:
            return ()
        own, listed = verification.given(checkpoint.files, wish.digests), {}
        if wish.wants_all:
            listed = sums.listed(
                (
                    (choose(self._sources, file.uri), file)
                    for number, file in enumerate(checkpoint.files)
                    if number not in own and not file.checksums
                ),
                access,
                self.descriptors,
            )
        return verification.expected(checkpoint.files, wish, own, listed)

    def forget(self, version: str) -> None:
        """What was read of that version of a file was damaged on its way: it is read anew."""
        self.keep.forget(version)

    def _once_each(
        self, checkpoint: Checkpoint, indexed: Sequence[tuple[_Named, int]], uid: int
    ) -> Checkpoint:
        """The checkpoint without copies of tensors that are not delivered. Raises CheckpointInvalidError if a
        tensor is in two files and no index decides between them."""
        if len(checkpoint.files) < 2:
            return checkpoint
        version = checkpoint.version
        with self._lock:
            if version in self._distinct:
                self._distinct.move_to_end(version)
                return checkpoint
        shards = [
            Shard(file.uri, file.version, header.tensors)
            for file, header in zip(checkpoint.files, checkpoint.headers, strict=True)
        ]
        claims = [
            Claims(first, len(one.index.index.files), one.index.index.names)
            for one, first in indexed
            if one.index is not None
        ]
        chosen = self.parsers.here(uid, lambda: delivered(shards, claims))
        if chosen is not None:
            if checkpoint.lists is not None:
                checkpoint.lists.set("delivered", plan.listed_bytes(chosen))
            return replace(checkpoint, delivered=chosen)
        with self._lock:
            self._distinct[version] = None
            while len(self._distinct) > REMEMBERED_DISTINCT:
                self._distinct.popitem(last=False)
        return checkpoint

    def _name(self, named: str, access: Access, variant: str, lists: Parts) -> _Named:
        """What a source means. `lists` is charged with its files."""
        source = choose(self._sources, named)
        found = expand(source, source.location(named), access, variant, self.parsers)
        if found.index_location is None:
            lists.add("files", _files_bytes(len(found.files), sum(map(len, found.files))))
            return _Named(tuple(_Member(source, file, None) for file in found.files), found.warnings)
        index, version = self._read_index(source, found.index_location, access)
        files = index.index.files
        instead, about = settle(source, found, files, access)
        warnings = (*found.warnings, *about)
        if instead:
            lists.add("files", _files_bytes(len(instead), sum(map(len, instead))))
            return _Named(tuple(_Member(source, file, None) for file in instead), warnings)
        around = parent(found.index_location)
        locations = len(files) * len(around) + sum(map(len, files))
        lists.add("files", _files_bytes(len(files), locations))
        members = (_Member(source, source.join(around, name), found.index_location) for name in files)
        return _Named(tuple(members), warnings, index, version)

    def _open_all(
        self, sources: tuple[str, ...], members: Sequence[_Member], access: Access, lists: Parts
    ) -> Checkpoint:
        """Opens many files at a time, since the latencies of hundreds of shards must not add up. A file that
        is named several times is opened once."""
        times = Counter((member.source.kind, member.location) for member in members)
        unique = {(member.source.kind, member.location): member for member in members}
        locations = sum(len(location) for _, location in unique)
        lists.set("files", _files_bytes(len(unique), locations) + _NAMING_BYTES * len(members))
        needed = sum(member.source.descriptors_per_file for member in unique.values())
        descriptors = Descriptors(self.descriptors, access.uid)
        opened: dict[tuple[str, str], tuple[SourceFile, Kept]] = {}
        total_bytes = 0
        keys = iter(unique)
        try:
            descriptors.take(needed, len(unique))
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

    def _opening(self, member: _Member, access: Access) -> Opening[tuple[SourceFile, Kept]]:
        return Opening(
            member.source.workers(member.location, access.uid),
            lambda opening: self._open(member, access, opening),
            lambda found: found[0].close(),
            member.location,
            patience_seconds=member.source.patience_seconds,
            descriptors=member.source.descriptors_per_file,
        )

    def _open(
        self, member: _Member, access: Access, opening: Opening[tuple[SourceFile, Kept]]
    ) -> tuple[SourceFile, Kept]:
        file = _open_member(member, access)
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
        kept = self.keep.find(uid, file.version)
        if kept is not None:
            prefix = kept.header.prefix
            if prefix is not None and prefix.crcs.keys() >= set(crcs):
                return kept
            self.keep.forget(file.version)  # its store said no checksum yet when it was read

        def read() -> None:
            file.check_unchanged()
            on_read()

        reading = Reading(uid, file.version, self.keep, self.parsers, give_up_at, read, crcs)
        try:
            return read_header(RetryingReader(file, give_up_at), reading)
        except InvalidHeaderError as error:
            raise _refused(file, error, give_up_at) from error

    def _read_index(self, source: Source, location: str, access: Access) -> tuple[Kept, str]:
        """Returns the index and its version."""
        descriptors = Descriptors(self.descriptors, access.uid)
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

    def _index(
        self, source: Source, location: str, access: Access, opening: Opening[tuple[Kept, str]]
    ) -> tuple[Kept, str]:
        file = source.open(location, access)

        def read() -> None:
            file.check_unchanged()
            opening.read()

        try:
            version = f"index {file.version}"
            kept = self.keep.find(access.uid, version)
            if kept is None:
                give_up_at = opening.give_up_at
                reading = Reading(access.uid, version, self.keep, self.parsers, give_up_at, read)
                kept = read_index(RetryingReader(file, give_up_at), reading)
            return kept, version
        except InvalidIndexError as error:
            raise _refused_index(file, error, opening.give_up_at) from error
        finally:
            file.close()

    def _check(self, named: _Named, checkpoint: Checkpoint, first: int, uid: int) -> None:
        """Compares an index with the headers of its files, unless that was done lately."""
        assert named.index is not None
        index = named.index.index
        files = checkpoint.files[first : first + len(index.files)]
        state = hashlib.sha256(named.index_version.encode())
        for file in files:
            state.update(f"\0{file.version}".encode())
        key = state.hexdigest()
        with self._lock:
            if key in self._checked:
                self._checked.move_to_end(key)
                return
        headers = checkpoint.headers[first : first + len(index.files)]
        path = named.members[0].index
        assert path is not None
        self.parsers.here(uid, lambda: _check_index(path, index, headers))
        with self._lock:
            self._checked[key] = None
            while len(self._checked) > CHECKED_INDEXES:
                self._checked.popitem(last=False)


def _files_bytes(count: int, characters: int) -> int:
    """What so many open files take as objects, whose locations have so many characters together."""
    return count * _FILE_BYTES + _LOCATION_TIMES * characters


def _few(warnings: Iterable[str]) -> tuple[str, ...]:
    """The warnings that a client receives: few, and short."""
    return tuple(warning[:MAX_WARNING_CHARACTERS] for warning in dict.fromkeys(warnings))[:MAX_WARNINGS]


def _open_member(member: _Member, access: Access) -> SourceFile:
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


def _check_index(path: str, index: Index, headers: Sequence[Header]) -> None:
    for number, header in enumerate(headers):
        missing = _missing(index.names(number), header.tensors)
        if missing is not None:
            raise CheckpointInvalidError(
                f"{path} says that {index.files[number]} holds tensor {missing[:200]!r}, which it does not; "
                "fetch both again, or delete the index",
                file=path,
                tensor=missing[:200],
            )


def _missing(names: Iterable[str], table: TensorTable) -> str | None:
    """A name that the table lacks, if there is one. Holds few names at once, as strings take several times as
    much memory as a table."""
    names = iter(names)
    while some := set(islice(names, _NAMES_AT_ONCE)):
        some.difference_update(table.names())
        if some:
            return min(some)
    return None


def _refused(file: SourceFile, error: InvalidHeaderError, give_up_at: float) -> PenstockError:
    """The error for a file that cannot be parsed. Says what the file is, if its bytes show it."""
    try:
        first = _part(file, 0, give_up_at)
    except PenstockError as failed:
        return failed
    said = recognise.not_safetensors(first, file.size_bytes)
    if said is not None:
        return CheckpointInvalidError(f"{file.uri} {said}", file=file.uri)
    return CheckpointInvalidError(
        f"{file.uri}: {error}; fetch it again, or save it again with safetensors", file=file.uri
    )


def _refused_index(file: SourceFile, error: InvalidIndexError, give_up_at: float) -> PenstockError:
    try:
        first = _part(file, 0, give_up_at)
        last = _part(file, max(0, file.size_bytes - recognise.FIRST_BYTES), give_up_at)
    except PenstockError as failed:
        return failed
    said = recognise.not_an_index(first, file.size_bytes, last)
    if said is not None:
        return CheckpointInvalidError(f"{file.uri} {said}", file=file.uri)
    return CheckpointInvalidError(
        f"{file.uri}: {error}; fetch it again, or delete it if the files beside it are all there is",
        file=file.uri,
    )


def _part(file: SourceFile, start: int, give_up_at: float) -> bytes:
    """A few bytes of a file from `start` on."""
    part = bytearray(min(recognise.FIRST_BYTES, file.size_bytes - start))
    if part:
        RetryingReader(file, give_up_at).read_into(start, [memoryview(part)])
    return bytes(part)
