"""Which files a caller may open, and what is said of those that he may not."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from penstock.server.errors import (
    AccessDeniedError,
    CheckpointInvalidError,
    CheckpointNotFoundError,
    PenstockError,
)
from penstock.server.sources import Access
from penstock.server.sources.file.local_file import open_file
from penstock.server.sources.file.paths import list_directory, open_regular
from penstock.server.system import linux

from ...support import ROOT

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """What a user may load, and around it what not."""
    models = tmp_path / "models"
    (models / "deep").mkdir(parents=True)
    (models / "deep" / "f").write_bytes(b"allowed")
    (models / "f").write_bytes(b"allowed")
    (models / "inside").symlink_to("deep/f")
    (models / "up").symlink_to("../secret/f")
    (models / "absolute").symlink_to(tmp_path / "secret" / "f")
    (models / "absolute-inside").symlink_to(models / "f")
    (models / "directory-out").symlink_to("../secret")
    (models / "loop").symlink_to("loop")
    (models / "magic").symlink_to("/proc/self/root/etc/passwd")
    os.mkfifo(models / "fifo")
    for name in ("secret", "models-secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_bytes(b"secret")
    return models


def user(*prefixes: Path | str) -> Access:
    return Access(uid=1000, privileged=False, prefixes=tuple(map(str, prefixes)))


def content(path: Path | str, access: Access) -> bytes:
    file = open_file(str(path), access)
    try:
        buffer = bytearray(file.size_bytes)
        file.read_into(0, [memoryview(buffer)])
        return bytes(buffer)
    finally:
        file.close()


@pytest.mark.parametrize(
    "path", ["f", "deep/f", "inside", "deep/../f", "deep/../deep/f", "./f", "/f", "deep//f", "//deep///f"]
)
def test_what_lies_beneath_an_allowed_prefix_is_served(models: Path, path: str) -> None:
    assert content(f"{models}/{path}", user(models)) == b"allowed"
    assert content(f"{models}/{path}", user(f"{models}/")) == b"allowed"


@pytest.mark.parametrize(
    "path",
    [
        "up",
        "absolute",
        "absolute-inside",
        "directory-out/f",
        "../secret/f",
        "deep/../../secret/f",
        "deep/../../models/f",
        "loop",
        "magic",
        "//../secret/f",
    ],
)
def test_every_way_out_of_an_allowed_prefix_is_refused(models: Path, path: str) -> None:
    with pytest.raises(AccessDeniedError):
        content(f"{models}/{path}", user(models))


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("up", "leaves the allowed directory by a link or '..'"),
        (
            "absolute-inside",
            "leaves .* an absolute link counts as leaving, wherever it points: make it relative",
        ),
        ("loop", "follows too many links"),
    ],
)
def test_a_refused_link_is_told_what_is_wrong_with_it(models: Path, path: str, why: str) -> None:
    with pytest.raises(AccessDeniedError, match=why):
        content(models / path, user(models))


def test_a_link_in_a_circle_is_not_said_to_leave(models: Path) -> None:
    with pytest.raises(AccessDeniedError, match="follows too many links"):
        content(models / "loop", ROOT)


@pytest.mark.parametrize("path", ["../models-secret/f", "../secret/f", "..", "../models-secret"])
def test_what_lies_beside_an_allowed_prefix_is_refused(models: Path, path: str) -> None:
    target = os.path.normpath(models / path)
    with pytest.raises(AccessDeniedError, match="no --allow prefix"):
        content(target, user(models))


def test_who_is_allowed_nothing_is_refused(models: Path) -> None:
    with pytest.raises(AccessDeniedError, match="uid 1000"):
        content(models / "f", user())


def test_a_prefix_may_name_one_file(models: Path) -> None:
    access = user(models / "f")
    assert content(models / "f", access) == b"allowed"
    for path in (models / "f2", models / "deep" / "f", models):
        with pytest.raises(AccessDeniedError):
            content(path, access)
    with pytest.raises(CheckpointNotFoundError):
        content(f"{models}/f/", access)


def test_the_prefix_that_names_more_of_the_path_decides(models: Path) -> None:
    """The link leaves /models, but what it leads to is allowed by its own name."""
    linked = models / "directory-out"
    for access in (user(models, linked), user(linked, models)):
        assert content(linked / "f", access) == b"secret"


def test_the_root_as_a_prefix_allows_every_path_without_links_out_of_it(models: Path) -> None:
    assert content(models / "f", user("/")) == b"allowed"
    assert content(f"/{models}/f", user("/")) == b"allowed"


def test_object_prefixes_allow_no_path(models: Path) -> None:
    for prefix in ("s3://", "s3://bucket/"):
        with pytest.raises(AccessDeniedError):
            content(models / "f", user(prefix))


@pytest.mark.parametrize("privileged", [True, False])
def test_only_regular_files_are_opened_and_nothing_waits(models: Path, privileged: bool) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        short = os.open(models, os.O_PATH)
        try:
            listener.bind(f"/proc/self/fd/{short}/socket")
        finally:
            os.close(short)
        access = ROOT if privileged else user(models, "/dev")
        for path in (models / "fifo", models / "deep", models / "socket", "/dev/null", "/dev/zero"):
            with pytest.raises(CheckpointInvalidError, match="is not a regular file"):
                content(path, access)


@pytest.mark.parametrize("privileged", [True, False])
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing", CheckpointNotFoundError),
        ("missing/f", CheckpointNotFoundError),
        ("f/", CheckpointNotFoundError),
        ("f/f", CheckpointNotFoundError),
        ("x" * 300, CheckpointNotFoundError),
        ("d/" * 2500, CheckpointNotFoundError),
    ],
)
def test_what_is_not_there_is_not_found(
    models: Path, path: str, expected: type[PenstockError], privileged: bool
) -> None:
    with pytest.raises(expected) as caught:
        content(f"{models}/{path}", ROOT if privileged else user(models))
    assert len(caught.value.message) < 5300


def test_a_privileged_caller_may_follow_links_anywhere(models: Path) -> None:
    assert content(models / "up", ROOT) == b"secret"
    assert content(models / "absolute-inside", ROOT) == b"allowed"


def test_the_descriptor_is_not_inherited(models: Path) -> None:
    for access in (ROOT, user(models)):
        fd = open_regular(str(models / "f"), access)
        inheritable = os.get_inheritable(fd)
        os.close(fd)
        assert not inheritable


def test_a_directory_is_listed_in_order_and_anything_else_is_not(models: Path) -> None:
    for access in (ROOT, user(models)):
        assert list_directory(str(models / "deep"), access) == ["f"]
        names = list_directory(str(models), access)
        assert names == sorted(os.listdir(models))
        assert list_directory(str(models / "f"), access) is None
        assert list_directory(str(models / "fifo"), access) is None
    with pytest.raises(AccessDeniedError):
        list_directory(str(models / "directory-out"), user(models))


def test_a_path_is_resolved_a_bounded_number_of_times(models: Path) -> None:
    """The kernel says the same of a path that raced with a rename and of a file with a lease."""
    holder = os.open(models / "f", os.O_RDWR)
    root = os.open(models, os.O_PATH)
    try:
        try:
            fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            pytest.skip(f"this file system has no leases: {error.strerror}")
        fcntl.fcntl(holder, fcntl.F_SETOWN, 0)  # or this process would be sent SIGIO
        with pytest.raises(BlockingIOError):
            linux.open_beneath(root, "f", os.O_RDONLY | os.O_NONBLOCK)
    finally:
        os.close(root)
        os.close(holder)


SWAP = """
import ctypes, os, sys
libc, (one, other) = ctypes.CDLL(None), map(os.fsencode, sys.argv[1:])
def swap():
    return libc.renameat2(-100, one, -100, other, 2) == 0
