"""Questions to the Hub: which commit a revision is, which files a commit has, and where the bytes of a file
are. The Hub limits the number of requests. So its answers are remembered for as long as they are valid, and
nothing is asked while it demands a delay."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import parse_qs, quote, urlsplit

from ...errors import PenstockError
from ...system.version import distribution_version
from ..looking import ListingCost
from ..objects import reach
from ..objects.faults import Transient
from ..objects.listing import list_tree
from ..objects.memo import Memo
from ..objects.redirects import Redirects
from ..objects.requests import Requests
from ..objects.service import Answer, Ask, ObjectSettings, ObjectState, Page, Signed
from ..objects.trust import tls_context
from . import tree
from .answers import failure, other_content
from .location import Location
from .settings import HubSettings
from .tree import HubFile, Tree

MAX_INFO_BYTES = 8 << 20
"""Most bytes of an answer: some mirrors send all they know about a repository."""
REMEMBERED_BYTES = 24 << 20
"""Most bytes of all remembered trees together."""
ANSWERS_AT_ONCE = 2
"""Most answers that are held in memory at a time."""
ADDRESS_SECONDS = 3000.0
"""How long an address is valid if it does not say so itself: the Hub signs for an hour."""
_FOR_EVER = float("inf")


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask for the bytes of a file."""

    url: str
    at_hub: bool
    """Whether this is the Hub itself. Only the Hub gets the token."""


class HubApi:
    """Thread-safe; methods block."""

    def __init__(
        self, settings: HubSettings, of_objects: ObjectSettings, on_retry: Callable[[str], None]
    ) -> None:
        """Raises SourceUnavailableError."""
        self.service = ApiService(settings)
        self._requests: Requests[Location] = Requests(self.service, of_objects, on_retry)
        self._trees: Memo[tuple[str, str], Tree] = Memo(REMEMBERED_BYTES, tree.weight)
        self._answers = threading.BoundedSemaphore(ANSWERS_AT_ONCE)

    def commit(self, location: Location) -> str:
        """The commit that its revision is at now. Raises PenstockError."""
        return self._requests.patiently(location, lambda: self._ask_commit(location), doing="asking for it")

    def tree(self, location: Location) -> Tree:
        """The tree of its commit. Raises PenstockError."""
        key = location.repository, location.commit
        return self._trees.get(key, lambda: (self._list(replace(location, key="")), _FOR_EVER))

    def target(self, location: Location) -> tuple[Target, float]:
        """Where a file of the tree is, and until when, by the monotonic clock. Asks once. Raises Transient
        and PenstockError."""
        at = location
        for _ in range(reach.MAX_REDIRECTS + 1):
            url = at.url or self.service.resolve_url(location)
            with self._requests.send(Ask("HEAD", at, {}), ok=(200, *reach.REDIRECTS)) as exchange:
                exchange.finish()
                _check_content(location, exchange.headers)
                if exchange.status == 200:
                    return Target(url, at_hub=True), _FOR_EVER
                led = reach.redirected(url, exchange.headers.get("location", ""))
            if led is None:
                raise Transient("bad_response", "the Hub leads to no URL that can be asked for")
            if not self.service.is_hub(led):
                return Target(led, at_hub=False), until(led)
            at = replace(location, url=led)
        raise Transient("bad_response", "the Hub leads on and on")

    def forget(self, location: Location) -> None:
        """Forgets what is known of its commit, which no longer exists."""
        self._trees.forget((location.repository, location.commit))

    def stop(self) -> None:
        self._requests.stop()

    def _ask_commit(self, location: Location) -> str:
        with self._answers, self._requests.send(Ask("GET", location, {}), ok=(200,)) as exchange:
            return tree.commit(exchange.whole(MAX_INFO_BYTES))

    def _list(self, top: Location) -> Tree:
        files: dict[str, HubFile] = {}
        left_bytes = tree.MAX_NAMES_BYTES
        with self._answers:
            for listed in list_tree(self._requests, top, lambda name: True, ListingCost()):
                files[listed.name] = HubFile(listed.size_bytes, listed.version.partition(":")[0])
                left_bytes -= len(listed.name.encode(errors="replace"))
                if len(files) > tree.MAX_FILES or left_bytes < 0:
                    raise tree.too_many(top)
        return files


