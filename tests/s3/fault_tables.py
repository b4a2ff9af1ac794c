"""What storage does wrong, by what becomes of it: it passes, it lasts, or no retry helps."""

from __future__ import annotations

from penstock.client import errors

from . import faults
from .proxy import Answer, Fault
from .support import BLOCK_BYTES

HALF = BLOCK_BYTES // 2

# What passes, or may: a request that met it is made again.
TRANSIENT: dict[str, Fault] = {
    "reset": faults.reset,
    "closed": faults.close,
    "cut at once": faults.cut(0),
    "cut in mid-body": faults.cut(HALF),
    "reset in mid-body": faults.cut(HALF, by_reset=True),
    "stalled": faults.stall,
    "stalled in mid-body": faults.stall_after(HALF),
    "500": faults.error(500, "InternalError"),
    "502": faults.html(502),
    "503": faults.error(503, "SlowDown"),
    "503 with Retry-After": faults.error(503, "SlowDown", ("Retry-After", "1")),
    "503 with an unreadable Retry-After": faults.error(503, "SlowDown", ("Retry-After", "soon")),
    "503 and HTML": faults.html(503),
    "504": faults.error(504, "GatewayTimeout"),
    "400 RequestTimeout": faults.error(400, "RequestTimeout"),
    "short body": faults.short_body(1000),
    "long body": faults.long_body(b"x" * 1000),
    "bytes after the body": faults.trailing_garbage(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "the whole object": faults.whole_object,
    "another range": faults.other_range(-1000),
    "wrong Content-Range": faults.content_range("bytes 0-9/10"),
    "unreadable Content-Range": faults.content_range("bytes of the object"),
    "200 and HTML": faults.html(200),
}

# What goes on until the load fails, and what the error has to say beside the bucket and the key.
LASTING: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "reset": (faults.reset, ("connection",)),
    "cut at once": (faults.cut(0), ()),
    "stalled": (faults.stall, ("--object-timeout",)),
    "500": (faults.error(500, "InternalError"), ("500", "InternalError", faults.REQUEST_ID)),
    "503": (faults.error(503, "SlowDown"), ("503", "SlowDown", faults.REQUEST_ID)),
    "503 and HTML": (faults.html(503), ("503",)),
    "wrong Content-Range": (faults.content_range("bytes 0-9/10"), ("range",)),
    "200 and HTML": (faults.html(200), ()),
}

# What no retry helps, the kind of the error, and what it has to say.
FINAL: dict[str, tuple[Fault, type[errors.PenstockError], tuple[str, ...]]] = {
    "403 AccessDenied": (
        faults.error(403, "AccessDenied"),
        errors.AccessDeniedError,
        ("AccessDenied", "s3:GetObject", faults.REQUEST_ID),
    ),
    "403 without a body": (
        faults.raw_answer(Answer(403, [("x-amz-request-id", faults.REQUEST_ID)], b"")),
        errors.AccessDeniedError,
        ("403", faults.REQUEST_ID),
    ),
    "400 ExpiredToken": (
        faults.error(400, "ExpiredToken"),
        errors.AccessDeniedError,
        ("ExpiredToken", "credentials", faults.REQUEST_ID),
    ),
    "403 RequestTimeTooSkewed": (
        faults.error(403, "RequestTimeTooSkewed"),
        errors.AccessDeniedError,
        ("RequestTimeTooSkewed", "clock", faults.REQUEST_ID),
    ),
    "403 SignatureDoesNotMatch": (
        faults.error(403, "SignatureDoesNotMatch"),
        errors.AccessDeniedError,
        ("SignatureDoesNotMatch", "secret", faults.REQUEST_ID),
    ),
    "404 NoSuchKey": (
        faults.error(404, "NoSuchKey"),
        errors.CheckpointNotFoundError,
        ("exist", faults.REQUEST_ID),
    ),
    "404 NoSuchBucket": (
        faults.error(404, "NoSuchBucket"),
        errors.CheckpointNotFoundError,
        ("bucket", "exist", faults.REQUEST_ID),
    ),
    "412": (faults.error(412, "PreconditionFailed"), errors.CheckpointChangedError, ("changed",)),
}