print(swap() and swap(), flush=True)
while True:
    swap()
"""


def test_a_directory_swapped_for_a_link_out_while_it_is_resolved_leads_nowhere_else(models: Path) -> None:
    """At every moment the path is either allowed or leads out."""
    pair = [models / "deep", models / "directory-out"]
    seen: Counter[bytes | type[PenstockError]] = Counter()
    gives_up_at = time.monotonic() + 60
    with subprocess.Popen([sys.executable, "-c", SWAP, *pair], stdout=subprocess.PIPE) as swapping:
        try:
            assert swapping.stdout is not None
            if swapping.stdout.readline() != b"True\n":
                pytest.skip("this file system cannot swap two names")
            while seen.total() < 2000 or len(seen) < 2:
                assert time.monotonic() < gives_up_at, seen
                try:
                    seen[content(models / "deep" / ".." / "deep" / "f", user(models))] += 1
                except PenstockError as error:
                    seen[type(error)] += 1
        finally:
            swapping.kill()
    assert set(seen) == {b"allowed", AccessDeniedError}


class Opened:
    """How often a file was opened, by any process, as inotify reports it."""

    _OPEN = 0x20
    _EVENT_BYTES = 16

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0, "this user has as many inotify instances as it may"
        assert libc.inotify_add_watch(self._fd, os.fsencode(path), self._OPEN) >= 0

    def close(self) -> None:
        os.close(self._fd)

    def times(self) -> int:
        """Equal events in a row count once."""
        with contextlib.suppress(BlockingIOError):
            return len(os.read(self._fd, 4096)) // self._EVENT_BYTES
        return 0


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFCHR])
@pytest.mark.parametrize("access", ["root", "a user"])
def test_what_is_no_regular_file_is_not_even_opened(models: Path, kind: int, access: str) -> None:
    """Who opens a FIFO wakes the one who waits to write to it; who opens a device may start it."""
    if kind == stat.S_IFCHR and os.geteuid() != 0:
        pytest.skip("only root can make a device")
    path = models / "odd"
    os.mknod(path, kind | 0o666, os.makedev(1, 3))
    caller = ROOT if access == "root" else user(models)
    with contextlib.closing(Opened(path)) as opened:
        assert list_directory(str(path), caller) is None
        with pytest.raises(CheckpointInvalidError, match="is not a regular file"):
            open_file(str(path), caller)
        assert opened.times() == 0
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        assert opened.times() == 1
