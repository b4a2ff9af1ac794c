"""A disk that reads at most so many bytes a second, by a control group of either version.

A limit below what the disk can do makes it equally fast each time. Needs root.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/blkio")
_V2 = Path("/sys/fs/cgroup")


class DiskLimitError(Exception):
    """The disk cannot be limited here."""


@contextlib.contextmanager
def reads_limited_to(bytes_a_second: int, directory: Path) -> Iterator[None]:
    """Limits what this process, and those that it starts meanwhile, read from the disk below `directory`.
    These must have ended before the context does. Raises DiskLimitError where that is not possible."""
    try:
        group, before = _enter_group(_whole_disk(directory), bytes_a_second)
    except OSError as error:
        raise DiskLimitError(f"{error}; it needs root, and control groups for disks") from error
    try:
        yield
    finally:
        _move_to(before)
        group.rmdir()


def _enter_group(device: str, bytes_a_second: int) -> tuple[Path, Path]:
    """A new group, and the one that this process was in."""
    if (_V1 / "blkio.throttle.read_bps_device").exists():
        top, file, limit = _V1, "blkio.throttle.read_bps_device", str(bytes_a_second)
    else:
        top, file, limit = _V2, "io.max", f"rbps={bytes_a_second}"
        (top / "cgroup.subtree_control").write_text("+io")
    before = _own_group(top)
    group = top / f"penstock-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / file).write_text(f"{device} {limit}")
        _move_to(group)
    except BaseException:
        group.rmdir()
        raise
    return group, before


def _move_to(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _own_group(top: Path) -> Path:
    controller = top.name if top == _V1 else ""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == controller:
            return top / path.lstrip("/")
    raise FileNotFoundError(f"no control group of {top}")


def _whole_disk(directory: Path) -> str:
    """The number of the disk, as "MAJOR:MINOR". A partition cannot be limited by itself."""
    number = directory.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not device.exists():
        raise DiskLimitError(f"{directory} is on no disk of its own; name another --directory")
    device = device.resolve()
    return ((device.parent if (device / "partition").exists() else device) / "dev").read_text().strip()
