"""What users do to files of their own while these are loaded. Their loads get right bytes or an error, and
nobody else's load waits for it."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ..e2e.programs import await_go, say
from ..e2e.support import Checkpoint, Checkpoints, Nursery
from .conftest import StartTarget
from .outcomes import assert_loads, outcomes_of, right
from .support import TargetDaemon

ANNE, BERT = 1401, 1402
KEEP_SIZE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 0x1, 0x8, 0x10, 0x20
"""Of `fallocate`, which Python does not wrap."""
PAGE_BYTES = 4096
HEADER_LENGTH_BYTES = 8
BLOCK_BYTES = 64 << 10

pytestmark = pytest.mark.usefixtures("root")

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def daemon(start_target: StartTarget, models: Path) -> TargetDaemon:
    return start_target("--allow", str(models), "--block-size", str(BLOCK_BYTES))


@pytest.fixture
def anne_s(models: Path) -> Checkpoint:
    """In a directory that Anne may write."""
    return owned_by_anne(Checkpoints(models)("anne", 8))


@pytest.fixture
def bert_s(models: Path) -> Checkpoint:
    return Checkpoints(models)("bert", 3)


def owned_by_anne(checkpoint: Checkpoint) -> Checkpoint:
    path, tensors = checkpoint
    own = path.with_name("own")
    own.mkdir()
    moved = path.rename(own / path.name)
    for one in (own, moved):
        os.chown(one, ANNE, ANNE)
    return moved, tensors


# ---- leases --------------------------------------------------------------------------------------


def hold_lease(path: str) -> None:
    """Whoever opens the file has to wait for 45 s, or until this process ends."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        say("leased", unable=str(error))
        return
    say("leased", unable="")
    await_go()


def test_a_file_on_which_its_owner_has_a_lease_is_refused_and_holds_up_nobody(
    daemon: TargetDaemon, attackers: Nursery, anne_s: Checkpoint, bert_s: Checkpoint
) -> None:
    """Also as one of a directory, and for root, whose paths are opened otherwise."""
    before = daemon.usage()
    owner = attackers.start(hold_lease, uid=ANNE, path=anne_s[0])
    if unable := owner.hear("leased")["unable"]:
        pytest.skip(f"this file system has no leases: {unable}")
    for uid in (ANNE, None):
        for source in (anne_s[0], anne_s[0].parent):
            (one,) = outcomes_of(attackers, daemon, uid, source)
            assert one.error == "SourceUnavailableError"
            assert f"{anne_s[0]} cannot be opened: a process has a lease on it" in one.message
    assert_loads(attackers, daemon, BERT, bert_s)
    daemon.assert_comes_back(before)
    owner.end()
    assert_loads(attackers, daemon, ANNE, anne_s)


# ---- writes without end --------------------------------------------------------------------------


def fallocate(fd: int, mode: int, offset: int, size_bytes: int) -> None:
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(size_bytes)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def grow(fd: int, content: bytes) -> None:
    os.pwrite(fd, b"more", os.fstat(fd).st_size)


def cut_and_write_again(fd: int, content: bytes) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, content, 0)


