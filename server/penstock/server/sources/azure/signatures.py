"""The kinds of credentials of an account, and how they sign requests."""

from __future__ import annotations

import base64
import binascii
import email.utils
import hashlib
import hmac
from collections.abc import Mapping
from typing import Protocol
from urllib.parse import parse_qsl, urlsplit

from ...errors import AccessDeniedError
from ..objects.service import Signed
from ..objects.tokens import Tokens
from .settings import ACCOUNT_KEY, CONNECTION_STRING

_SIGNED_HEADERS = (
    "content-encoding",
    "content-language",
    "content-length",
    "content-md5",
    "content-type",
    "date",
    "if-modified-since",
    "if-match",
    "if-none-match",
    "if-unmodified-since",
    "range",
)
"""The headers in the order in which Shared Key signs their values."""


class Credential(Protocol):
    """Signs requests. Thread-safe."""

    remedy: str
    """The remedy if a store does not know who asks."""

    def sign(self, method: str, url: str, headers: Mapping[str, str]) -> Signed:
        """Raises PenstockError and Transient."""

    def renewed(self, refused: Signed) -> bool:
        """Whether there is now another credential than the one that a store refused."""


class Anonymous:
    remedy = "penstockd asks without credentials; give it some, or leave out --azure-anonymous"

    def sign(self, method: str, url: str, headers: Mapping[str, str]) -> Signed:
        return Signed(url, headers)

    def renewed(self, refused: Signed) -> bool:
        return False


class SharedAccessSignature:
    """A query that is a secret: the URL goes to the store and nowhere else."""

    remedy = "check that the SAS of penstockd has not ended, and that it allows to read and to list"

    def __init__(self, sas: str) -> None:
        self._sas = sas

    def sign(self, method: str, url: str, headers: Mapping[str, str]) -> Signed:
        return Signed(f"{url}{'&' if '?' in url else '?'}{self._sas}", headers)

    def renewed(self, refused: Signed) -> bool:
        return False


class SharedKey:
    """The key of an account, which gives access to all of it."""

    remedy = "check the account key of penstockd, and this node's clock (NTP)"

    def __init__(self, account: str, key: str) -> None:
        """Raises AccessDeniedError."""
        self._account = account
        try:
            self._key = base64.b64decode(key, validate=True)
        except (binascii.Error, ValueError):
            raise AccessDeniedError(
                f"Azure: the account key in {ACCOUNT_KEY} or {CONNECTION_STRING} is no Base64; copy it again"
            ) from None

    def sign(self, method: str, url: str, headers: Mapping[str, str]) -> Signed:
        sent = {**headers, "x-ms-date": email.utils.formatdate(usegmt=True)}
        text = self._string_to_sign(method, url, sent)
        digest = hmac.digest(self._key, text.encode(), hashlib.sha256)
        sent["Authorization"] = f"SharedKey {self._account}:{base64.b64encode(digest).decode()}"
        return Signed(url, sent)

    def renewed(self, refused: Signed) -> bool:
        return False

    def _string_to_sign(self, method: str, url: str, headers: Mapping[str, str]) -> str:
        values = {name.lower(): value.strip() for name, value in headers.items()}
        parts = urlsplit(url)
        queries: dict[str, list[str]] = {}
        for name, value in parse_qsl(parts.query, keep_blank_values=True):
            queries.setdefault(name.lower(), []).append(value)
        return "\n".join(
            [
                method,
                *(values.get(name, "") for name in _SIGNED_HEADERS),
                *(f"{name}:{values[name]}" for name in sorted(values) if name.startswith("x-ms-")),
                f"/{self._account}{parts.path or '/'}",
                *(f"{name}:{','.join(sorted(queries[name]))}" for name in sorted(queries)),
            ]
        )


class Bearer:
    """Tokens of an identity."""

    remedy = "check the identity of penstockd, and the tenant that it is in"

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def sign(self, method: str, url: str, headers: Mapping[str, str]) -> Signed:
        token = self._tokens.get()
        return Signed(url, {**headers, "Authorization": f"Bearer {token}"}, (token,))

    def renewed(self, refused: Signed) -> bool:
        return self._tokens.renewed(refused.identity[0])
