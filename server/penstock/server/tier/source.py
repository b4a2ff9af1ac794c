"""A Source whose files are read from the disk where that has them, and from the store where not.

    open at the store --> the version --> a hold on what is kept of it --> each range: disk, else store
    replies that are given again (--tier-stale) --> the same, without the store

Local files are opened and checked for changes where they lie, and only read from the disk.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

from ..errors import AccessDeniedError, CheckpointNotFoundError
from ..sources import Access, Listed, Source, SourceFile, Tell, TellingFile, Wanted, without
from ..sources.checksums import Checksum
from ..sources.kept import HasFirstBytes, Keep, LocalVersion, Remote, Settling
from ..sources.replies import FileReply, Replies, StoreUnreachableError
from ..system.copying import spread
from ..system.progress import beat
from .directory import is_momentary
from .hold import Hold
from .pieces import Ranges, Span
from .records import Identity
from .threads import READ_BYTES, Ticket, UnavailableError
from .tier import Tier
from .version import RottenError


class TieredSource:
    """Access, names and lists are the store's, and each file is opened there: so every load asks it which
    version is current, and nobody reads from the disk what the store would refuse."""

    def __init__(self, source: Source, tier: Tier, covers: Callable[[str], bool] = lambda _: True) -> None:
        """`covers` says of a location whether the tier keeps what is there."""
        self.kind = source.kind
        self.schemes = source.schemes
        self.descriptors_per_file = source.descriptors_per_file
        self.patience_seconds = source.patience_seconds
        self._source = source
        self._tier = tier
        self._covers = covers
        self._remote = source if isinstance(source, Remote) else None

    def workers(self, location: str, uid: int) -> Executor:
        return self._source.workers(location, uid)

    def location(self, source: str) -> str:
        return self._source.location(source)

    def name(self, location: str) -> str:
        return self._source.name(location)

    def join(self, directory: str, name: str) -> str:
        return self._source.join(directory, name)

    def list(self, location: str, access: Access) -> list[str] | None:
        replies = access.replies if self._remote is not None else None
        if replies is None:
            return self._source.list(location, access)
        if replies.again:
            self._permit(location, access)
            return replies.names(location)
        try:
            names = self._source.list(location, access)
        except CheckpointNotFoundError:
            replies.missing.add(location)
            raise
        except AccessDeniedError:
            self._note_refusal(replies, location, access)
            raise
        replies.lists[location] = names
        return names

    def tree(self, location: str, access: Access, wanted: Wanted) -> Iterator[Listed]:
        return self._source.tree(location, access, wanted)

    def dangles(self, location: str, access: Access) -> bool:
        return self._source.dangles(location, access)

    def open(self, location: str, access: Access) -> SourceFile:
        if self._remote is None:
            file = self._source.open(location, access)
            return self._tiered(file, access) if self._covers(location) else file
        file = self._open_remote(self._remote, location, access)
        local = isinstance(file, LocalVersion)  # of the Hub's cache
        return file if local else self._tiered(file, access)

    def _open_remote(self, remote: Remote, location: str, access: Access) -> SourceFile:
        replies = access.replies
        if replies is not None and replies.again:
            self._permit(location, access)
            reply = replies.file(location)
            return StoredFile(
                self.kind, Identity(reply.uri, reply.version, reply.size_bytes), reply.checksums
            )
        if self._tier.has(location):
            remote.remember(location)
        try:
            file = self._source.open(location, access)
        except CheckpointNotFoundError:
            if replies is not None:
                replies.missing.add(location)
            raise
        except AccessDeniedError:
            if replies is not None:
                self._note_refusal(replies, location, access)
            raise
        if replies is not None:
            replies.files[location] = FileReply(
                file.uri, file.version, file.size_bytes, tuple(file.checksums)
            )
            replies.partial = replies.partial or isinstance(file, LocalVersion)
        return file

    def _tiered(self, file: SourceFile, access: Access) -> TieredFile:
        version, place = file.version, ""
        if isinstance(file, LocalVersion):
            version, place = file.lasting_version, file.place
        identity = Identity(file.uri, version, file.size_bytes, place)
        try:
            hold = self._tier.hold(identity, access.uid)
        except BaseException:
            file.close()
            raise
        return TieredFile(file, self._tier, identity, hold, access.uid)

    def _permit(self, location: str, access: Access) -> None:
        assert self._remote is not None
        self._remote.permit(location, access)

    def _note_refusal(self, replies: Replies, location: str, access: Access) -> None:
        """Of the store, unless it was not even asked for that caller."""
        replies.partial = True
        with contextlib.suppress(AccessDeniedError):
            self._permit(location, access)
            replies.refused = True


class TieredFile:
    """See `SourceFile` and `KeptFile`. Owns the store's file and a hold on what is kept."""

    def __init__(self, file: SourceFile, tier: Tier, identity: Identity, hold: Hold, uid: int) -> None:
        """`identity` is what `hold` is of."""
        self.kind = file.kind
        self.uri = file.uri
        self.version = file.version
        self.portable_version = file.portable_version
        self.writes_before = file.writes_before
        self.listed_version = file.listed_version
        self.mount = file.mount
        self.mount_point = file.mount_point
        self.size_bytes = file.size_bytes
        self.alignment = file.alignment
        self.checksums = file.checksums
        self.kept_version = identity.version
        self._file = file
        self._tier = tier
        self._hold = hold
        self._uid = uid
        self._writes = file.settled if isinstance(file, Settling) else True
        self._lock = threading.Lock()
        self._from_disk = Ranges()
        """What came from the disk, until somebody asks."""

    @property
    def give_up_at(self) -> float:
        return self._file.give_up_at

    @give_up_at.setter
    def give_up_at(self, at: float) -> None:
        self._file.give_up_at = at

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        self.read_and_tell(offset, views, None)

    def read_and_tell(self, offset: int, views: Sequence[memoryview], tell: Tell | None) -> None:
        position, end = offset, min(offset + sum(map(len, views)), self.size_bytes)
        while position < end:
            span = self._hold.version.span(position, end)
            part = _first(without(views, position - offset), span.end - position)
            reached = position + self._read_kept(position, span, part) if span.block else position
            if reached == position:
                self._read_stored(offset, position, min(end, span.end), views, tell)
                reached = span.end
                with self._lock:  # it may have come from the disk when it was read before
                    self._from_disk.remove(position, reached)
            position = reached
            if tell is not None:
                tell(min(reached, end))

    def _read_stored(
        self, offset: int, position: int, end: int, views: Sequence[memoryview], tell: Tell | None
    ) -> None:
        """Whole pages of a local file, as far as there is memory for them: these are read directly."""
        begin = max(offset, position // self.alignment * self.alignment)
        finish = -(-end // self.alignment) * self.alignment
        part = _first(without(views, begin - offset), finish - begin)
        if tell is not None and isinstance(self._file, TellingFile):
            self._file.read_and_tell(begin, part, tell)
        else:
            self._file.read_into(begin, part)

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def unmounted(self) -> bool:
        return self._file.unmounted()

    def take_disk_bytes(self, start: int, end: int) -> int:
        with self._lock:
            return self._from_disk.remove(start, end)

    def has(self, start: int, end: int) -> bool:
        while start < end:
            span = self._hold.version.span(start, end)
            if span.block is None:
                return False
            start = span.end
        return True

    @property
    def keeps_more(self) -> bool:
        return self._writes and self._hold.keeps_more

    def drop_first_bytes(self) -> None:
        if isinstance(self._file, HasFirstBytes):
            self._file.drop_first_bytes()

    def keep(self) -> Keep | None:
        return self._hold.again() if self._writes else None

    def keep_bytes(self, offset: int, views: Sequence[memoryview]) -> None:
        end = min(offset + sum(map(len, views)), self.size_bytes)
        missing = self._hold.missing(offset, end) if self._writes else None
        if missing is not None:
            self._file.check_unchanged()  # or bytes of another version would be kept as of this one
            start, end = missing
            self._hold.write_copy(start, _first(without(views, start - offset), end - start))

    def close(self) -> None:
        self._hold.release()
        self._file.close()

    def _read_kept(self, position: int, span: Span, views: Sequence[memoryview]) -> int:
        """The number of bytes read from the disk; 0: they must come from the store."""
        version, block = self._hold.version, span.block
        assert block is not None

        def read(start: int, end: int, ticket: Ticket) -> int:
            data = version.read(block, start, end, self._tier.threads.buffer())
            # The caller may have given up, and the memory may be another load's by now.
            ticket.held(lambda: spread(data, without(views, start - position)))
            return len(data)

        # Several at the same time, so that the disk is read in order. Where each caller read one part after
        # the other, many callers had it read here and there, which took 4 % longer (benchmarks/tier.py).
        parts = block.parts(position, span.end, READ_BYTES)
        works = [functools.partial(read, start, end) for start, end in parts]
        try:
            count = sum(self._tier.threads.calls(self._uid, works))
        except UnavailableError:
            return 0
        except (OSError, RottenError) as error:
            if isinstance(error, OSError) and is_momentary(error):
                return 0
            self._tier.count("failed_reads", 1)
            version.forget(position, span.end)
            return 0
        with self._lock:
            self._from_disk.add(position, position + count)
        self._tier.count("read_bytes", count)
        beat()
        return count


class StoredFile:
    """A file of which only the disk can be asked. See `SourceFile`."""

    listed_version = mount = mount_point = ""
    writes_before = 0
    alignment = 1

    def __init__(self, kind: str, identity: Identity, checksums: Sequence[Checksum] = ()) -> None:
        self.kind = kind
        self.uri = identity.uri
        self.version = self.portable_version = identity.version
        self.size_bytes = identity.size_bytes
        self.checksums = checksums
        self.give_up_at = math.inf

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        raise StoreUnreachableError(
            f"{self.uri}: its store cannot be asked, and the tier's disk has no bytes from {offset} on; load "
            "it again when the store answers",
            file=self.uri,
        )

    def check_unchanged(self) -> None:
        """The disk's bytes are compared with their CRCs."""

    def unmounted(self) -> bool:
        return False

    def close(self) -> None:
        """It holds nothing."""


def _first(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """The first `count` bytes of the views."""
    taken = []
    for view in views:
        if not count:
            break
        taken.append(view[:count])
        count -= len(taken[-1])
    return taken
