"""Objects in S3 and in what calls itself compatible.

location    s3:// URIs, and who may read them (pure)
faults      which failures are asked again, after how long, and what the others mean (pure)
account     credentials, endpoints, signatures, what lists say: boto3's part, imported when first needed
connection  keep-alive HTTP connections whose bytes go into the caller's memory
proxies     the proxies between, and what it means when they refuse
response    answers that must come within a time
requests    all of these, put together to requests that are answered or fail for good
listing     what lies below a prefix
object      one version of one object as a SourceFile
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor

from ...errors import AccessDeniedError, CheckpointNotFoundError, SourceUnavailableError
from .. import Access
from .listing import list_names
from .location import Location, check_access, parse
from .object import S3File, ask_first, ask_state
from .requests import Requests
from .settings import S3Settings

__all__ = ["S3File", "S3Settings", "S3Source"]

OBJECT_SUFFIX = ".safetensors"
"""What ends so is taken for an object; anything else may be the prefix of several."""
KNOWN_OBJECTS = 10_000


class S3Source:
    """`s3://` URIs. Makes no connection and reads no configuration before the first of them."""

    kind = "s3"
    descriptors_per_file = 0  # connections are kept by `S3Settings.connections`

    def __init__(
        self, settings: S3Settings, workers: Callable[[int], Executor], on_retry: Callable[[str], None]
    ) -> None:
        """`workers` gives, for a uid, what opens objects and reads their headers. `on_retry` is told the
        reason of whatever is tried again, by one thread at a time."""
        # Requests end by themselves, when `retries` of them have failed in a row.
        self.patience_seconds = max(600.0, 2 * settings.retries * settings.timeout_seconds)
        self._workers = workers
        self._on_retry = on_retry
        self._settings = settings
        self._lock = threading.Lock()
        self._made: Requests | None = None
        self._known: OrderedDict[str, None] = OrderedDict()
        """Objects opened lately: of these the headers are probably kept, and a HEAD request is enough."""

    def workers(self, location: str, uid: int) -> Executor:
        return self._workers(uid)

    def location(self, source: str) -> str:
        return parse(source).uri

    def name(self, location: str) -> str:
        return parse(location).name

    def list(self, location: str, access: Access) -> list[str] | None:
        named = parse(location)
        check_access(named, access)
        if named.version_id is not None or named.name.endswith(OBJECT_SUFFIX):
            return None
        is_directory = not named.key or named.key.endswith("/")
        directory = named if is_directory else Location(named.bucket, named.key + "/")
        names = [name for name in list_names(self._requests(), directory) if name]
        return names if names or is_directory else None

    def dangles(self, location: str, access: Access) -> bool:
        return False

    def open(self, location: str, access: Access) -> S3File:
        named = parse(location)
        check_access(named, access)
        if not named.key:
            raise CheckpointNotFoundError(
                f"{location} names a bucket and no object in it; add a key", file=location
            )
        requests = self._requests()
        if self._was_known(location):
            try:
                state = requests.patiently(named, lambda: ask_state(requests, named))
                return S3File(requests, named, state, b"")
            except (AccessDeniedError, SourceUnavailableError):
                """The answer to a HEAD has no body that would say why: ask once more for one that has."""
        state, first = requests.patiently(named, lambda: ask_first(requests, named))
        return S3File(requests, named, state, first)

    def stop(self) -> None:
        """Ends what is under way, with an error."""
        with self._lock:
            if self._made is not None:
                self._made.stop()

    def _requests(self) -> Requests:
        from .account import Account

        with self._lock:
            if self._made is None:
                self._made = Requests(Account(self._settings), self._settings, self._on_retry)
            return self._made

    def _was_known(self, location: str) -> bool:
        with self._lock:
            known = location in self._known
            self._known[location] = None
            self._known.move_to_end(location)
            if len(self._known) > KNOWN_OBJECTS:
                self._known.popitem(last=False)
            return known
