"""Errors as clients receive them: a google.rpc.Status with one google.rpc.ErrorInfo."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from ..errors import PenstockError
from ..system.shown import cut, encodable

DOMAIN = "penstock"
MAX_MESSAGE_CHARACTERS = 1000
MAX_MESSAGE_BYTES = 2400
"""Percent-encoded, as it is in the trailers."""
MAX_DETAIL_BYTES = 300
MAX_DETAILS_BYTES = 1200
"""Of all of an error's details."""


def to_status(error: PenstockError, load_id: str) -> status_pb2.Status:
    """What a client is told, cut to what its trailers hold: about 8 KiB, in which the message is twice, once
    percent-encoded, and the details are in base64."""
    details = {"retryable": str(error.retryable).lower()}
    if load_id:
        details["load_id"] = load_id
    left = MAX_DETAILS_BYTES
    for key, value in error.details.items():
        value = cut(encodable(value), MAX_DETAIL_BYTES)
        left -= len(key) + len(value.encode())
        if left >= 0:
            details[key] = value
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=details)
    packed = any_pb2.Any()
    packed.Pack(info)
    message = cut(encodable(error.message), MAX_MESSAGE_CHARACTERS, size=len)
    message = cut(message, MAX_MESSAGE_BYTES, size=_trailer_bytes)
    number: int = grpc.StatusCode[error.status].value[0]
    return status_pb2.Status(code=number, message=message, details=[packed])


def _trailer_bytes(text: str) -> int:
    """Of a message in the trailer grpc-message."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in text.encode(errors="replace"))
