"""Whether a request is signed as S3 wants it: Signature Version 4, recomputed from what came on the wire.

Both ways to sign are known: an Authorization header, and the query of a presigned URL. A fault for the proxy,
which passes on what is signed by a key that it was told, and answers as S3 does what is not.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

from .faults import error_answer
from .proxy import Exchange, Request

_PRESIGNED = "X-Amz-Signature"


@dataclass
class Gatekeeper:
    """Knows keys; a fault for every request (`proxy.on(…, gatekeeper, times=None)`)."""

    keys: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """Access key to secret and session token."""
    expired: set[str] = field(default_factory=set)
    """Keys, still signing rightly, whose token is answered with ExpiredToken."""
    passed: dict[str, int] = field(default_factory=dict)
    """Access key to the number of requests that were let through."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, exchange: Exchange) -> None:
        key, complaint = self.judge(exchange.request)
        if complaint is not None:
            exchange.send(error_answer(400 if complaint == "ExpiredToken" else 403, complaint))
            return
        with self._lock:
            self.passed[key] = self.passed.get(key, 0) + 1
        exchange.pass_on()

    def judge(self, request: Request) -> tuple[str, str | None]:
        """The access key, and the code of the error; None where nothing is wrong."""
        signed = _Signed.read(request)
        if signed is None:
            return "", "AccessDenied"
        if signed.access_key not in self.keys:
            return signed.access_key, "InvalidAccessKeyId"
        secret, token = self.keys[signed.access_key]
        if signed.token != token:
            return signed.access_key, "InvalidToken"
        if signed.access_key in self.expired:
            return signed.access_key, "ExpiredToken"
        if signed.signature != signed.recompute(request, secret):
            return signed.access_key, "SignatureDoesNotMatch"
        return signed.access_key, None


@dataclass(frozen=True, slots=True)
class _Signed:
    access_key: str
    region: str
    date: str
    signed_headers: list[str]
    signature: str
    token: str | None
    presigned: bool

    @classmethod
    def read(cls, request: Request) -> _Signed | None:
        authorization = request.headers.get("Authorization", "")
        if _PRESIGNED in request.query:
            query = request.query
            credential, headers = query["X-Amz-Credential"], query["X-Amz-SignedHeaders"]
            date, token, signature = query["X-Amz-Date"], query.get("X-Amz-Security-Token"), query[_PRESIGNED]
        elif authorization.startswith("AWS4-HMAC-SHA256 "):
            fields = dict(part.strip().split("=", 1) for part in authorization.split(" ", 1)[1].split(","))
            credential, headers = fields["Credential"], fields["SignedHeaders"]
            signature, date = fields["Signature"], request.headers["X-Amz-Date"]
            token = request.headers.get("X-Amz-Security-Token")
        else:
            return None
        access_key, _, region, *_ = credential.split("/")
        presigned = _PRESIGNED in request.query
        return cls(access_key, region, date, headers.split(";"), signature, token, presigned)

    def recompute(self, request: Request, secret: str) -> str:
        path, _, query = request.target.partition("?")
        pairs = [pair.partition("=") for pair in query.split("&") if pair]
        encoded = sorted(
            f"{_encode(name)}={_encode(value)}" for name, _, value in pairs if name != _PRESIGNED
        )
        lines = [request.method, path, "&".join(encoded)]
        lines += [f"{name}:{' '.join(request.headers[name].split())}" for name in self.signed_headers]
        payload = "UNSIGNED-PAYLOAD" if self.presigned else request.headers["X-Amz-Content-SHA256"]
        lines += ["", ";".join(self.signed_headers), payload]

        scope = [self.date[:8], self.region, "s3", "aws4_request"]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        text = "\n".join(["AWS4-HMAC-SHA256", self.date, "/".join(scope), digest])
        key = f"AWS4{secret}".encode()
        for part in scope:
            key = hmac.digest(key, part.encode(), "sha256")
        return hmac.new(key, text.encode(), "sha256").hexdigest()


def _encode(text: str) -> str:
    return quote(unquote(text), safe="-_.~")
