"""Addresses and versions of Azure's blobs, and which credentials belong to which account."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from urllib.parse import quote, urlencode

from ...errors import InvalidRequestError, PenstockError, SourceUnavailableError
from ..objects.faults import Transient
from ..objects.service import Answer, Ask, ObjectState, Page, Signed
from ..objects.tokens import Tokens
from ..objects.trust import tls_context
from .answers import failure, said
from .listing import parse_page
from .location import Location
from .settings import AzureSettings, configured
from .signatures import Anonymous, Bearer, Credential, SharedAccessSignature, SharedKey

API_VERSION = "2023-11-03"
MAX_RENEWALS = 2
"""How often one request may get new tokens: a store may call all of them expired."""
PAGE_NAMES = 1000
"""Blobs on a page of a list. With up to 8 KiB of metadata each, they fit into the bound of a page."""


class Account:
    """Methods block, since tokens come over a network."""

    def __init__(self, settings: AzureSettings, timeout_seconds: float) -> None:
        """Raises PenstockError."""
        self._timeout_seconds = timeout_seconds
        self.tls = tls_context("Azure")
        self._configured = configured(settings, os.environ)
        self._lock = threading.Lock()
        self._identity: Credential | None = None
        """azure-identity's credentials, made when they are first needed."""
        self._own: Credential | None = None
        """The credential of the configured account alone."""
        if settings.anonymous:
            self._own = self._identity = Anonymous()
        elif self._configured.key:
            self._own = SharedKey(self._configured.account, self._configured.key)
        elif self._configured.sas:
            self._own = SharedAccessSignature(self._configured.sas)

    def sign(self, ask: Ask[Location]) -> Signed:
        headers = {"x-ms-version": API_VERSION, **ask.headers}
        url = self._url(ask)  # first: without an account no token is needed
        return self._credential(ask.location).sign(ask.method, url, headers)

    def changed(self, ask: Ask[Location], answer: Answer, tried: Sequence[Signed]) -> bool:
        """Whether to ask again with a new token, as the old one was refused."""
        if answer.status != 401 or len(tried) > MAX_RENEWALS:
            return False
        return self._credential(ask.location).renewed(tried[-1])

    def failure(self, ask: Ask[Location], answer: Answer) -> PenstockError | Transient:
        unknown = self._credential(ask.location).remedy
        return failure(said(answer), ask.location, listing=ask.is_list, unknown=unknown)

    def state(self, location: Location, headers: Mapping[str, str], size_bytes: int) -> ObjectState:
        etag = headers.get("etag", "")
        if not etag or etag.startswith("W/"):  # a weak one never matches (RFC 9110)
            raise SourceUnavailableError(
                f"{location.uri}: the store gives it no strong ETag, so that a change while it is read could "
                "not be noticed; use a store that does",
                file=location.uri,
            )
        return ObjectState(size_bytes, {"etag": etag}, {"If-Match": etag}, listed=etag.strip('"'))

    def page(self, ask: Ask[Location], headers: Mapping[str, str], body: bytes) -> Page:
        return parse_page(body)

    def _url(self, ask: Ask[Location]) -> str:
        location = ask.location
        container = f"{self._endpoint(location)}/{location.container}"
        if not ask.is_list:
            return f"{container}/{quote(location.key, safe='/~')}"
        parameters = {
            "restype": "container",
            "comp": "list",
            "include": "metadata",  # shows which blobs are directories
            "maxresults": str(PAGE_NAMES),
            "prefix": location.key,
        }
        if not ask.deep:
            parameters["delimiter"] = "/"
        if ask.page:
            parameters["marker"] = ask.page
        return f"{container}?{urlencode(parameters, quote_via=quote)}"

    def _endpoint(self, location: Location) -> str:
        """Raises InvalidRequestError."""
        if location.host not in ("", self._configured.host):
            return f"https://{location.host.replace('.dfs.', '.blob.', 1)}"
        if not self._configured.endpoint:
            raise InvalidRequestError(
                f"sources: {location.uri[:200]!r} is in no account, as penstockd is configured for none; set "
                "AZURE_STORAGE_ACCOUNT_NAME where it runs, or write "
                "abfss://container@account.dfs.core.windows.net/key"
            )
        return self._configured.endpoint

    def _credential(self, location: Location) -> Credential:
        """Raises PenstockError."""
        if self._own is not None and location.host in ("", self._configured.host):
            return self._own
        with self._lock:
            if self._identity is None:
                from .identity import AzureIdentity

                self._identity = Bearer(Tokens(AzureIdentity(self._timeout_seconds).fetch))
            return self._identity
