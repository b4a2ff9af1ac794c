"""A Source whose files are read from the disk where that has them, and from the store where not."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

from ..sources import Access, Listed, Source, SourceFile, Wanted, without
from ..sources.kept import HasFirstBytes, Keep, Remote
from ..system.copying import spread
from ..system.progress import beat
from .pieces import Span
from .records import Identity
from .threads import Ticket, UnavailableError
from .tier import Hold, Tier
from .version import RottenError


class TieredSource:
    """Access, names and lists are the store's, and each file is opened there: so every load asks it which
    version is current, and nobody reads from the disk what the store would refuse."""

    def __init__(self, source: Source, tier: Tier) -> None:
        self.kind = source.kind
        self.schemes = source.schemes
        self.descriptors_per_file = source.descriptors_per_file
        self.patience_seconds = source.patience_seconds
        self._source = source
        self._tier = tier

    def workers(self, location: str, uid: int) -> Executor:
        return self._source.workers(location, uid)

    def location(self, source: str) -> str:
        return self._source.location(source)

    def name(self, location: str) -> str:
        return self._source.name(location)

    def join(self, directory: str, name: str) -> str:
        return self._source.join(directory, name)

    def list(self, location: str, access: Access) -> list[str] | None:
        return self._source.list(location, access)

    def tree(self, location: str, access: Access, wanted: Wanted) -> Iterator[Listed]:
        return self._source.tree(location, access, wanted)

    def dangles(self, location: str, access: Access) -> bool:
        return self._source.dangles(location, access)

    def open(self, location: str, access: Access) -> SourceFile:
        if isinstance(self._source, Remote) and self._tier.has(location):
            self._source.remember(location)
        file = self._source.open(location, access)
        if file.alignment > 1:  # a local file, such as one of the Hub's cache
            return file
        try:
            hold = self._tier.hold(Identity(file.uri, file.version, file.size_bytes), access.uid)
        except BaseException:
            file.close()
            raise
        return TieredFile(file, self._tier, hold, access.uid)


class TieredFile:
    """See `SourceFile` and `KeptFile`. Owns the store's file and a hold on what is kept."""

    def __init__(self, file: SourceFile, tier: Tier, hold: Hold, uid: int) -> None:
        self.kind = file.kind
        self.uri = file.uri
        self.version = file.version
        self.portable_version = file.portable_version
        self.listed_version = file.listed_version
        self.mount = file.mount
        self.mount_point = file.mount_point
        self.size_bytes = file.size_bytes
        self.alignment = file.alignment
        self.checksums = file.checksums
        self._file = file
        self._tier = tier
        self._hold = hold
        self._uid = uid
        self._lock = threading.Lock()
        self.disk_bytes = 0

    @property
    def give_up_at(self) -> float:
        return self._file.give_up_at

    @give_up_at.setter
    def give_up_at(self, at: float) -> None:
        self._file.give_up_at = at

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        position, end = offset, min(offset + sum(map(len, views)), self.size_bytes)
        while position < end:
            span = self._hold.version.span(position, end)
            part = _first(without(views, position - offset), span.end - position)
            reached = position + self._read_kept(position, span, part) if span.block else position
            if reached == position:
                self._file.read_into(position, part)
                reached = span.end
            position = reached

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def unmounted(self) -> bool:
        return self._file.unmounted()

    def drop_first_bytes(self) -> None:
        if isinstance(self._file, HasFirstBytes):
            self._file.drop_first_bytes()

    def keep(self) -> Keep | None:
        return self._hold.again()

    def keep_bytes(self, offset: int, views: Sequence[memoryview]) -> None:
        end = min(offset + sum(map(len, views)), self.size_bytes)
        missing = self._hold.missing(offset, end)
        if missing is not None:
            start, end = missing
            self._hold.write_copy(start, _first(without(views, start - offset), end - start))

    def close(self) -> None:
        self._hold.release()
        self._file.close()

    def _read_kept(self, position: int, span: Span, views: Sequence[memoryview]) -> int:
        """Bytes read from the disk; 0: they must come from the store."""
        version, block = self._hold.version, span.block
        assert block is not None

        def read(ticket: Ticket) -> int:
            data = version.read(block, position, span.end, self._tier.threads.buffer())
            # The caller may have given up, and the memory may be another load's by now.
            ticket.held(lambda: spread(data, views))
            return len(data)

        try:
            count = self._tier.threads.call(self._uid, read)
        except UnavailableError:
            return 0
        except (OSError, RottenError):
            self._tier.count("failed_reads", 1)
            version.forget(position, span.end)
            return 0
        with self._lock:
            self.disk_bytes += count
        self._tier.count("read_bytes", count)
        beat()
        return count


def _first(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """The first `count` bytes of the views."""
    taken = []
    for view in views:
        if not count:
            break
        taken.append(view[:count])
        count -= len(taken[-1])
    return taken
