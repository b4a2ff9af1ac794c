"""What a seed means: a daemon's flags, and a list of things to be done in order. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

USERS = (0, 0, 10001, 10001, 10002)
"""One worker each."""
FILES = ("many-0", "plain-0", "plain-1", "vary-0", "large-0", "large-1", "giant-0", "exact-0", "one-0")
IN_DIRECTORY = ("plain-2", "plain-3", "vary-1")
FORBIDDEN = "plain-9"
DIRECTORY = "directory"

_LIMITS = ("-1", "0", "2MiB", "4MiB", "6MiB", "16MiB", "48MiB", "128MiB")


@dataclass(frozen=True, slots=True)
class Order:
    """Something for a worker of a user."""

    operation: str
    arguments: dict[str, Any]
    uid: int
    kill_after: float | None = None
    """Seconds after which the worker gets SIGKILL, whatever it does then."""
    stop_after: float | None = None
    """Seconds after which it gets SIGSTOP, for `stop_seconds`."""
    stop_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Change:
    """Something done to a file: "replace", "overwrite", "rewrite" (truncated first), "truncate", "touch"."""

    how: str
    file: str
    pause_seconds: float


@dataclass(frozen=True, slots=True)
class Restart:
    """Of the daemon, by SIGKILL or by SIGTERM."""

    kill: bool


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    limit: str
    flags: tuple[str, ...]
    holds: bool
    """Tensors are kept after their loads, checkpoints are pinned, loads are nested: memory may be long
    in coming, and that is nobody's fault."""
    steps: tuple[Order | Change | Restart, ...]


def make(seed: int, loads: int) -> Plan:
    """The same plan for the same numbers."""
    source = random.Random(f"penstock {seed}")
    limit = _LIMITS[seed % len(_LIMITS)]
    holds, restarts = source.random() < 0.4, source.random() < 0.3
    flags = [
        f"--memory-limit={limit}",
        f"--concurrency={source.choice((1, 2, 5, 16))}",
        f"--block-size={source.choice(('64KiB', '1MiB', '8MiB'))}",
        f"--window-size={source.choice(('4MiB', '4GiB'))}",
        f"--queue-timeout={3 if holds else 30}",
        "--group-timeout=1",
        "--trim-after=1",
        "--grace=3",
    ]
    if source.random() < 0.3:
        flags.append("--no-populate")
    maker = _Maker(source, holds)
    steps: list[Order | Change | Restart] = []
    while maker.loads < loads:
        roll = source.random()
        if roll < 0.12:
            steps.extend(maker.change())
        elif roll < 0.13 and restarts:
            steps.append(Restart(kill=source.random() < 0.7))
        elif roll < 0.18:
            steps.extend(maker.group())
        else:
            steps.append(maker.order())
    return Plan(seed, limit, tuple(flags), holds, tuple(steps))


class _Maker:
    def __init__(self, source: random.Random, holds: bool) -> None:
        self._random = source
        self._holds = holds
        self._groups = 0
        self.loads = 0

    def order(self) -> Order:
        uid = self._random.choice(USERS)
        roll = self._random.random()
        if roll < 0.06:
            return self._fated("evict", {"sources": self._random.choice((None, [self._file()]))}, uid)
        if roll < 0.12:
            pin = self._holds and self._random.random() < 0.4
            files = self._files()
            arguments = {"sources": files[0], "files": files[1], "pin": pin}
            self.loads += 1
            return self._fated("prefetch", arguments, uid)
        if roll < 0.20:
            wishes = [self._wish() for _ in range(self._random.randrange(2, 4))]
            if self._random.random() < 0.5:
                for wish in wishes:
                    wish["sources"], wish["files"] = wishes[0]["sources"], wishes[0]["files"]
                    wish["names"] = wish["missing"] = None
            return self._fated("together", {"loads": wishes}, uid)
        if roll < 0.24 and self._holds:
            outer, inner = self._wish(), self._wish()
            outer["pause_after"], outer["leave_after"] = 1, None
            return self._fated("nested", {"outer": outer, "inner": inner}, uid)
        return self._fated("load", self._wish(), uid)

    def group(self) -> list[Order]:
        """Loads that share a window; sometimes one never comes, sometimes one stops in the middle."""
        self._groups += 1
        uid, size = self._random.choice((0, 10001)), 2
        first = self._wish()
        orders = []
        for _ in range(size):
            wish = {**self._wish(), "names": None, "missing": None, "selection": first["selection"]}
            wish["sources"], wish["files"] = first["sources"], first["files"]
            wish["memory_limit"] = first["memory_limit"]
            wish["group"] = [f"group-{self._groups}", size + (self._random.random() < 0.2)]
            orders.append(self._fated("load", wish, uid))
        return orders

    def change(self) -> list[Order | Change | Restart]:
        file = self._random.choice((*FILES, *IN_DIRECTORY))
        how = self._random.choice(("replace", "replace", "overwrite", "rewrite", "truncate", "touch"))
        pause = self._random.choice((0.0, 0.0, 0.002, 0.02))
        if how != "truncate":
            return [Change(how, file, pause)]
        meanwhile = [self.order() for _ in range(self._random.randrange(4))]
        return [Change(how, file, pause), *meanwhile, Change("rewrite", file, pause)]

    def _fated(self, operation: str, arguments: dict[str, Any], uid: int) -> Order:
        roll, moment = self._random.random(), self._random.expovariate(1 / 0.03)
        if roll < 0.08:
            return Order(operation, arguments, uid, kill_after=moment)
        if roll < 0.12:
            seconds = self._random.uniform(0.1, 0.6)
            return Order(operation, arguments, uid, stop_after=moment, stop_seconds=seconds)
        return Order(operation, arguments, uid)

    def _wish(self) -> dict[str, Any]:
        """One load, as `worker.py` takes it; `missing` is for the model."""
        self.loads += 1
        choose = self._random.random
        sources, files = self._files()
        selection = None
        if choose() < 0.25:
            every = self._random.choice((2, 3))
            selection = f"every:{every}:{self._random.randrange(every)}"
        names = None
        missing = False
        if choose() < 0.03:
            names, missing = ["no-such-tensor"], True
        leaves = choose() < 0.25
        owned = choose() < 0.6
        return {
            "sources": sources,
            "files": files,
            "selection": selection,
            "names": names,
            "missing": missing,
            "memory_limit": self._random.choice((None, None, None, 0, 2 << 20, 8 << 20, 64 << 20)),
            "owned": owned,
            "group": None,
            "hold": owned and self._holds and choose() < 0.3,
            "scribble": choose() < 0.2,
            "leave": self._random.choice(("break", "close", "raise", "drop")),
            "leave_after": int(self._random.expovariate(1 / 5)) + 1 if leaves else None,
            "pause_after": int(self._random.expovariate(1 / 5)) + 1 if choose() < 0.15 else None,
            "pause_seconds": self._random.uniform(0.0, 0.2),
        }

    def _files(self) -> tuple[list[str], list[str]]:
        roll = self._random.random()
        if roll < 0.1:
            return [DIRECTORY], list(IN_DIRECTORY)
        if roll < 0.2:
            both = self._random.sample(FILES, 2)
            return both, both
        if roll < 0.22:
            return [FORBIDDEN], [FORBIDDEN]
        file = self._file()
        return [file], [file]

    def _file(self) -> str:
        return self._random.choice(FILES)
