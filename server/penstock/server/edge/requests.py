"""The messages of clients as requests of `loads`, within bounds.

Text is cut or refused by its length, lists by their number, and what a request keeps is charged to its user
(`call.stream.keep`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from penstock.v1 import streamer_pb2 as pb

from ..checkpoint.catalog import MAX_SOURCES
from ..errors import InvalidRequestError
from ..loads.names import Names
from ..loads.request import Request
from ..sources.verification import MAX_DIGESTS
from ..staging.sharing import Group
from .calls import Call

MAX_SOURCE_BYTES = 8 << 10
SOURCE_COST_BYTES = 120
"""The cost of a source besides its bytes: a Python string in a tuple."""
MAX_NAME_CHARACTERS = 200


async def read_load(call: Call) -> Request:
    """The request of a Load call, from its first messages."""
    message = await call.next(pb.LoadRequest)
    if message is None or message.WhichOneof("request") != "open":
        raise InvalidRequestError("the first message of a Load call is no OpenLoad; start with one")
    request = _load_request(call, message.open)
    del message
    if isinstance(request.names, Names):
        await complete_names(call, request.names)
    return request


async def read_prefetch(call: Call) -> tuple[Request, bool]:
    """The request of a Prefetch call, from all its messages, and whether to pin the checkpoint."""
    message = await call.only(pb.PrefetchRequest)
    check_sources(message.sources)
    names = first_names(call, message.tensors) if message.HasField("tensors") else None
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


def first_names(call: Call, part: pb.SelectTensors) -> Names:
    """A list of names with its first part. `complete_names` adds the others."""
    names = Names(call.stream.keep, call.stream.release)
    names.add(part)
    return names


async def complete_names(call: Call, names: Names) -> None:
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


def _load_request(call: Call, message: pb.OpenLoad) -> Request:
    check_sources(message.sources)
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
    names = first_names(call, message.tensors) if message.HasField("tensors") else None
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


def check_sources(sources: Sequence[str]) -> None:
    """Raises InvalidRequestError for too many sources, or one that is too long."""
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
    call.stream.keep(sum(map(len, kept)) + SOURCE_COST_BYTES * len(kept))
    return kept


def _kept_digests(call: Call, digests: Mapping[str, str]) -> dict[str, str]:
    if len(digests) > MAX_DIGESTS:
        raise InvalidRequestError(
            f"digests: {len(digests)} are more than {MAX_DIGESTS}; leave out those of files that are not "
            "loaded"
        )
    kept = dict(digests)
    call.stream.keep(sum(len(name) + len(value) + 2 * SOURCE_COST_BYTES for name, value in kept.items()))
    return kept
