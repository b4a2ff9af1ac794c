"""The gate before gRPC: how many connections a user may have, and how much memory and work they may cause.

gRPC accepts every connection, does not learn the peer's uid, and bounds neither its memory nor its work. So
it listens where nobody else can connect, and every connection to `penstock.sock` passes this gate:

    accept    the connection counts for the uid that the kernel names; one too many is closed at once
    frames    pass one by one (`frame_filter.py`); broken HTTP/2 or a flood ends the connection
    requests  get a header, by which a handler finds its stream here (`claim`)
    messages  pass once their memory is charged to the user's share (`streams.py`)
    answers   pass as they come, no faster than the client takes them

It knows nothing of tokens: a handler checks them, and approves its stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ..system.limits import is_privileged
from ..system.quota import Quota
from .allowance import Allowance
from .passage import WIDE_BYTES, Passage
from .streams import RequestStream
from .unix import Listener, peer

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
"""No more than a twelfth of the descriptors that this process may have, as each connection takes three."""
CONNECTION_BYTES = 32 << 10
"""The cost of a connection to gRPC and the gate before any request: measured, 19 KiB with gRPC 1.85."""
WORK_PER_SECOND = 10_000.0
"""The work that all connections of one user may cause, in frames (`frame_filter.py` has the prices). More
work has to wait. A frame costs about 20 microseconds of one core, so this is a fifth of the core."""
WORK_AT_ONCE = 20_000.0
CONNECTION_WORK = 20
WIDE_CONNECTIONS = 64
"""How many are passed `passage.WIDE_BYTES` of answers at once: 4 MiB together, which count in no user's share
of memory."""
FLUSH_SECONDS = 1.0
"""How long a daemon that stops waits for its clients to receive its last answers."""
IDLE_SECONDS = 60.0
"""A connection that never had a call with a valid token is closed after so long without any call."""
CALLS_TO_TAKE = 16
"""The most calls of one user that were passed on and that gRPC has not given to a handler. gRPC takes the
calls of all users in the order of their arrival, about a thousand a second, and cancels some when a thousand
wait. So the queue has to be here, where the uid of each call is known."""
STARVED_SECONDS = 10.0
"""A message that has waited so long for memory, which other requests of its user hold, is refused."""
SWEEP_SECONDS = 1.0


class Gate:
    """Passes connections from `path` on to gRPC. Lives on the event loop."""

    def __init__(
        self,
        path: Path,
        *,
        memory: Quota,
        allows: Callable[[int], bool],
        on_closed: Callable[[str], None] = lambda reason: None,
        idle_seconds: float = IDLE_SECONDS,
        starved_seconds: float = STARVED_SECONDS,
    ) -> None:
        """`memory` has the bytes that requests may hold, `allows` says whether a uid may connect at all.
        `on_closed` gets the reason for which the gate closed a connection: one of
        `counts.CLOSED_REASONS`."""
        self._path = path
        self._memory = memory
        self._allows = allows
        self._on_closed = on_closed
        self._idle_seconds = idle_seconds
        self._starved_seconds = starved_seconds
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._connections = Quota(max(2, min(MAX_CONNECTIONS, files // 12)))
        self._wide = Quota(WIDE_CONNECTIONS)
        self._passages: dict[Passage, None] = {}
        self._work: dict[int, Allowance] = {}
        self._streams: dict[str, RequestStream] = {}
        """The streams that no handler has claimed, by key."""
        self._to_take: Counter[int] = Counter()
        """By uid: how many of these streams each user has."""
        self._queues: dict[int, dict[Passage, None]] = {}
        """By uid: the connections that wait to pass on a call, in order."""
        self._starved: dict[Passage, float] = {}
        """The connections that wait for memory, and since when; the longest first."""
        self._retrying: asyncio.Handle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._listener: Listener | None = None
        self._inner = ""
        self._read_buffer = memoryview(bytearray(WIDE_BYTES))
        """Shared by all connections: bytes are taken out of it before the event loop goes on."""

    async def start(self, inner: str) -> None:
        """Binds; `inner` is the path where gRPC listens. The caller holds the directory's lock."""
        self._inner = inner
        self._listener = Listener(self._path, socket.SOCK_STREAM, self._begin)
        self._start_task(self._sweep())

    async def stop(self) -> None:
        """Ends every connection, after gRPC's last bytes. To be called when gRPC has stopped."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._empty.wait(), FLUSH_SECONDS)
        for passage in list(self._passages):
            passage.abort()
        for task in self._tasks:
            task.cancel()

    def claim(self, key: str) -> RequestStream | None:
        """The stream with this key, which belongs to the caller from now on. None: no such key, or it was
        claimed before."""
        stream = self._streams.get(key)
        if stream is not None:
            self._taken(stream)
            stream.take_up()
        return stream

    # ---- for passages ---------------------------------------------------------------------------

    @property
    def read_buffer(self) -> memoryview:
        return self._read_buffer

    def may_open(self, passage: Passage) -> bool:
        """Whether the connection may pass on a call now. If not, `passage.take_turn` is called when it
        may."""
        if self._to_take[passage.uid] < CALLS_TO_TAKE:
            return True
        self._queues.setdefault(passage.uid, {})[passage] = None
        return False

    @property
    def wide_connections(self) -> int:
        """How many may be passed answers in large pieces."""
        return self._wide.used

    def widen(self, passage: Passage) -> bool:
        """Whether the connection may read answers in large pieces from now on."""
        return self._wide.take(passage.uid)

    def open_stream(self, stream: RequestStream) -> None:
        self._streams[stream.key] = stream
        self._to_take[stream.uid] += 1

    def end_stream(self, stream: RequestStream) -> None:
        stream.end()
        if stream.key in self._streams:
            self._taken(stream)

    def starve(self, passage: Passage) -> None:
        """The connection waits for memory. It is woken when some is given back."""
        self._starved.setdefault(passage, asyncio.get_running_loop().time())

    def memory_freed(self) -> None:
        if self._starved and self._retrying is None:
            self._retrying = asyncio.get_running_loop().call_soon(self._retry)

    def gone(self, passage: Passage, reason: str) -> None:
        """The connection has ended. `reason` says why the gate ended it; empty if it did not."""
        del self._passages[passage]
        self._starved.pop(passage, None)
        self._queues.get(passage.uid, {}).pop(passage, None)
        self._connections.release(passage.uid)
        if passage.wide:
            self._wide.release(passage.uid)
        self._memory.release(passage.uid, CONNECTION_BYTES)
        self.memory_freed()
        if reason:
            self._on_closed(reason)
        if not self._passages:
            self._empty.set()

    # ---- inside ---------------------------------------------------------------------------------

    def _begin(self, connection: socket.socket) -> None:
        _, uid = peer(connection)
        if not self._admits(uid):
            logger.debug("uid %d was refused: it has %d connections", uid, self._connections.used_by(uid))
            connection.close()
            self._on_closed("refused")
            return
        passage = Passage(self, uid, self._memory, self._work[uid])
        self._passages[passage] = None
        self._empty.clear()
        self._start_task(passage.run(connection, self._inner))

    def _admits(self, uid: int) -> bool:
        """Takes the quotas that a connection needs; whether it got them."""
        if not is_privileged(uid) and not self._allows(uid):
            return False
        now = asyncio.get_running_loop().time()
        work = self._work.setdefault(uid, Allowance(WORK_PER_SECOND, WORK_AT_ONCE, now))
        if work.wait_seconds(now) or not self._connections.take(uid):
            return False
        if not self._memory.take(uid, CONNECTION_BYTES):
            self._connections.release(uid)
            return False
        work.spend(CONNECTION_WORK, now)
        return True

    def _taken(self, stream: RequestStream) -> None:
        """The call does not wait in gRPC any more, so the next call of its user may pass."""
        del self._streams[stream.key]
        uid = stream.uid
        self._to_take[uid] -= 1
        queue = self._queues.get(uid, {})
        while queue and self._to_take[uid] < CALLS_TO_TAKE:
            passage = next(iter(queue))
            del queue[passage]
            passage.take_turn()
        if not queue:
            self._queues.pop(uid, None)
        if not self._to_take[uid]:
            del self._to_take[uid]

    def _retry(self) -> None:
        self._retrying = None
        for passage in list(self._starved):
            if passage.retry():
                self._starved.pop(passage, None)

    async def _sweep(self) -> None:
        """Ends connections and messages that wait too long."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = loop.time()
            for passage, since in list(self._starved.items()):
                if now - since > self._starved_seconds:
                    del self._starved[passage]
                    passage.refuse_starved()
            for passage in [each for each in self._passages if each.idle_since < now - self._idle_seconds]:
                passage.drop_idle()
            used = {passage.uid for passage in self._passages}
            for uid in [uid for uid, work in self._work.items() if uid not in used and work.is_full(now)]:
                del self._work[uid]

    def _start_task(self, run: asyncio._CoroutineLike[None]) -> None:
        task = asyncio.get_running_loop().create_task(run)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
