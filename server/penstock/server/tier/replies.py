"""The replies of stores to whole loads, kept on the disk for when a store cannot be asked (`--tier-stale`).

They are kept as blocks of objects are: the load's name is the object, and a digest of the replies its
version. So they are bounded, synced and checked in the same way. The version held last is the one that
counts, and when it was held is when the store confirmed it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from ..errors import PenstockError
from ..sources.replies import MAX_REPLIES_BYTES, FileReply, Replies
from .records import Identity
from .source import StoredFile, TieredFile
from .tier import Tier

SILENT_SECONDS = 30.0
"""For so long a store that could not be asked is not asked again for the same checkpoint: each load would
wait for all retries."""
SILENT_NAMES = 1000


class DiskReplies:
    """See `sources.replies.ReplyKeeper`. Asks the disk on the tier's own threads, so a disk that hangs delays
    a load no longer than any read of the tier."""

    def __init__(
        self, tier: Tier, stale_seconds: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`stale_seconds` is for how long replies may be given again."""
        self._clock = clock
        self._tier = tier
        self._stale_seconds = stale_seconds
        self._lock = threading.Lock()
        self._silent: OrderedDict[str, float] = OrderedDict()

    def keep(self, name: str, replies: Replies, uid: int) -> None:
        uri, data = _uri(name), replies.encode()
        with self._lock:
            self._silent.pop(name, None)
        if replies.partial or len(data) > MAX_REPLIES_BYTES:
            self._tier.outdate(uri, uid)
            return
        identity = Identity(uri, hashlib.sha256(data).hexdigest(), len(data))
        self._tier.outdate(uri, uid, but=identity)
        hold = self._tier.hold(identity, uid)
        try:
            missing = hold.missing(0, len(data))
            if missing is not None:
                start, end = missing
                hold.write_copy(start, [memoryview(data)[start:end]])
        finally:
            hold.release()

    def forget(self, name: str, uid: int) -> None:
        self._tier.outdate(_uri(name), uid)

    def find(self, name: str, uid: int) -> tuple[Replies, float] | None:
        found = self._tier.latest(_uri(name), uid)
        if found is None:
            return None
        identity, hold, kept_at = found
        file = TieredFile(StoredFile("tier", identity), self._tier, identity, hold, uid)
        try:
            seconds = time.time() - kept_at
            if not 0 <= seconds <= self._stale_seconds:  # before 0: the clock was set back
                return None
            data = bytearray(identity.size_bytes)
            file.read_into(0, [memoryview(data)])
        except PenstockError:
            return None
        finally:
            file.close()
        replies = Replies.decode(bytes(data))
        if replies is None or not all(map(self._is_latest, replies.files.values())):
            return None
        return replies, seconds

    def is_silent(self, name: str) -> bool:
        with self._lock:
            return self._silent.get(name, 0.0) > self._clock()

    def served(self, name: str) -> None:
        with self._lock:
            if self._silent.get(name, 0.0) <= self._clock():
                self._silent[name] = self._clock() + SILENT_SECONDS
                self._silent.move_to_end(name)
                while len(self._silent) > SILENT_NAMES:
                    self._silent.popitem(last=False)

    def _is_latest(self, file: FileReply) -> bool:
        """No other load was replied another version since."""
        return self._tier.is_latest(Identity(file.uri, file.version, file.size_bytes))


def _uri(name: str) -> str:
    return f"replies:{name}"
