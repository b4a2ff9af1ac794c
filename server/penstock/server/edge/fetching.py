"""The messages of a Fetch call: its request, and the events that answer it."""

from __future__ import annotations

from penstock.v1 import streamer_pb2 as pb

from ..errors import InvalidRequestError
from ..loads.choice import Choice
from ..loads.fetch import MAX_BYTES, MAX_FILES, Done, Event, FetchRequest, Plan, digest
from ..loads.readahead import PART_BYTES
from ..sources import MAX_TREE_NAMES
from .calls import Call
from .requests import MAX_NAME_CHARACTERS, check_sources

MESSAGE_BYTES = PART_BYTES + (64 << 10)
"""The largest answer: a part of a file, and the file's name."""
HELD_BYTES = 128
"""The cost of a file that the client has: a digest in a set."""


async def read(call: Call) -> FetchRequest:
    """The request of a Fetch call, from all its messages. Raises InvalidRequestError, and the errors of
    `call.stream.keep`."""
    message = await call.only(pb.FetchRequest)
    choice = Choice(message.allow, message.ignore)
    call.stream.keep(len(message.source) + sum(map(len, (*message.allow, *message.ignore))))
    max_files = message.max_files if message.HasField("max_files") else MAX_FILES
    if max_files > MAX_TREE_NAMES:
        raise InvalidRequestError(
            f"max_files: {max_files} are more than the {MAX_TREE_NAMES} names that penstockd looks at; fetch "
            "directories below it"
        )
    list_only = message.list_only
    source, client_name = message.source, message.client_name[:MAX_NAME_CHARACTERS]
    max_bytes = message.max_bytes if message.HasField("max_bytes") else MAX_BYTES
    has: set[bytes] = set()
    while True:
        call.stream.keep(HELD_BYTES * len(message.have))
        has.update(digest(file.name, file.version) for file in message.have)
        if not message.more:
            break
        del message
        message = await call.only(pb.FetchRequest)
    check_sources([source])
    return FetchRequest(source, choice, frozenset(has), max_bytes, max_files, list_only, client_name)


async def send(call: Call, event: Event) -> None:
    await call.send(lambda: _response(event).SerializeToString(), most_bytes=MESSAGE_BYTES)


def _response(event: Event) -> pb.FetchResponse:
    if isinstance(event, Plan):
        plan = pb.FetchPlan(files=event.files, total_bytes=event.total_bytes, load_id=event.load_id)
        return pb.FetchResponse(plan=plan)
    if isinstance(event, Done):
        return pb.FetchResponse(done=True)
    message = pb.FetchResponse(data=event.data)
    if not event.offset:
        listed = event.listed
        message.file.name, message.file.version = listed.name, listed.version
        message.file.size_bytes, message.file.unchanged = listed.size_bytes, event.unchanged
    return message
