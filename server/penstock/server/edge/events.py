"""The events of a load or a prefetch as messages of the wire, each within its bound of bytes."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.v1 import streamer_pb2 as pb

from ..loads.load import Event, Finished, Manifest, SegmentReady
from ..loads.prefetch import Progress
from ..loads.request import Listing, Queued
from .calls import Call

SEGMENT_PART_TENSORS = 256
"""How many of a segment's tensors are objects of protobuf at the same time."""
LISTING_TENSORS = 4096
LISTING_BYTES = 1 << 20
"""The bounds of one message of a listing."""
ENTRY_BYTES = 64
"""A tensor takes no more of a message, besides its name and its dimensions."""
MAX_METADATA_BYTES = 2 << 20
"""The metadata of all files in a manifest. A file whose metadata does not fit is listed without it."""
MANIFEST_BYTES = 4 << 20


async def send(call: Call, event: Event) -> None:
    if isinstance(event, Listing):
        await call.send_all(_listing(event))
    elif isinstance(event, Manifest):
        await call.send(lambda: _manifest(event).SerializeToString(), most_bytes=MANIFEST_BYTES)
    else:
        await call.send(lambda: _response(event))


async def send_progress(call: Call, event: Progress | Queued) -> None:
    await call.send(lambda: _progress(event).SerializeToString())


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
    """Serialized in parts, whose bytes together are one message (protobuf merges them). One object would take
    four times as many bytes, and the C library would return them to the kernel after each segment."""
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
    """The messages of a listing. Only the bytes of one are kept while it waits for its client."""
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
