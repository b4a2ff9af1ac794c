"""Addresses, signed headers, versions and lists of GCS. Objects come from its XML interface, where a path is
a bucket and a key. Lists come from its JSON interface, which can return some fields alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote, urlencode

import msgspec

from ...errors import PenstockError, SourceUnavailableError
from ..checksums import CRC32C, Checksum, crc_in_base64
from ..objects.faults import Transient
from ..objects.service import Answer, Ask, Entry, ObjectState, Page, Signed
from ..objects.tokens import Tokens
from ..objects.trust import tls_context
from .answers import failure, said
from .location import Location
from .settings import GcsSettings

MAX_RENEWALS = 2
"""How often one request may get new tokens: a store may call all of them expired."""
PAGE_NAMES = 1000
MAX_PAGE_OBJECTS = 50_000
"""Most objects of JSON on a page, as braces count, of which names may have some."""
_KIND = "storage#objects"
_FIELDS = "kind,items(name,size,generation),nextPageToken"
_GENERATION = re.compile(r"[0-9]{1,19}", re.ASCII)
_CRC32C = re.compile(r"(?:^|,)\s*crc32c=([A-Za-z0-9+/]{6}==)\s*(?:,|$)", re.ASCII)


class _Item(msgspec.Struct):
    name: str
    size: str = ""
    generation: str = ""


class _List(msgspec.Struct):
    kind: str
    items: list[_Item] = []
    nextPageToken: str = ""


class Account:
    """Methods block, since tokens come over a network."""

    def __init__(self, settings: GcsSettings, timeout_seconds: float) -> None:
        """Raises SourceUnavailableError if google-auth is missing, or a CA bundle cannot be used."""
        self._endpoint = settings.endpoint
        self.tls = tls_context("GCS")
        self._tokens: Tokens | None = None
        if not settings.anonymous:
            from .credentials import GoogleCredentials

            self._credentials = GoogleCredentials(settings.credential_file, timeout_seconds)
            self._tokens = Tokens(self._credentials.fetch)

    def sign(self, ask: Ask[Location]) -> Signed:
        headers = dict(ask.headers)
        if not ask.is_list:
            # Otherwise objects stored with gzip would be unpacked on the way, and ranges ignored.
            headers["Accept-Encoding"] = "gzip"
        token = ""
        if self._tokens is not None:
            token = self._tokens.get()
            headers["Authorization"] = f"Bearer {token}"
            if self._credentials.quota_project:
                headers["x-goog-user-project"] = self._credentials.quota_project
        url = self._list_url(ask) if ask.is_list else self._object_url(ask.location)
        return Signed(url, headers, (token,))

    def changed(self, ask: Ask[Location], answer: Answer, tried: Sequence[Signed]) -> bool:
        """Whether to ask again with a new token, as the old one was refused."""
        if answer.status != 401 or self._tokens is None or len(tried) > MAX_RENEWALS:
            return False
        return self._tokens.renewed(tried[-1].identity[0])

    def failure(self, ask: Ask[Location], answer: Answer) -> PenstockError | Transient:
        anonymous = self._tokens is None
        return failure(said(answer), ask.location, listing=ask.is_list, anonymous=anonymous)

    def state(self, location: Location, headers: Mapping[str, str], size_bytes: int) -> ObjectState:
        generation = headers.get("x-goog-generation", "")
        if not _GENERATION.fullmatch(generation):
            raise SourceUnavailableError(
                f"{location.uri}: the store gives it no generation, so that a change while it is read could "
                "not be noticed; use a store that does",
                file=location.uri,
            )
        stored = headers.get("x-goog-stored-content-encoding", headers.get("content-encoding", ""))
        if stored not in ("", "identity"):
            raise SourceUnavailableError(
                f"{location.uri}: it is stored with a Content-Encoding of its own ({stored[:20]!r}), so that "
                "its bytes are no file that can be read; upload it again without (gcloud storage cp, without "
                "--gzip-in-flight and --gzip-local)",
                file=location.uri,
            )
        return ObjectState(
            size_bytes,
            identity={"x-goog-generation": generation},
            conditions={"x-goog-if-generation-match": generation},
            listed=generation,
            checksums=_checksums(headers.get("x-goog-hash", "")),
        )

    def page(self, ask: Ask[Location], headers: Mapping[str, str], body: bytes) -> Page:
        if body.count(b"{") > MAX_PAGE_OBJECTS:
            raise Transient("bad_response", "a page of the list has too many names")
        try:
            page = msgspec.json.decode(body, type=_List)
            if page.kind != _KIND:
                raise msgspec.ValidationError("another kind of answer")
            entries = [Entry(item.name, _size_bytes(item.size), item.generation) for item in page.items]
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise Transient("bad_response", "HTTP 200 and not the list that was asked for") from error
        return Page(entries, page.nextPageToken)

    def _object_url(self, location: Location) -> str:
        url = f"{self._endpoint}/{location.bucket}/{quote(location.key, safe='/~')}"
        return url if location.generation is None else f"{url}?generation={location.generation}"

    def _list_url(self, ask: Ask[Location]) -> str:
        parameters = {"prefix": ask.location.key, "fields": _FIELDS, "maxResults": str(PAGE_NAMES)}
        if not ask.deep:
            parameters["delimiter"] = "/"
        if ask.page:
            parameters["pageToken"] = ask.page
        return (
            f"{self._endpoint}/storage/v1/b/{ask.location.bucket}/o?{urlencode(parameters, quote_via=quote)}"
        )


def _size_bytes(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def _checksums(hashes: str) -> tuple[Checksum, ...]:
    """The checksum of the whole object in `X-Goog-Hash`. Its MD5 is not used: it is absent if the object was
    composed of others, and costs five times as much to compute."""
    match = _CRC32C.search(hashes)
    checksum = None if match is None else crc_in_base64(CRC32C, match[1])
    return () if checksum is None else (checksum,)
