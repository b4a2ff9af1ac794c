"""The gRPC edge: protobuf to dataclasses and back, errors to statuses. No policy."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from penstock.v1 import streamer_pb2 as pb

from ..checkpoint.catalog import MAX_SOURCES
from ..errors import InvalidRequestError, PenstockError, SessionRequiredError
from ..loads.control import Control
from ..loads.load import Event, Finished, Load, Manifest, SegmentReady
from ..loads.names import Names
from ..loads.prefetch import Progress
from ..loads.request import Listing, Queued, Request
from ..sources.verification import MAX_DIGESTS
from ..staging.sharing import Group
from ..system.limits import is_privileged
from ..system.shown import cut, encodable
from . import fetching
from .calls import Call, Context
from .handoff import Session

logger = logging.getLogger(__name__)

DOMAIN = "penstock"
SEGMENT_PART_TENSORS = 256
"""Of a segment's tensors, those that are objects of protobuf at the same time."""
LISTING_TENSORS = 4096
LISTING_BYTES = 1 << 20
"""Of one message."""
ENTRY_BYTES = 64
"""Of a tensor in a message, at most, besides its name and its dimensions."""
MAX_METADATA_BYTES = 2 << 20
"""Of all files in a manifest; what does not fit is left out file by file."""
MANIFEST_BYTES = 4 << 20
STATUS_BYTES = 4 << 20
"""At most, of these answers, for the memory that they wait for."""
STATUS_SECONDS = 0.1
"""Between two answers about status to a user who is not privileged."""
MAX_SOURCE_BYTES = 8 << 10
SOURCE_COST_BYTES = 72
"""What a source costs besides the string, in a tuple and in what is looked up by it. One character that is no
ASCII makes all of a string take up to four bytes each."""
MAX_NAME_CHARACTERS = 200
MAX_MESSAGE_CHARACTERS = 1000
MAX_MESSAGE_BYTES = 2400
"""Percent-encoded, as it is in the trailers."""
MAX_DETAIL_BYTES = 300
MAX_DETAILS_BYTES = 1200
"""Of all of an error's details."""


