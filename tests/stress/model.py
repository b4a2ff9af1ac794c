"""What may happen: which versions of a file a load may see, and with what errors it may end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import checkpoints


@dataclass(slots=True)
class Span:
    """A time during which something was done to a file or the daemon, of which nobody knows the moment."""

    began: float
    ended: float

    def meets(self, began: float, ended: float) -> bool:
        return self.began <= ended and began <= self.ended


@dataclass(slots=True)
class File:
    """One file and its history."""

    path: Path
    allowed: bool
    """To users who are not privileged."""
    version: int = 0
    broken: bool = False
    """Truncated for now: no version at all."""
    written: dict[int, Span] = field(default_factory=dict)
    """When a version came."""
    replaced: dict[int, Span] = field(default_factory=dict)
    """When it went."""
    disturbed: list[Span] = field(default_factory=list)
    """When loads may find the file changing: everything but an atomic replacement."""
    broken_times: list[Span] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.stem

    def change(self, action: Callable[[int], object], *, atomic: bool) -> None:
        """Writes the next version by `action(version)`, and remembers when."""
        before, self.version = self.version, self.version + 1
        began = time.monotonic()
        # Loads that end before this does can see the new version already.
        action(self.version)
        span = Span(began, time.monotonic())
        self.written[self.version] = span
        self.replaced[before] = span
        if not atomic:
            self.disturbed.append(span)
        if self.broken:
            self.broken = False
            self.broken_times[-1].ended = span.ended

    def touch(self) -> None:
        began = time.monotonic()
        self.path.touch()
        self.disturbed.append(Span(began, time.monotonic()))

    def truncate(self) -> None:
        """To a part of it, until the next `change`."""
        began = time.monotonic()
        with self.path.open("r+b") as file:
            file.truncate(len(checkpoints.encoded(self.name, self.version)) // 3)
        self.disturbed.append(Span(began, time.monotonic()))
        self.broken = True
        self.broken_times.append(Span(began, float("inf")))

    def versions(self, began: float, ended: float) -> set[int]:
        """That existed at some time in between."""
        return {
            version
            for version, span in self.written.items()
            if span.began <= ended and (version not in self.replaced or self.replaced[version].ended >= began)
        }


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one daemon, as the contract has them."""

    memory_limit: int
    slab_bytes: int
    max_slabs: int

    def refuses(self, largest_bytes: int, ring_bytes: int, asked: int | None, *, uid: int) -> bool:
        """Whether a load with such a tensor, which needs so much room in a ring, cannot be."""
        share = self.max_slabs if uid == 0 else max(1, self.max_slabs * 7 // 8)
        if asked:
            share = min(share, -(-asked // self.slab_bytes))
        return -(-ring_bytes // self.slab_bytes) > share or bool(asked and largest_bytes > asked)


@dataclass(slots=True)
class Situation:
    """All that decides what the answer to an order may be."""

    limits: Limits
    daemon_gone: list[Span] = field(default_factory=list)
    memory_may_be_held: bool = False
    """Tensors are kept after loads, or checkpoints pinned: waiting for memory can take for ever."""

    def complaint(self, wish: dict[str, Any], answer: dict[str, Any], uid: int, files: list[File]) -> str:
        """What is wrong with the answer to a load or a prefetch; empty if nothing is."""
        if "wrong" in answer:
            return str(answer["wrong"])
        error = answer.get("error")
        must, may = self._errors(wish, answer, uid, files)
        if must and error not in must | may:
            return f"ended with {error or 'success'} where only {sorted(must | may)} would do"
        if error is not None and error not in must | may:
            return f"failed with {error}: {answer['message']}; allowed: {sorted(must | may) or 'nothing'}"
        for file in files:
            seen = answer.get("versions", {}).get(file.name)
            if seen is not None and seen not in file.versions(answer["began"], answer["ended"]):
                return f"saw version {seen} of {file.name}, which existed not then: {file}"
        return ""

    def _errors(
        self, wish: dict[str, Any], answer: dict[str, Any], uid: int, files: list[File]
    ) -> tuple[set[str], set[str]]:
        """Errors of which one must be, and which may be as well."""
        began, ended = answer["began"], answer["ended"]
        must, may = set[str](), set[str]()
        if any(span.meets(began, ended) for span in self.daemon_gone):
            if not answer.get("count"):  # one that had begun to yield waits for the next daemon and goes on
                may |= {"DaemonUnavailableError", "SessionRequiredError", "ShuttingDownError"}
            # Resumed with another daemon, or begun again with the group's rest.
            if any(
                len(file.versions(began, ended)) > 1 or _any(file.disturbed, began, ended) for file in files
            ):
                may.add("CheckpointChangedError")
        if any(_any(file.disturbed, began, ended) for file in files):
            may |= {"CheckpointChangedError", "CheckpointInvalidError"}
        if any(_any(file.broken_times, began, ended) for file in files):
            may |= {"CheckpointChangedError", "CheckpointInvalidError"}
        if any(_all(file.broken_times, began, ended) for file in files):
            must.add("CheckpointInvalidError")
        if self.memory_may_be_held:
            may.add("StagingExhaustedError")
        if uid and not all(file.allowed for file in files):
            must.add("AccessDeniedError")
        if uid and wish.get("pin"):
            must.add("AccessDeniedError")
        if wish.get("missing"):
            must.add("TensorNotFoundError")
        refused = self._refused(wish, uid, files, began, ended)
        if True in refused:
            (may if False in refused else must).add("MemoryLimitTooSmallError")
        if "pin" in wish:  # a prefetch needs room for all
            may.add("MemoryLimitTooSmallError")
        return must, may

    def _refused(
        self, wish: dict[str, Any], uid: int, files: list[File], began: float, ended: float
    ) -> set[bool]:
        """For the versions that it may have found."""
        found = set()
        for pick in (min, max):
            sizes = [
                pick(
                    (
                        checkpoints.largest(file.name, version, wish.get("selection"))
                        for version in file.versions(began, ended)
                    ),
                    default=(0, 0),
                )
                for file in files
            ]
            largest = max(size for size, _ in sizes), max(ring for _, ring in sizes)
            found.add(self.limits.refuses(*largest, wish.get("memory_limit"), uid=uid))
        return found


def _any(spans: Iterable[Span], began: float, ended: float) -> bool:
    return any(span.meets(began, ended) for span in spans)


def _all(spans: Iterable[Span], began: float, ended: float) -> bool:
    """One span covers it all."""
    return any(span.began < began and ended < span.ended for span in spans)
