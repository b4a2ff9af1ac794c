"""Shared memory of vLLM's ranks on a CPU. It has names in /dev/shm, and only ranks that end in order remove
them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

_DIRECTORY = Path("/dev/shm")
_KIND = "-cpushm_"


def of_ranks(pid: int) -> set[Path]:
    """What the process, and those that it started, have mapped of it. Their names are vLLM's choice."""
    found: set[Path] = set()
    for one in _family(pid):
        with contextlib.suppress(OSError):  # it has ended
            mapped = Path(f"/proc/{one}/maps").read_text().splitlines()
            paths = (Path(line.split(maxsplit=5)[-1]) for line in mapped if _KIND in line)
            found.update(path for path in paths if path.parent == _DIRECTORY)
    return found


def remove(paths: Iterable[Path]) -> None:
    """Processes that have it mapped keep it until they end."""
    for path in paths:
        path.unlink(missing_ok=True)


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for children in list(Path(f"/proc/{pid}/task").glob("*/children")):
            for child in children.read_text().split():
                yield from _family(int(child))