class StreamerService:
    """Answers for one daemon."""

    def __init__(
        self,
        control: Control,
        session_of: Callable[[str | None], Session],
        tell_status: Callable[[Session], pb.GetStatusResponse],
    ) -> None:
        """`session_of` raises SessionRequiredError for a token that is none."""
        self._control = control
        self._session_of = session_of
        self._tell_status = tell_status
        self._status_turns: dict[int, float] = {}
        """When each user, of those who asked lately, may have the next answer about status."""
        self.methods = {
            "Load": self.load,
            "Prefetch": self.prefetch,
            "Fetch": self.fetch,
            "Evict": self.evict,
            "GetStatus": self.get_status,
        }
        """How each method of the service is answered, whatever kinds of calls the service declares."""

    async def load(self, call: Call) -> None:
        session = None
        try:
            session = self._session(call)
            if session.loaded:
                raise SessionRequiredError(
                    "this session's token opened a load already; open another connection"
                )
            session.loaded = True
            load = self._control.new_load(await _opening(call), session)
        except PenstockError as error:
            await self._refuse(call, error, session)
        handler = asyncio.current_task()
        assert handler is not None
        wrong: list[PenstockError] = []

        def heard(listening: asyncio.Task[None]) -> None:
            if not listening.cancelled() and (error := listening.exception()) is not None:
                if not isinstance(error, PenstockError):
                    raise error
                wrong.append(error)
                handler.cancel()

        listening = asyncio.create_task(_listen(call, load))
        listening.add_done_callback(heard)
        try:
            await self._control.run(load, lambda event: _emit(call, event))
        except PenstockError as error:
            listening.remove_done_callback(heard)
            await abort(call.context, error, load.id)
        except asyncio.CancelledError:
            if not wrong:
                raise
            self._control.refused(wrong[0], session)
            await abort(call.context, wrong[0], load.id)
        finally:
            listening.remove_done_callback(heard)
            listening.cancel()

    async def prefetch(self, call: Call) -> None:
        session = None
        try:
            session = self._session(call)
            request, pin = await _prefetch_opening(call)
            prefetch = self._control.new_prefetch(request, session, pin=pin)
        except PenstockError as error:
            await self._refuse(call, error, session)
        call.stream.finish_message()
        try:
            await self._control.run(
                prefetch, lambda event: call.send(lambda: _progress(event).SerializeToString())
            )
        except PenstockError as error:
            await abort(call.context, error, prefetch.id)

    async def fetch(self, call: Call) -> None:
        session = None
        try:
            session = self._session(call)
            request = await fetching.opening(call)
            _check_sources(request.sources)
            fetch = self._control.new_fetch(request, session, session.gids)
        except PenstockError as error:
            await self._refuse(call, error, session)
        call.stream.finish_message()
        try:
            await self._control.run(fetch, lambda event: fetching.send(call, event))
        except PenstockError as error:
            await abort(call.context, error, fetch.id)

    async def evict(self, call: Call) -> None:
        session = None
        try:
            session = self._session(call)
            message = await call.only(pb.EvictRequest)
            _check_sources(message.sources)
            freed, leased = self._control.evict(session, message.sources)
        except PenstockError as error:
            await self._refuse(call, error, session)
        answer = pb.EvictResponse(freed_bytes=freed, leased_bytes=leased)
        await call.send(answer.SerializeToString)

    async def get_status(self, call: Call) -> None:
        try:
            session = self._session(call)
            await call.only(pb.GetStatusRequest)
            await self._status_turn(session)
            await call.send(lambda: self._tell_status(session).SerializeToString(), most_bytes=STATUS_BYTES)
        except PenstockError as error:
            await self._refuse(call, error, None)

    async def _status_turn(self, session: Session) -> None:
        """Waits until that user may have another answer about status, each of which takes the event loop
        milliseconds."""
        if is_privileged(session.uid):
            return
        now = asyncio.get_running_loop().time()
        self._status_turns = {uid: at for uid, at in self._status_turns.items() if at > now}
        at = self._status_turns.get(session.uid, now)
        self._status_turns[session.uid] = at + STATUS_SECONDS
        if at > now:
            await asyncio.sleep(at - now)

    def _session(self, call: Call) -> Session:
        """The caller's. From now on its messages pass the gate."""
        session = self._session_of(_token(call.context))
        call.stream.approve()
        return session

    async def _refuse(self, call: Call, error: PenstockError, session: Session | None) -> NoReturn:
        """Ends a call that came to nothing."""
        self._control.refused(error, session)
        await abort(call.context, error, "")


async def _listen(call: Call, load: Load) -> None:
    """Passes on what the client says while its load runs."""
    while True:
        message = await call.next(pb.LoadRequest, seconds=None)
        if message is None:
            return
        kind, names = message.WhichOneof("request"), None
        if kind == "release":
            load.release(message.release.segments)
        elif kind == "select" and load.awaits_choice:
            names = _first_names(call, message.select)
        del message  # while waiting: parsed, it may have many times its size
        if names is not None:
            await _complete_in_load(call, names)
            load.choose(names)


def _first_names(call: Call, part: pb.SelectTensors) -> Names:
    names = Names(call.stream.keep, call.stream.release)
    names.add(part)
    return names


async def _complete_in_load(call: Call, names: Names) -> None:
    """Adds the other parts of a list of names."""
    while names.more:
        message = await call.only(pb.LoadRequest)
        if message.WhichOneof("request") != "select":
            raise InvalidRequestError(
                "the list of tensor names is not complete: no SelectTensors follows one with `more`; send "
                "the rest"
            )
        names.add(message.select)
        del message


async def _opening(call: Call) -> Request:
    """What the first messages of a Load call ask for."""
    message = await call.next(pb.LoadRequest)
    if message is None or message.WhichOneof("request") != "open":
        raise InvalidRequestError("the first message of a Load call is no OpenLoad; start with one")
    request = _request(call, message.open)
    del message
    if isinstance(request.names, Names):
        await _complete_in_load(call, request.names)
    return request


