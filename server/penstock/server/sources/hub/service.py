"""Where requests for bytes go: to the address that the Hub gave for the file, which is signed for a while, or
to the Hub itself for small files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...errors import CheckpointChangedError, PenstockError
from ..objects import reach
from ..objects.faults import Transient
from ..objects.memo import Memo
from ..objects.service import Answer, Ask, ObjectState, Page, Signed
from .answers import storage_failure
from .api import HubApi, Target, state_of, until
from .location import Location

REMEMBERED_BYTES = 8 << 20
"""Of all remembered addresses together: some 5000 of the usual length."""
_TARGET_BYTES = 1000
"""What one takes besides its URL."""
_EXPIRED = (400, 401, 403, 404, 410)
"""Statuses with which storage refuses an expired address."""
_File = tuple[str, str, str]


class HubService:
    """Thread-safe."""

    def __init__(self, api: HubApi) -> None:
        self.tls = api.service.tls
        self._api = api
        self._hub = api.service
        self._targets: Memo[_File, Target] = Memo(
            REMEMBERED_BYTES, lambda target: _TARGET_BYTES + len(target.url)
        )

    def sign(self, ask: Ask[Location]) -> Signed:
        """Asks the Hub for the address if none is known. The token goes to the Hub alone."""
        location = ask.location
        target = self._target(location)
        if target.at_hub:
            return self._hub.at_hub(target.url, ask.headers)
        way = location.reach.way(target.url, location.uri)
        return Signed(target.url, self._hub.plain(ask.headers), (), way.public_only)

    def changed(self, ask: Ask[Location], answer: Answer, tried: Sequence[Signed]) -> bool:
        """Whether to ask again: at a new address if the old one expired, once; or at the address of a
        redirect."""
        location, last = ask.location, tried[-1].url
        at_hub = bool(tried[-1].identity)  # where only what the Hub itself leads to is asked
        if answer.status in reach.REDIRECTS and len(tried) <= reach.MAX_REDIRECTS:
            led = reach.redirected(last, answer.headers.get("location", ""))
            if led is not None:
                self._replace(location, last, Target(led, at_hub=at_hub and self._hub.is_hub(led)))
                return True
        if at_hub:
            return self._hub.renewed(answer, tried)
        if answer.status in _EXPIRED:
            self._replace(location, last, None)
            return len(tried) == 1
        return False

    def failure(self, ask: Ask[Location], answer: Answer) -> PenstockError | Transient:
        if ask.location.sha256 and "x-error-code" not in answer.headers:
            return storage_failure(answer, ask.location)
        return self._hub.failure(ask, answer)

    def state(self, location: Location, headers: Mapping[str, str], size_bytes: int) -> ObjectState:
        return state_of(location)

    def page(self, ask: Ask[Location], headers: Mapping[str, str], body: bytes) -> Page:
        return self._hub.page(ask, headers, body)

    def _replace(self, location: Location, url: str, new: Target | None) -> None:
        """Replaces the target that has this URL."""
        for at_hub in (True, False):
            self._targets.replace(
                _file(location), Target(url, at_hub), new, until(new.url) if new is not None else 0.0
            )

    def _target(self, location: Location) -> Target:
        try:
            return self._targets.get(_file(location), lambda: self._api.target(location))
        except CheckpointChangedError:
            self._api.forget(location)
            raise


def _file(location: Location) -> _File:
    return location.repository, location.commit, location.key
