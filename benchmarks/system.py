"""Settings and memory of the machine, and its description."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_PACKAGES = (
    *("torch", "grpcio", "protobuf", "boto3"),
    *("runai-model-streamer", "runai-model-streamer-s3", "safetensors", "fastsafetensors"),
)


def fill_page_cache(paths: list[str]) -> None:
    buffer = bytearray(8 << 20)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_page_cache(paths: list[str]) -> None:
    """Drops the pages of these files only. Without the pages of their code, programs would read it from the
    measured disk while the clock runs."""
    os.sync()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def available_bytes() -> int:
    """The memory that processes can still take: free memory, and page cache that can be dropped."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise LookupError("MemAvailable")


def pss_bytes(pid: int) -> int:
    """The memory that the process maps and has touched. A page that n processes share counts as an n-th."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    raise LookupError("Pss")


def shmem_huge_pages() -> str:
    """The setting of huge pages for shared memory: "never", "advise", ..."""
    try:
        text = _SHMEM_ENABLED.read_text()
    except OSError:
        return "never"
    return text.partition("[")[2].partition("]")[0]


def may_set_shmem_huge_pages() -> bool:
    return os.geteuid() == 0 and os.access(_SHMEM_ENABLED, os.W_OK)


@contextlib.contextmanager
def shmem_huge_pages_set_to(value: str) -> Iterator[None]:
    """Changes the setting of the whole machine, and restores it, unless this process gets SIGKILL."""
    before = shmem_huge_pages()
    if value == before:
        yield
        return
    try:
        _SHMEM_ENABLED.write_text(value)
        yield
    finally:
        _SHMEM_ENABLED.write_text(before)


def commit(checkout: Path = ROOT) -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # A run changes the report itself.
        changed = git("status", "--porcelain", "--", ".", ":!docs/*.png", ":!docs/benchmarks.md")
        return git("rev-parse", "--short=12", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe() -> list[str]:
    """Lines of Markdown with the machine, the versions and the commit."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    versions = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    date = datetime.datetime.now(datetime.timezone.utc).date()
    return [
        f"- Machine: {os.cpu_count()} cores of {_cpu_model()}, {memory_bytes / 2**30:.0f} GiB of memory, "
        f"Linux {platform.release()}, shmem_enabled={shmem_huge_pages()}",
        f"- Versions: {', '.join(versions)}",
        f"- Penstock: commit {commit()}, measured on {date}",
    ]


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
