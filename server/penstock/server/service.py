"""The gRPC edge: protobuf to dataclasses and back, errors to statuses. No policy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from penstock.v1 import streamer_pb2 as pb
from penstock.v1 import streamer_pb2_grpc

from .admission import Emit, Listing, Queued, Request
from .errors import InvalidRequestError, PenstockError, SessionRequiredError
from .handoff import Session
from .load import Event, Load, Manifest, SegmentReady
from .plan import SEGMENT_DESCRIPTION_BYTES
from .prefetch import Prefetch, Progress
from .sharing import Group

logger = logging.getLogger(__name__)

DOMAIN = "penstock"
LISTING_TENSORS = 4096
LISTING_BYTES = SEGMENT_DESCRIPTION_BYTES
"""Of the tensors that one message of a listing describes."""
MANIFEST_METADATA_BYTES = 2 << 20
"""Of the `__metadata__` of all files of a load; that of further files is left out."""
MAX_NAME_CHARACTERS = 200
MAX_MESSAGE_CHARACTERS = 1000
"""Trailers hold about 8 KiB, and the message is in them twice."""

WRITE_TIMEOUT_SECONDS = 5.0
"""How long a call that ends early waits for a client that does not read."""

_Context = grpc.aio.ServicerContext[Any, Any]


class Daemon(Protocol):
    """What the service needs of the daemon. Each raises a PenstockError that it answers with."""

    def session(self, token: str | None) -> Session: ...

    def new_load(self, request: Request, session: Session) -> Load: ...

    def new_prefetch(self, request: Request, session: Session, *, pin: bool) -> Prefetch: ...

    async def run_load(self, load: Load | Prefetch, emit: Emit) -> None: ...

    def evict(self, session: Session, sources: Sequence[str]) -> tuple[int, int]: ...

    def tell_status(self, session: Session) -> pb.GetStatusResponse: ...

    def refused(self, error: PenstockError, caller: Session | None) -> None: ...


class StreamerService(streamer_pb2_grpc.StreamerServiceServicer):
    """Answers for one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def Load(self, requests: AsyncIterator[pb.LoadRequest], context: _Context) -> None:
        session = None
        try:
            session = self._daemon.session(_token(context))
            if session.loaded:
                raise SessionRequiredError("this session's token opened a load already; connect again")
            session.loaded = True
            first = await anext(aiter(requests), None)
            if first is None or first.WhichOneof("request") != "open":
                raise InvalidRequestError("the first message of a Load call must be OpenLoad")
            load = self._daemon.new_load(_request(first.open), session)
        except PenstockError as error:
            await self._refuse(context, error, session)
        listening = asyncio.create_task(_listen(requests, load))
        try:
            await self._daemon.run_load(load, lambda event: _emit(context, event))
        except PenstockError as error:
            await _abort(context, error, load.id)
        finally:
            listening.cancel()

    async def Prefetch(self, message: pb.PrefetchRequest, context: _Context) -> None:
        session = None
        try:
            session = self._daemon.session(_token(context))
            request = Request(
                sources=tuple(message.sources),
                names=tuple(message.tensors.names) if message.HasField("tensors") else None,
            )
            prefetch = self._daemon.new_prefetch(request, session, pin=message.pin)
        except PenstockError as error:
            await self._refuse(context, error, session)
        try:
            await self._daemon.run_load(prefetch, lambda event: _write(context, _progress(event)))
        except PenstockError as error:
            await _abort(context, error, prefetch.id)

    async def Evict(self, message: pb.EvictRequest, context: _Context) -> pb.EvictResponse:
        session = None
        try:
            session = self._daemon.session(_token(context))
            freed, leased = self._daemon.evict(session, message.sources)
            return pb.EvictResponse(freed_bytes=freed, leased_bytes=leased)
        except PenstockError as error:
            await self._refuse(context, error, session)

    async def GetStatus(self, request: pb.GetStatusRequest, context: _Context) -> pb.GetStatusResponse:
        try:
            return self._daemon.tell_status(self._daemon.session(_token(context)))
        except PenstockError as error:
            await self._refuse(context, error, None)

    async def _refuse(self, context: _Context, error: PenstockError, session: Session | None) -> NoReturn:
        """Ends a call that came to nothing."""
        self._daemon.refused(error, session)
        await _abort(context, error, "")


async def _listen(requests: AsyncIterator[pb.LoadRequest], load: Load) -> None:
    """Passes on what the client says while its load runs."""
    async for message in requests:
        kind = message.WhichOneof("request")
        if kind == "release":
            load.release(message.release.segments)
        elif kind == "select":
            load.choose(message.select.names)


async def _emit(context: _Context, event: Event) -> None:
    for message in _messages(event):
        await _write(context, message)


async def _write(context: _Context, message: Any) -> None:
    """Cancelled, it first lets the write end: gRPC takes no status while a message is on its way."""
    writing = asyncio.ensure_future(context.write(message))
    # A client that goes may cancel twice, by its call and by its connection: the wait below ends early then.
    writing.add_done_callback(lambda write: write.cancelled() or write.exception())
    try:
        await asyncio.shield(writing)
    except grpc.aio.InternalError:  # nobody is there any more to be told
        raise asyncio.CancelledError from None
    except asyncio.CancelledError:
        await asyncio.wait([writing], timeout=WRITE_TIMEOUT_SECONDS)
        if not writing.done():
            writing.cancel()
        raise