class ApiService:
    """Requests to the Hub's own addresses. Thread-safe."""

    def __init__(self, settings: HubSettings) -> None:
        """Raises SourceUnavailableError."""
        self.tls = tls_context("hf://")
        self.settings = settings
        self.host = urlsplit(settings.endpoint).netloc
        self._origin = reach.origin(settings.endpoint)
        self._agent = f"penstock/{distribution_version()}"
        self._redirects = Redirects()
        self._resume_at = 0.0

    def is_hub(self, url: str) -> bool:
        return reach.origin(url) == self._origin

    def resolve_url(self, location: Location) -> str:
        path = f"{location.repository}/resolve/{location.commit}/{quote(location.key, safe='/')}"
        return f"{self.settings.endpoint}/{path}"

    def at_hub(self, url: str, headers: Mapping[str, str]) -> Signed:
        """A request to the Hub itself. Raises Transient while the Hub demands a delay."""
        wait_seconds = self._resume_at - time.monotonic()
        if wait_seconds > 0:
            raise Transient("throttled", "the Hub has asked to wait", retry_after_seconds=wait_seconds)
        token = self.settings.current_token()
        bearer = {"Authorization": f"Bearer {token}"} if token else {}
        return Signed(url, self.plain(headers) | bearer, (token,))

    def plain(self, headers: Mapping[str, str]) -> dict[str, str]:
        return {**headers, "Accept-Encoding": "identity", "User-Agent": self._agent}

    # ---- what the engine asks --------------------------------------------------------------------

    def sign(self, ask: Ask[Location]) -> Signed:
        url = self._url(ask)
        return self.at_hub(self._redirects.get(url) or url, ask.headers)

    def changed(self, ask: Ask[Location], answer: Answer, tried: Sequence[Signed]) -> bool:
        """Whether to ask again: under the repository's new name if it was renamed, or with a token that was
        renewed meanwhile."""
        if answer.status in reach.REDIRECTS and len(tried) <= reach.MAX_REDIRECTS:
            led = reach.redirected(tried[-1].url, answer.headers.get("location", ""))
            if led is not None and self.is_hub(led):
                self._redirects.lead(self._url(ask), led)
                return True
        return self.renewed(answer, tried)

    def renewed(self, answer: Answer, tried: Sequence[Signed]) -> bool:
        """Whether there is another token than the refused one. Once for each request."""
        told = [signed.identity for signed in tried if signed.identity]
        return answer.status in (401, 403) and len(told) == 1 and told[0] != (self.settings.current_token(),)

    def failure(self, ask: Ask[Location], answer: Answer) -> PenstockError | Transient:
        has_token = bool(self.settings.current_token())
        fault = failure(answer, ask.location, self.host, has_token=has_token)
        if isinstance(fault, Transient) and fault.reason == "throttled":
            self._resume_at = time.monotonic() + fault.retry_after_seconds
        return fault

    def state(self, location: Location, headers: Mapping[str, str], size_bytes: int) -> ObjectState:
        """The state of a file, from the tree: the files of a commit never change."""
        return state_of(location)

    def page(self, ask: Ask[Location], headers: Mapping[str, str], body: bytes) -> Page:
        found = tree.page(body, headers)
        if not found.next:
            return found
        following = reach.redirected(self._url(ask), found.next)
        if following is None or not self.is_hub(following):
            raise Transient("bad_response", "the list goes on where the Hub is not")
        return Page(found.entries, following)

    def _url(self, ask: Ask[Location]) -> str:
        location = ask.location
        if location.url:
            return location.url
        if ask.method == "HEAD":
            return self.resolve_url(location)
        about = f"{self.settings.endpoint}/api/models/{location.repository}"
        if ask.page is not None:
            return ask.page or f"{about}/tree/{location.commit}?recursive=true&expand=false"
        return f"{about}/revision/{quote(location.wanted_revision, safe='')}?expand=sha"


def state_of(location: Location) -> ObjectState:
    return ObjectState(
        location.size_bytes,
        {"content": location.content},
        {},
        listed=location.content,
        checksums=location.checksums,
    )


def _check_content(location: Location, headers: Mapping[str, str]) -> None:
    """Checks that an answer about a file agrees with the tree. Fields that it lacks are not checked. Raises
    CheckpointChangedError."""
    said = (headers.get("x-linked-etag") or headers.get("etag", "")).removeprefix("W/").strip('"')
    other_hash = len(said) == len(location.content) and said != location.content and said.isalnum()
    size = headers.get("x-linked-size", "")
    other_size = size.isdecimal() and int(size[:19]) != location.size_bytes
    if other_hash or other_size or headers.get("x-repo-commit", location.commit) != location.commit:
        raise other_content(location)


def until(url: str) -> float:
    """When a signed address expires, by the monotonic clock, less a margin. If its times make no sense, as
    clocks differ, the Hub's usual time is taken."""
    query = parse_qs(urlsplit(url).query)
    at, after = query.get("Expires", [""])[0], query.get("X-Amz-Expires", [""])[0]
    seconds = 0.0
    if at.isdecimal():
        seconds = int(at[:12]) - time.time()
    elif after.isdecimal():
        seconds = float(after[:9])
    if not 0 < seconds < ADDRESS_SECONDS:
        seconds = ADDRESS_SECONDS
    return time.monotonic() + seconds - min(60.0, seconds / 4)
