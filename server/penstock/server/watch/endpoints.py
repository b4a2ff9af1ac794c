"""The answers of the HTTP port: `/metrics`, `/healthz`, `/readyz`, `/status`, and the page that draws it.

Runs in the HTTP thread. Some answers need the main event loop. It is asked one question at a time, however
many clients ask here, and its answer is cached for a moment, so clients cannot keep that loop busy. If it
does not answer in time, metrics show the last known values, with `penstock_stalled`, and `/status` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable
from importlib import resources
from pathlib import PurePath
from typing import Generic, TypeVar

from penstock.v1 import streamer_pb2 as pb
from penstock.v1.plain import to_plain

from .exposition import Exposition, Gauges, content_type_for
from .health import Health
from .http import Answer
from .status import Status

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

GOOD_FOR_SECONDS = 0.1
DEADLINE_SECONDS = 0.5
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class Endpoints:
    """Made on the main event loop; `respond` is for the HTTP thread."""

    def __init__(self, *, status: Status, exposition: Exposition, health: Health) -> None:
        loop = asyncio.get_running_loop()
        self._health = health
        self._exposition = exposition
        self._gauges = _Asked(loop, status.gauges)
        self._status = _Asked(loop, lambda: status.message(None))
        self._last_gauges = Gauges()
        self._rendered: dict[str, tuple[float, bytes]] = {}
        """The last answer by content type, of which there are three, and when it was made."""
        self._page = _page()

    async def respond(self, path: str, accept: str) -> Answer:
        if path == "/healthz":
            return _verdict(self._health.hang)
        if path == "/readyz":
            return _verdict(self._health.reason)
        if path == "/metrics":
            return await self._metrics(accept)
        if path == "/status":
            return await self._tell_status()
        return self._page.get(path) or Answer(404, b"nothing is here\n")

    async def _metrics(self, accept: str) -> Answer:
        content_type = content_type_for(accept)
        when, text = self._rendered.get(content_type, (0.0, b""))
        if time.monotonic() - when > GOOD_FOR_SECONDS:
            self._last_gauges = await self._gauges.get(self._health) or self._last_gauges
            text = self._exposition.render(
                content_type,
                self._last_gauges,
                ready=self._health.ready,
                stalled=self._health.stalled,
                hung={mount.mount_point: mount.threads for mount in self._health.hung_mounts()},
            )
            self._rendered[content_type] = time.monotonic(), text
        return Answer(200, text, content_type)

    async def _tell_status(self) -> Answer:
        content_type = "application/json"
        when, text = self._rendered.get(content_type, (0.0, b""))
        if time.monotonic() - when > GOOD_FOR_SECONDS:
            message: pb.GetStatusResponse | None = await self._status.get(self._health)
            if message is None:
                reason = self._health.hang or "the event loop is busy"
                return Answer(503, json.dumps({"error": reason}).encode(), content_type)
            text = json.dumps(to_plain(message)).encode()
            self._rendered[content_type] = time.monotonic(), text
        return Answer(200, text, content_type)


class _Asked(Generic[_T]):
    """One question to the main event loop. It is asked once, however many clients wait for the answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, question: Callable[[], _T]) -> None:
        self._main_loop = loop
        self._question = question
        self._pending: asyncio.Future[_T | None] | None = None

    async def get(self, health: Health) -> _T | None:
        """The answer; None if the loop did not answer in time. Asks again only after an answer."""
        if self._pending is None:
            here = asyncio.get_running_loop()
            self._pending = here.create_future()
            try:
                self._main_loop.call_soon_threadsafe(self._ask, here, self._pending)
            except RuntimeError:  # closed: the daemon ends
                self._pending.set_result(None)
        pending = self._pending
        deadline = 0.0 if health.loop_stalled else DEADLINE_SECONDS
        await asyncio.wait([pending], timeout=deadline)
        if not pending.done():
            return None
        if self._pending is pending:
            self._pending = None
        return pending.result()

    def _ask(self, loop: asyncio.AbstractEventLoop, pending: asyncio.Future[_T | None]) -> None:
        """On the main event loop."""
        answer = None
        try:
            answer = self._question()
        except Exception:
            logger.exception("status could not be collected")
        with contextlib.suppress(RuntimeError):  # the HTTP thread ended meanwhile
            loop.call_soon_threadsafe(pending.set_result, answer)


def _verdict(trouble: str) -> Answer:
    return Answer(503, f"{trouble}\n".encode()) if trouble else Answer(200, b"ok\n")


def _page() -> dict[str, Answer]:
    """The files of the page by path. They are few and small."""
    answers = {}
    for file in resources.files(__package__).joinpath("page").iterdir():
        content_type = _TYPES.get(PurePath(file.name).suffix)
        if content_type is not None:
            path = "/" if file.name == "index.html" else f"/{file.name}"
            answers[path] = Answer(200, file.read_bytes(), content_type)
    return answers