async def _prefetch_opening(call: Call) -> tuple[Request, bool]:
    """What the messages of a Prefetch call ask for, and whether to pin it."""
    message = await call.only(pb.PrefetchRequest)
    _check_sources(message.sources)
    names = _first_names(call, message.tensors) if message.HasField("tensors") else None
    sources, variant = _kept_sources(call, message.sources), _variant(message.variant)
    request = Request(
        sources=sources,
        names=names,
        variant=variant,
        verify=message.verify[:MAX_NAME_CHARACTERS],
        digests=_kept_digests(call, message.digests),
    )
    pin = message.pin
    del message
    while names is not None and names.more:
        message = await call.only(pb.PrefetchRequest)
        if not message.HasField("tensors"):
            raise InvalidRequestError(
                "the list of tensor names is not complete: no `tensors` follow some with `more`; send the "
                "rest"
            )
        names.add(message.tensors)
        del message
    return request, pin


async def _emit(call: Call, event: Event) -> None:
    if isinstance(event, Listing):
        await call.send_all(_listing(event))
    elif isinstance(event, Manifest):
        await call.send(lambda: _manifest(event).SerializeToString(), most_bytes=MANIFEST_BYTES)
    else:
        await call.send(lambda: _response(event))


def _request(call: Call, message: pb.OpenLoad) -> Request:
    _check_sources(message.sources)
    group = None
    if message.HasField("group"):
        if not message.group.name or not 1 <= message.group.size <= 65536:
            raise InvalidRequestError("group: the name is missing, or the size is not 1 to 65536; give both")
        progress = message.group.progress
        group = Group(
            message.group.name[:MAX_NAME_CHARACTERS],
            message.group.size,
            window=progress.window[:MAX_NAME_CHARACTERS],
            released_tensors=progress.released_tensors,
            members=progress.members,
        )
    names = _first_names(call, message.tensors) if message.HasField("tensors") else None
    return Request(
        sources=_kept_sources(call, message.sources),
        names=names,
        list_tensors=message.list_tensors,
        memory_limit=message.memory_limit_bytes if message.HasField("memory_limit_bytes") else None,
        group=group,
        skip_tensors=message.skip_tensors,
        expect_version=message.expect_version[:MAX_NAME_CHARACTERS],
        client_name=message.client_name[:MAX_NAME_CHARACTERS],
        variant=_variant(message.variant),
        verify=message.verify[:MAX_NAME_CHARACTERS],
        digests=_kept_digests(call, message.digests),
    )


def _variant(text: str) -> str:
    if len(text) > MAX_NAME_CHARACTERS:
        raise InvalidRequestError(
            f"variant: it has {len(text)} characters, more than {MAX_NAME_CHARACTERS}; name one such as fp16"
        )
    return text


def _check_sources(sources: Sequence[str]) -> None:
    if len(sources) > MAX_SOURCES:
        raise InvalidRequestError(
            f"sources: {len(sources)} are more than {MAX_SOURCES}; load fewer at a time"
        )
    for source in sources:
        size_bytes = len(source.encode(errors="surrogatepass"))
        if size_bytes > MAX_SOURCE_BYTES:
            raise InvalidRequestError(
                f"sources: {source[:100]!r} and so on has {size_bytes} bytes, more than {MAX_SOURCE_BYTES}: "
                "the path is too long; name a shorter one"
            )


def _kept_sources(call: Call, sources: Sequence[str]) -> tuple[str, ...]:
    kept = tuple(sources)
    call.stream.keep(sum(map(sys.getsizeof, kept)) + SOURCE_COST_BYTES * len(kept))
    return kept


def _kept_digests(call: Call, digests: Mapping[str, str]) -> dict[str, str]:
    if len(digests) > MAX_DIGESTS:
        raise InvalidRequestError(
            f"digests: {len(digests)} are more than {MAX_DIGESTS}; leave out those of files that are not "
            "loaded"
        )
    kept = dict(digests)
    texts = (*kept, *kept.values())
    call.stream.keep(sum(map(sys.getsizeof, texts)) + SOURCE_COST_BYTES * len(texts))
    return kept


def _response(event: Queued | SegmentReady | Finished) -> bytes:
    if isinstance(event, SegmentReady):
        return _segment_ready(event)
    if isinstance(event, Queued):
        return pb.LoadResponse(queued=_queued(event)).SerializeToString()
    finished = pb.Finished(
        waited_seconds=event.waited_seconds,
        read_bytes=event.read_bytes,
        tier_bytes=event.tier_bytes,
        verified_bytes=event.verified_bytes,
    )
    return pb.LoadResponse(finished=finished).SerializeToString()