def _request(message: pb.OpenLoad) -> Request:
    group = None
    if message.HasField("group"):
        if not message.group.name or not 1 <= message.group.size <= 65536:
            raise InvalidRequestError("group: needs a name, and a size of 1 to 65536")
        group = Group(message.group.name[:MAX_NAME_CHARACTERS], message.group.size)
    return Request(
        sources=tuple(message.sources),
        names=tuple(message.tensors.names) if message.HasField("tensors") else None,
        list_tensors=message.list_tensors,
        memory_limit=message.memory_limit_bytes if message.HasField("memory_limit_bytes") else None,
        group=group,
        skip_tensors=message.skip_tensors,
        expect_version=message.expect_version,
        client_name=message.client_name[:MAX_NAME_CHARACTERS],
    )


def _messages(event: Event) -> Iterator[pb.LoadResponse]:
    if isinstance(event, SegmentReady):
        yield _segment_ready(event)
    elif isinstance(event, Manifest):
        yield _manifest(event)
    elif isinstance(event, Listing):
        yield from _listing(event)
    elif isinstance(event, Queued):
        yield pb.LoadResponse(queued=_queued(event))
    else:
        finished = pb.Finished(waited_seconds=event.waited_seconds, read_bytes=event.read_bytes)
        yield pb.LoadResponse(finished=finished)


def _segment_ready(event: SegmentReady) -> pb.LoadResponse:
    message = pb.SegmentReady(
        index=event.index, ring_offset=event.ring_offset, size_bytes=event.end - event.start
    )
    add, segment_start = message.tensors.add, event.start
    for name, dtype, shape, start, end in event.table.entries(event.tensors):
        add(name=name, dtype=dtype, shape=shape, offset=start - segment_start, size_bytes=end - start)
    return pb.LoadResponse(segment_ready=message)


def _manifest(event: Manifest) -> pb.LoadResponse:
    message = pb.Manifest(
        load_id=event.load_id,
        version=event.version,
        slab_count=event.slab_count,
        slab_bytes=event.slab_bytes,
        full=event.full,
        tensor_count=event.tensor_count,
        segment_count=event.segment_count,
        total_bytes=event.total_bytes,
        warm_bytes=event.warm_bytes,
    )
    metadata_bytes = 0
    for file, header in zip(event.checkpoint.files, event.checkpoint.headers, strict=True):
        metadata_bytes += len(header.metadata.to_bytes())
        omitted = header.metadata_omitted or metadata_bytes > MANIFEST_METADATA_BYTES
        message.files.add(
            uri=file.uri,
            size_bytes=file.size_bytes,
            metadata={} if omitted else dict(header.metadata),
            metadata_omitted=omitted,
        )
    return pb.LoadResponse(manifest=message)


def _listing(event: Listing) -> Iterator[pb.LoadResponse]:
    listing = pb.Listing()
    described_bytes = 0
    for table in event.tables:
        for index, (name, dtype, shape, start, end) in enumerate(table.entries(range(len(table)))):
            listing.tensors.add(name=name, dtype=dtype, shape=shape, size_bytes=end - start)
            described_bytes += table.described_bytes(index + 1) - table.described_bytes(index)
            if len(listing.tensors) == LISTING_TENSORS or described_bytes >= LISTING_BYTES:
                yield pb.LoadResponse(listing=listing)
                listing, described_bytes = pb.Listing(), 0
    listing.last = True
    yield pb.LoadResponse(listing=listing)


def _progress(event: Progress | Queued) -> pb.PrefetchResponse:
    if isinstance(event, Queued):
        return pb.PrefetchResponse(queued=_queued(event))
    return pb.PrefetchResponse(ready_bytes=event.ready_bytes, total_bytes=event.total_bytes, done=event.done)


def _queued(event: Queued) -> pb.Queued:
    return pb.Queued(place=event.place, reason=event.reason, load_id=event.load_id)


def _token(context: _Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == "penstock-session":
            return value if isinstance(value, str) else None
    return None


async def _abort(context: _Context, error: PenstockError, load_id: str) -> NoReturn:
    """Ends the call with the error's status and a google.rpc.ErrorInfo."""
    # gRPC keeps what ended a call for a while; so without the frames that it came through, and their headers.
    error.__traceback__ = error.__cause__ = error.__context__ = None
    details = {**error.details, "retryable": str(error.retryable).lower()}
    if load_id:
        details["load_id"] = load_id
    message = error.message[:MAX_MESSAGE_CHARACTERS]
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=details)
    packed = any_pb2.Any()
    packed.Pack(info)
    code = grpc.StatusCode[error.status]
    number: int = code.value[0]
    status = status_pb2.Status(code=number, message=message, details=[packed])
    try:
        await context.abort(
            code,
            message,
            trailing_metadata=(("grpc-status-details-bin", status.SerializeToString()),),
        )
    except grpc.aio.InternalError:  # nobody is there any more to be told
        raise asyncio.CancelledError from None
    raise AssertionError("abort raises")
