"""The warm set of a daemon: watches its file, and has a keeper for each entry of the version in force.

A version with a fault changes nothing: the version before stays in force, and status says why. So does a file
that is missing. A daemon that starts with such a file keeps nothing warm until it is mended, and serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ...checkpoint.layout import is_index
from ...config.values import Locators
from ...errors import InvalidRequestError
from ...sources import parent
from ...system import failure
from ...system.directory import DirectoryEvents
from ...system.log import event
from ..at_start import Run
from ..request import LoadContext
from .features import DISK_PREFIX, WARM_PREFIX, Features
from .keeper import Keeper
from .shared import Shared
from .standing import STATES
from .wishes import MAX_FILE_BYTES, Wish, WishesError, parse

logger = logging.getLogger(__name__)

POLL_SECONDS = 10.0
"""Between two looks at the file where inotify tells nothing: of a network file system, say."""


class WarmSet:
    """`run` it once, on the event loop."""

    def __init__(
        self,
        path: Path,
        context: LoadContext,
        run: Run,
        *,
        stores: Sequence[Locators],
        interval_seconds: float,
        features: Path | None,
        name_tier_files: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        """`run` is what every load and prefetch is run by, `features` the file for node-feature-discovery.
        `name_tier_files` is told which paths the tier is to keep besides those of its flag; None: there is no
        tier."""
        self.path = path
        self.problems: tuple[str, ...] = ()
        """Why the file's latest version is not in force."""
        self._context = context
        self._stores = stores
        self._shared = Shared(context, run, interval_seconds, has_tier=name_tier_files is not None)
        self._name_tier_files = name_tier_files
        self._keepers: dict[str, tuple[Keeper, asyncio.Task[None]]] = {}
        self._order: tuple[str, ...] = ()
        self._raw: bytes | None = None
        self._found: tuple[str, ...] = ()
        """The problems of `_raw`."""
        self._features = Features(features, context, self._labels) if features is not None else None

    @property
    def keepers(self) -> Collection[Keeper]:
        """In the order of the file."""
        return [self._keepers[name][0] for name in self._order]

    def counts(self) -> dict[str, int]:
        """How many entries are in each state."""
        found = Counter(keeper.state for keeper in self.keepers)
        return {state: found[state] for state in STATES}

    async def run(self) -> None:
        """For ever."""
        events = DirectoryEvents(self.path.parent)
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        beside = [asyncio.ensure_future(self._features.run())] if self._features is not None else []

        def hear() -> None:
            events.clear()
            changed.set()

        if events.fileno() >= 0:
            loop.add_reader(events.fileno(), hear)
        try:
            while True:
                changed.clear()
                await self._look(events)
                waiting = asyncio.ensure_future(changed.wait())
                try:
                    await asyncio.wait([waiting], timeout=POLL_SECONDS)
                finally:
                    waiting.cancel()
        finally:
            if events.fileno() >= 0:
                loop.remove_reader(events.fileno())
            events.close()
            tasks = [*beside, *(task for _, task in self._keepers.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ---- the file -------------------------------------------------------------------------------

    async def _look(self, events: DirectoryEvents) -> None:
        """Reads the file, and puts it in force if it is another version without a fault."""
        uid, loop = os.geteuid(), asyncio.get_running_loop()
        try:
            threads = self._context.resolvers((str(self.path),), uid)
            raw = await loop.run_in_executor(threads, _read, self.path, events)
            if raw != self._raw:
                self._raw = raw
                self._found = ()
                cpu_pool = self._context.cpu_pool.of(uid)
                self._reconcile(await loop.run_in_executor(cpu_pool, parse, raw, self._stores))
            problems = self._found
        except WishesError as error:
            problems = self._found = error.problems
        except OSError as error:
            why = error.strerror or str(error)
            problems = (f"it cannot be read ({why}); put it there, or correct --warm-set",)
        except Exception as error:
            problems = (failure.explain(error, f"reading {self.path}").message,)
        if problems and problems != self.problems:
            fields = {"file": str(self.path), "why": "; ".join(problems), "in_force": len(self._order)}
            event(logger, "warm set is broken", fields, level=logging.WARNING)
        self.problems = problems

    def _reconcile(self, wishes: Sequence[Wish]) -> None:
        """What is gone is unpinned first, so that what is new finds its memory."""
        wanted = {wish.name: wish for wish in wishes}
        if self._name_tier_files is not None:
            self._name_tier_files([path for wish in wishes if wish.tier for path in self._paths(wish)])
        same: list[str] = []
        for name, (keeper, task) in list(self._keepers.items()):
            wish = wanted.get(name)
            if wish is not None and replace(wish, pin=keeper.wish.pin) == keeper.wish:
                keeper.change_pin(wish)
                same.append(name)
            else:
                task.cancel()
                keeper.release()
                del self._keepers[name]
        ahead: Keeper | None = None
        for name, wish in wanted.items():
            if name not in self._keepers:
                keeper = Keeper(wish, self._shared, ahead)
                self._keepers[name] = keeper, asyncio.ensure_future(keeper.run())
            ahead = self._keepers[name][0]
        self._order = tuple(wanted)
        event(logger, "warm set in force", {"entries": len(wanted), "new": len(wanted) - len(same)})

    def _paths(self, wish: Wish) -> Iterator[str]:
        """The files and directories of it that are local."""
        for source in wish.sources:
            with contextlib.suppress(InvalidRequestError):  # its keeper tells of it
                path = self._context.catalog.location(source)
                if path.startswith("/"):
                    yield parent(path) if is_index(path.rpartition("/")[2]) else path

    def _labels(self) -> list[str]:
        """For node-feature-discovery."""
        labels = {"warm": WARM_PREFIX, "on_disk": DISK_PREFIX}
        return [
            f"{labels[keeper.state]}{keeper.wish.name}" for keeper in self.keepers if keeper.state in labels
        ]


def _read(path: Path, events: DirectoryEvents) -> bytes:
    """At most one byte more than it may have. Blocks as long as its mount hangs. Raises OSError, and
    WishesError for what is no file."""
    events.watch()  # before it is read: a change while it is read is heard
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise WishesError(["it is a device or a pipe; put a file in its place"])
        return file.read(MAX_FILE_BYTES + 1)