def zero_and_write_again(fd: int, content: bytes) -> None:
    fallocate(fd, ZERO_RANGE | KEEP_SIZE, PAGE_BYTES, len(content) // 2)
    os.pwrite(fd, content, 0)


def take_out_and_put_in(fd: int, content: bytes) -> None:
    """A page, without which the rest is elsewhere."""
    fallocate(fd, COLLAPSE_RANGE, PAGE_BYTES, PAGE_BYTES)
    fallocate(fd, INSERT_RANGE, PAGE_BYTES, PAGE_BYTES)
    os.pwrite(fd, content[PAGE_BYTES : 2 * PAGE_BYTES], PAGE_BYTES)


def write_through_a_mapping(fd: int, content: bytes) -> None:
    """All of it reaches the disk, so that the next write has a time again."""
    with mmap.mmap(fd, len(content)) as mapping:
        for offset in range(PAGE_BYTES, len(content), PAGE_BYTES):
            mapping[offset : offset + 8] = bytes(8)
        mapping.flush()
        mapping[:] = content
        mapping.flush()


RESTLESS = [grow, cut_and_write_again, zero_and_write_again, take_out_and_put_in, write_through_a_mapping]


def write_without_end(path: str, how: str) -> None:
    (change,) = [change for change in RESTLESS if change.__name__ == how]
    with open(path, "r+b", buffering=0) as file:
        fd, content = file.fileno(), file.read()
        # While its bytes are others it is no checkpoint: its first bytes say how long the header is.
        spoilt = bytes(HEADER_LENGTH_BYTES) + content[HEADER_LENGTH_BYTES:]
        for number in itertools.count():
            os.pwrite(fd, spoilt[:HEADER_LENGTH_BYTES], 0)
            try:
                change(fd, spoilt)
            except OSError as error:
                say("writing", unable=str(error))
                return
            os.pwrite(fd, content[:HEADER_LENGTH_BYTES], 0)
            if not number:
                say("writing", unable="")


@pytest.mark.parametrize("change", RESTLESS)
def test_loads_of_a_file_that_is_written_to_without_end_get_its_bytes_or_an_error(
    change: Callable[[int, bytes], None],
    daemon: TargetDaemon,
    attackers: Nursery,
    anne_s: Checkpoint,
    bert_s: Checkpoint,
) -> None:
    before = daemon.usage()
    writer = attackers.start(write_without_end, uid=ANNE, path=anne_s[0], how=change.__name__)
    if unable := writer.hear("writing")["unable"]:
        pytest.skip(f"this file system moves no blocks: {unable}")
    for one in outcomes_of(attackers, daemon, ANNE, anne_s[0], 30):
        if one.error:
            assert one.error in ("CheckpointChangedError", "CheckpointInvalidError"), one
            assert str(anne_s[0]) in one.message
        else:
            assert one.found == right(anne_s)
    assert_loads(attackers, daemon, BERT, bert_s)
    assert writer.exit_code() is None, writer.errors()
    writer.end()
    daemon.assert_comes_back(before)


# ---- names that change without end ---------------------------------------------------------------


def rename_without_end(directory: str) -> None:
    first, second = f"{directory}/first", f"{directory}/second"
    os.mkdir(first)
    say("renaming")
    while True:
        os.rename(first, second)
        os.rename(second, first)


def test_renames_without_end_fail_no_load_through_a_link_upwards(
    daemon: TargetDaemon, attackers: Nursery, anne_s: Checkpoint, bert_s: Checkpoint
) -> None:
    """The kernel gives up on `..` beneath a prefix whenever something is renamed, wherever that is. The Hub's
    cache is full of such links."""
    path = bert_s[0]
    link = path.with_name("snapshot") / "deep" / "link.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(f"../../{path.name}")
    for name in ("a", "b"):
        (anne_s[0].parent / name).mkdir()
        os.chown(anne_s[0].parent / name, ANNE, ANNE)
        attackers.start(rename_without_end, uid=ANNE, directory=anne_s[0].parent / name).hear("renaming")
    for one in outcomes_of(attackers, daemon, BERT, link, 30):
        assert one == ("", "", right(bert_s))


# ---- files of processes --------------------------------------------------------------------------


def hold_memfd(path: str) -> None:
    fd = os.memfd_create("checkpoint", os.MFD_ALLOW_SEALING)
    os.write(fd, Path(path).read_bytes())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    say("held", fd=fd)
    await_go()


def test_a_process_s_memory_file_is_loaded_for_root_alone(
    start_target: StartTarget, attackers: Nursery, anne_s: Checkpoint
) -> None:
    """The links of /proc lead anywhere, also out of every prefix."""
    daemon = start_target("--allow", "/")
    before = daemon.usage()
    holder = attackers.start(hold_memfd, uid=ANNE, path=anne_s[0])
    source = Path(f"/proc/{holder.pid}/fd/{holder.hear('held')['fd']}")
    (one,) = outcomes_of(attackers, daemon, ANNE, source)
    assert one.error == "AccessDeniedError"
    assert "one of /proc that leads to no path" in one.message
    (one,) = outcomes_of(attackers, daemon, None, source)
    assert one == ("", "", right(anne_s))
    daemon.assert_comes_back(before)


FILES_OF_THE_KERNEL = [
    "/proc/self/status",
    "/proc/self/mem",
    "/proc/self/maps",
    "/proc/kmsg",
    "/sys/kernel/mm",
]


def test_a_file_of_the_kernel_is_no_checkpoint_though_root_asks(
    start_target: StartTarget, attackers: Nursery, bert_s: Checkpoint
) -> None:
    daemon = start_target("--allow", "/")
    before = daemon.usage()
    for source in FILES_OF_THE_KERNEL:
        for uid in (None, ANNE):
            (one,) = outcomes_of(attackers, daemon, uid, Path(source))
            assert one.error in ("CheckpointInvalidError", "AccessDeniedError", "CheckpointNotFoundError"), (
                one
            )
            assert source in one.message
    assert_loads(attackers, daemon, BERT, bert_s)
    daemon.assert_comes_back(before)
