"""A file system that hangs where a test wants it to: one directory with files, served by a thread.

It speaks FUSE's protocol (version 7.31) to /dev/fuse by hand. A request that is to hang is kept without an
answer until `release`. When it is closed, all requests are answered or fail, so that no process stays behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import select
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _RELEASE, _FLUSH = 1, 2, 3, 14, 15, 18, 25
_INIT, _OPENDIR, _READDIR, _RELEASEDIR, _INTERRUPT, _BATCH_FORGET = 26, 27, 28, 29, 36, 42
_NAMES = {
    _LOOKUP: "lookup",
    _GETATTR: "getattr",
    _OPEN: "open",
    _READ: "read",
    _READDIR: "readdir",
    _FLUSH: "flush",
}
"""What `hang` may be told."""

_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")
_READ_IN = struct.Struct("<QQI")
_ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_READ_BYTES = 128 << 10
_ROOT = 1
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class FuseFileSystem:
    """`files` by name. Made by `mounted`."""

    mount_point: Path
    files: dict[str, bytes]
    reads: list[tuple[str, int]] = field(default_factory=list)
    """Which files were read, and how many bytes, in the order of the answers."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._hanging: set[str] = set()
        self._beyond = 0
        self._kept: list[Callable[[], None]] = []
        self._inodes = {number + 2: name for number, name in enumerate(self.files)}
        self.mount_point.mkdir(exist_ok=True)
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40755,user_id=0,group_id=0,allow_other,max_read={_READ_BYTES}"
        if _libc.mount(b"penstock", os.fsencode(self.mount_point), b"fuse", 0, options.encode()) != 0:
            code = ctypes.get_errno()
            os.close(self._fd)
            raise OSError(code, os.strerror(code))
        self._stopped, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._serve, name="fuse")
        self._thread.start()

    def hang(self, *operations: str, beyond: int = 0) -> None:
        """From now on these are not answered: lookup, getattr, open, readdir, flush, and reads from the
        offset `beyond` on."""
        assert set(operations) <= set(_NAMES.values())
        with self._lock:
            self._beyond = beyond
            self._hanging |= set(operations)

    @property
    def kept(self) -> int:
        """How many requests hang."""
        with self._lock:
            return len(self._kept)

    def release(self) -> None:
        """Answers all that hang; from now on nothing does."""
        with self._lock:
            self._hanging.clear()
            kept, self._kept = self._kept, []
        for answer in kept:
            answer()

    def close(self) -> None:
        """Answers what hangs and is gone: whoever still has a file open gets an error from it."""
        self.release()
        _libc.umount2(os.fsencode(self.mount_point), _MNT_DETACH)
        os.close(self._stop)
        self._thread.join(60)
        os.close(self._stopped)
        os.close(self._fd)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._stopped, select.POLLIN)
        while all(fd == self._fd for fd, _ in poll.poll()):
            try:
                request = os.read(self._fd, 1 << 20)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return  # ENODEV: it was unmounted, and nobody has anything open
            _, operation, unique, inode, *_ = _IN.unpack_from(request)
            if operation in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue
            body = request[_IN.size :]

            answer = functools.partial(self._reply, operation, unique, inode, body)
            name = _NAMES.get(operation, "")
            with self._lock:
                hangs = name in self._hanging
                if name == "getattr" and inode == _ROOT:  # every path that leads here asks for them
                    hangs = False
                if name == "read":
                    hangs = hangs and _READ_IN.unpack_from(body)[1] >= self._beyond
                if hangs:
                    self._kept.append(answer)
            if not hangs:
                answer()

    def _reply(self, operation: int, unique: int, inode: int, body: bytes) -> None:
        code, data = self._answer(operation, inode, body)
        with contextlib.suppress(OSError):  # who asked is gone
            os.write(self._fd, _OUT.pack(_OUT.size + len(data), -code, unique) + data)

    def _answer(self, operation: int, inode: int, body: bytes) -> tuple[int, bytes]:
        if operation == _INIT:
            return 0, _INIT_OUT.pack(7, 31, 65536, 0, 64, 48, _READ_BYTES, 1, 0, 0, 0)
        if operation == _LOOKUP:
            name = os.fsdecode(body.rstrip(b"\0"))
            found = next((number for number, other in self._inodes.items() if other == name), None)
            if found is None:
                return errno.ENOENT, b""
            return 0, struct.pack("<QQQQII", found, 0, 0, 0, 0, 0) + self._attributes(found)
        if operation == _GETATTR:
            return 0, struct.pack("<QII", 0, 0, 0) + self._attributes(inode)
        if operation in (_OPEN, _OPENDIR):
            return 0, struct.pack("<QII", 0, 0, 0)
        if operation == _READ:
            _, offset, size = _READ_IN.unpack_from(body)
            name = self._inodes[inode]
            data = self.files[name][offset : offset + size]
            self.reads.append((name, len(data)))
            return 0, data
        if operation == _READDIR:
            _, offset, size = _READ_IN.unpack_from(body)
            return 0, self._entries(offset, size)
        if operation in (_RELEASE, _RELEASEDIR, _FLUSH):
            return 0, b""
        return errno.ENOSYS, b""

    def _attributes(self, inode: int) -> bytes:
        size, mode = 0, stat.S_IFDIR | 0o755
        if inode != _ROOT:
            size, mode = len(self.files[self._inodes[inode]]), stat.S_IFREG | 0o644
        return _ATTRIBUTES.pack(inode, size, -(-size // 512), 1, 1, 1, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _entries(self, offset: int, size: int) -> bytes:
        entries = b""
        for number, (inode, name) in enumerate(self._inodes.items()):
            raw = name.encode()
            entry = struct.pack("<QQII", inode, number + 1, len(raw), stat.S_IFREG >> 12) + raw
            entry += bytes(-len(entry) % 8)
            if number >= offset and len(entries) + len(entry) <= size:
                entries += entry
        return entries


@contextlib.contextmanager
def mounted(mount_point: Path, files: dict[str, bytes]) -> Iterator[FuseFileSystem]:
    """Skips the test where FUSE cannot be mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    try:
        system = FuseFileSystem(mount_point, files)
    except OSError as error:
        pytest.skip(f"FUSE cannot be mounted here: {error}")
    try:
        yield system
    finally:
        system.close()
