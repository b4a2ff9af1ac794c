"""Errors of the tree as the status that ends a call, cut so that it fits into the call's trailers."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from ..errors import PenstockError
from ..system.shown import cut, encodable
from .calls import Context

DOMAIN = "penstock"
MAX_MESSAGE_CHARACTERS = 1000
MAX_MESSAGE_BYTES = 2400
"""The largest message, percent-encoded as in the trailers."""
MAX_DETAIL_BYTES = 300
MAX_DETAILS_BYTES = 1200
"""The total of an error's details."""


async def abort(context: Context, error: PenstockError, load_id: str) -> NoReturn:
    """Ends the call with the error's status and a google.rpc.ErrorInfo."""
    # gRPC keeps the exception that ended a call for a while. Without a traceback it keeps no frames alive.
    error.__traceback__ = error.__cause__ = error.__context__ = None
    status = to_status(error, load_id)
    try:
        await context.abort(
            grpc.StatusCode[error.status],
            status.message,
            trailing_metadata=(("grpc-status-details-bin", status.SerializeToString()),),
        )
    except grpc.aio.InternalError:  # the client is gone
        raise asyncio.CancelledError from None
    raise AssertionError("abort raises")


def to_status(error: PenstockError, load_id: str) -> status_pb2.Status:
    """The error as clients get it, cut so that it fits into trailers of about 8 KiB. They hold the message
    twice, once percent-encoded, and the details in base64."""
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
    """The bytes of a message in the trailer grpc-message."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in text.encode(errors="replace"))
