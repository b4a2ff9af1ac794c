"""Reads files in order, and several parts of them at a time, so that the latencies of a store do not add up.

Bytes that are read and not yet taken are bounded for each user and in all (`buffers`). So are descriptors. If
others have used them up, a fetch goes on with one small part at a time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from ..checkpoint.opening import Descriptors
from ..errors import CheckpointChangedError, SourceUnavailableError, TooManyLoadsError
from ..sources import Access, Listed, RetryingReader, Source, SourceFile, join
from ..system.quota import Quota

PART_BYTES = 512 << 10
"""Bytes of a file that are read at once and sent in one message."""
SMALL_PART_BYTES = 32 << 10
"""The same for a fetch whose user's share of the buffers is used up."""
PARTS_AT_ONCE = 32
"""Most parts of one fetch at a time. A store has about as many threads that open files."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a file that follow those of the part before."""

    listed: Listed
    """The listed file, with the version that the open file has."""
    offset: int
    data: bytes
    unchanged: bool = False
    """Whether the caller has the file already: there are no bytes then."""


class ReadAhead:
    """The files of one fetch. Call `parts` once, on the event loop."""

    def __init__(
        self,
        source: Source,
        top: str,
        access: Access,
        *,
        buffers: Quota,
        descriptors: Quota,
        has: Callable[[str, str], bool],
    ) -> None:
        """`has` says whether the caller has that version of the file with that name."""
        self.source = source
        self.top = top
        self.access = access
        self.has = has
        self._buffers = buffers
        self._descriptors = descriptors
        self._window: deque[_Reading] = deque()
        self._current: _File | None = None
        """The file of which some parts have not been begun."""

    async def parts(self, files: Iterable[Listed]) -> AsyncGenerator[Part, None]:
        """Yields each file's parts in order, at least one for each. Raises CheckpointChangedError for a file
        that differs from the listed version, or changed before its last part was yielded; and the errors of
        opening and reading."""
        coming = iter(files)
        try:
            while True:
                while self._begin_next(coming):
                    pass
                if not self._window:
                    return
                part = await self._result(self._window[0])
                if not (part.unchanged and part.offset):
                    yield part
                self._window.popleft().end()
        finally:
            for reading in self._window:
                reading.end()
            if self._current is not None:
                self._current.close_when_read()

    def _begin_next(self, coming: Iterator[Listed]) -> bool:
        """Begins to read one more part, if there is one and the bounds allow it."""
        if len(self._window) >= PARTS_AT_ONCE:
            return False
        if self._current is None:
            listed = next(coming, None)
            if listed is None:
                return False
            if listed.version and self.has(listed.name, listed.version):
                self._window.append(_Reading.of(Part(listed, 0, b"", unchanged=True)))
                return True
            self._current = _File(self, listed, Descriptors(self._descriptors, self.access.uid))
        file = self._current
        if file.begun_bytes and not file.opened:
            return False  # else a thread would wait for the thread that opens it
        size_bytes = min(PART_BYTES, file.left_bytes)
        charged = size_bytes
        if not self._buffers.take(self.access.uid, size_bytes):
            if self._window:
                return False
            size_bytes, charged = min(SMALL_PART_BYTES, file.left_bytes), 0
        try:
            if not file.begun:
                file.descriptors.take(self.source.descriptors_per_file, files=1)
            future = file.begin(size_bytes)
        except BaseException as error:
            self._buffers.release(self.access.uid, charged)
            if isinstance(error, TooManyLoadsError) and self._window:
                return False
            raise
        self._window.append(_Reading(future, lambda: self._buffers.release(self.access.uid, charged)))
        if not file.left_bytes:
            file.close_when_read()
            self._current = None
        return True

    async def _result(self, reading: _Reading) -> Part:
        waiting = asyncio.wrap_future(reading.future)
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait([waiting], timeout=self.source.patience_seconds)
        if not waiting.done():
            raise SourceUnavailableError(
                f"{self.top}: storage gave nothing of a file within {self.source.patience_seconds:.0f} s; "
                "check whether it answers, and fetch again",
                file=self.top,
            )
        return waiting.result()


class _Reading:
    """One part that is being read."""

    def __init__(self, future: Future[Part], give_back: Callable[[], None]) -> None:
        self.future = future
        self._give_back = give_back

    @classmethod
    def of(cls, part: Part) -> _Reading:
        """A part that need not be read."""
        future: Future[Part] = Future()
        future.set_result(part)
        return cls(future, lambda: None)

    def end(self) -> None:
        """The part was taken, or nobody wants it any more. Its bytes are given back when no thread writes
        them."""
        self.future.cancel()
        self.future.add_done_callback(lambda _: self._give_back())


class _File:
    """A file that is opened by the thread that reads its first part, and closed by the one that reads its
    last."""

    def __init__(self, ahead: ReadAhead, listed: Listed, descriptors: Descriptors) -> None:
        self.descriptors = descriptors
        self.begun = False
        self.begun_bytes = 0
        self._ahead = ahead
        self._listed = listed
        self._lock = threading.Lock()
        self._file: SourceFile | None = None
        self._reads = 0
        """Parts that are being read, or wait for a thread."""
        self._unread_bytes = listed.size_bytes
        self._all_begun = False

    @property
    def left_bytes(self) -> int:
        return self._listed.size_bytes - self.begun_bytes

    @property
    def opened(self) -> bool:
        return self._file is not None

    def begin(self, size_bytes: int) -> Future[Part]:
        """Reads the next part on a thread of the store's."""
        location = join(self._ahead.top, self._listed.name)
        workers = self._ahead.source.workers(location, self._ahead.access.uid)
        with self._lock:
            self._reads += 1
        try:
            future = workers.submit(self._read, location, self.begun_bytes, size_bytes)
        except BaseException:
            self._ended(None)
            raise
        future.add_done_callback(self._ended)
        self.begun = True
        self.begun_bytes += size_bytes
        return future

    def close_when_read(self) -> None:
        """Called when no other part will be begun."""
        self._all_begun = True
        self._close_if_done()

    def _read(self, location: str, offset: int, size_bytes: int) -> Part:
        file = self._file or self._open(location)
        listed = Listed(self._listed.name, file.size_bytes, self._listed.version or file.listed_version)
        if not self._listed.version and self._ahead.has(listed.name, listed.version):
            return Part(listed, offset, b"", unchanged=True)
        buffer = bytearray(size_bytes)
        if size_bytes:
            give_up_at = time.monotonic() + self._ahead.source.patience_seconds
            RetryingReader(file, give_up_at).read_into(offset, [memoryview(buffer)])
        with self._lock:
            self._unread_bytes -= size_bytes
            all_read = not self._unread_bytes
        if all_read:
            file.check_unchanged()
        return Part(listed, offset, bytes(buffer))

    def _open(self, location: str) -> SourceFile:
        file = self._ahead.source.open(location, self._ahead.access)
        self._file = file
        expected = (self._listed.version or file.listed_version, self._listed.size_bytes)
        if (file.listed_version, file.size_bytes) != expected:
            raise CheckpointChangedError(
                f"{location} was changed after its directory was listed; fetch again", file=location
            )
        return file

    def _ended(self, _: object) -> None:
        with self._lock:
            self._reads -= 1
        self._close_if_done()

    def _close_if_done(self) -> None:
        with self._lock:
            done = self._all_begun and not self._reads
            file, self._file = (self._file, None) if done else (None, self._file)
        if file is not None:
            file.close()
        if done:
            self.descriptors.release()