def _segment_ready(event: SegmentReady) -> bytes:
    """Made in parts, which put together are one message (protobuf merges them). As one object it would take
    four times its bytes, which the C library would return to the kernel after each segment."""
    message = pb.SegmentReady(
        index=event.index, ring_offset=event.ring_offset, size_bytes=event.end - event.start
    )
    if event.group is not None:
        message.group.window = event.group.window
        message.group.released_tensors = event.group.released_tensors
        message.group.members = event.group.members
    parts, segment_start = [pb.LoadResponse(segment_ready=message).SerializeToString()], event.start
    for first in range(0, len(event.tensors), SEGMENT_PART_TENSORS):
        message = pb.SegmentReady()
        add = message.tensors.add
        for name, dtype, shape, start, end in event.table.entries(
            event.tensors[first : first + SEGMENT_PART_TENSORS]
        ):
            add(name=name, dtype=dtype, shape=shape, offset=start - segment_start, size_bytes=end - start)
        parts.append(pb.LoadResponse(segment_ready=message).SerializeToString())
    return b"".join(parts)


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
        variant=event.variant,
        verify=event.verify,
        warnings=event.checkpoint.warnings,
    )
    metadata_bytes = 0
    for number, (file, header) in enumerate(
        zip(event.checkpoint.files, event.checkpoint.headers, strict=True)
    ):
        checksum = event.checkpoint.expected[number].checksum if event.checkpoint.expected else None
        size_bytes = len(header.metadata.to_bytes())
        omitted = header.metadata_omitted or metadata_bytes + size_bytes > MAX_METADATA_BYTES
        metadata_bytes += 0 if omitted else size_bytes
        message.files.add(
            uri=file.uri,
            size_bytes=file.size_bytes,
            metadata={} if omitted else dict(header.metadata),
            metadata_omitted=omitted,
            verified_by="" if checksum is None else checksum.algorithm,
        )
    return pb.LoadResponse(manifest=message)


def _listing(event: Listing) -> Iterator[bytes]:
    """Serialized, as nothing else of a part is to be left while it waits for its client."""
    listing, size_bytes = pb.Listing(), 0
    for table, indices in zip(event.tables, event.delivered, strict=True):
        for name, dtype, shape, start, end in table.entries(indices):
            entry_bytes = ENTRY_BYTES + len(name.encode(errors="surrogatepass")) + 10 * len(shape)
            full = len(listing.tensors) == LISTING_TENSORS or size_bytes + entry_bytes > LISTING_BYTES
            if full and listing.tensors:
                part, listing, size_bytes = pb.LoadResponse(listing=listing), pb.Listing(), 0
                message = part.SerializeToString()
                del part
                yield message
            listing.tensors.add(name=name, dtype=dtype, shape=shape, size_bytes=end - start)
            size_bytes += entry_bytes
    listing.last = True
    yield pb.LoadResponse(listing=listing).SerializeToString()


def _progress(event: Progress | Queued) -> pb.PrefetchResponse:
    if isinstance(event, Queued):
        return pb.PrefetchResponse(queued=_queued(event))
    return pb.PrefetchResponse(ready_bytes=event.ready_bytes, total_bytes=event.total_bytes, done=event.done)


def _queued(event: Queued) -> pb.Queued:
    return pb.Queued(place=event.place, reason=event.reason, load_id=event.load_id)


def _token(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == "penstock-session":
            return value if isinstance(value, str) else None
    return None


async def abort(context: Context, error: PenstockError, load_id: str) -> NoReturn:
    """Ends the call with the error's status and a google.rpc.ErrorInfo."""
    # gRPC keeps what ended a call for a while; so without the frames that it came through, and their headers.
    error.__traceback__ = error.__cause__ = error.__context__ = None
    status = to_status(error, load_id)
    try:
        await context.abort(
            grpc.StatusCode[error.status],
            status.message,
            trailing_metadata=(("grpc-status-details-bin", status.SerializeToString()),),
        )
    except grpc.aio.InternalError:  # nobody is there any more to be told
        raise asyncio.CancelledError from None
    raise AssertionError("abort raises")


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
