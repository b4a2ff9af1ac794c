"""From arguments as users write them to the requests of the wire."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .system.sizes import Source, absolute_sources, parse_memory_limit, parse_size
from .system.version import client_version

if TYPE_CHECKING:
    from penstock.v1 import streamer_pb2 as pb

    from .ring.stream import Choose

# Names to load, or a function that says for a name whether to load it.
Selection = Collection[str] | Callable[[str], bool]


def open_load(
    source: Source | Iterable[Source],
    *,
    memory_limit: int | str | None,
    group: tuple[str, int] | None,
    variant: str | None,
    verify: str | None,
    digests: Mapping[str, str] | None,
) -> pb.OpenLoad:
    """The request of a load of all tensors; `choose` adds a selection. Raises TypeError and ValueError."""
    from penstock.v1 import streamer_pb2 as pb

    request = pb.OpenLoad(
        sources=absolute_sources(source),
        memory_limit_bytes=parse_memory_limit(memory_limit),
        client_name=_client_name(),
        client_version=client_version(),
        variant=_variant(variant),
        verify=_verify(verify),
        digests=_digests(digests),
    )
    if group is not None:
        name, size = _group(group)
        request.group.CopyFrom(pb.LoadGroup(name=name, size=size))
    return request


def choose(request: pb.OpenLoad, tensors: Selection | None) -> Choose | None:
    """Puts names into the request. For a predicate, returns the function that chooses among the daemon's
    names."""
    if tensors is None:
        return None
    if isinstance(tensors, (str, bytes)):
        raise TypeError(f"tensors={tensors!r} is one name: give a collection, [{tensors!r}], or a predicate")
    if callable(tensors):
        predicate = tensors
        request.list_tensors = True
        # Each name once: files may share some, and a name selects its tensors in all of them.
        return lambda listed: [name for name in dict.fromkeys(one.name for one in listed) if predicate(name)]
    request.tensors.SetInParent()
    request.tensors.names.extend(dict.fromkeys(tensors))
    return None


def prefetch(
    source: Source | Iterable[Source],
    *,
    pin: bool,
    variant: str | None,
    verify: str | None,
    digests: Mapping[str, str] | None,
) -> pb.PrefetchRequest:
    """The request of a prefetch. Raises TypeError and ValueError."""
    from penstock.v1 import streamer_pb2 as pb

    return pb.PrefetchRequest(
        sources=absolute_sources(source),
        pin=pin,
        variant=_variant(variant),
        verify=_verify(verify),
        digests=_digests(digests),
    )


def fetch(
    source: Source,
    *,
    allow: str | Iterable[str] | None,
    ignore: str | Iterable[str] | None,
    max_bytes: int | str | None,
    max_files: int | None,
) -> pb.FetchRequest:
    """The request of a fetch. Raises TypeError and ValueError."""
    from penstock.v1 import streamer_pb2 as pb

    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source={source!r} is no source: give a path or a URI, one at a time")
    return pb.FetchRequest(
        source=absolute_sources(source)[0],
        allow=_patterns("allow", allow),
        ignore=_patterns("ignore", ignore),
        max_bytes=parse_size("max_bytes", max_bytes),
        max_files=max_files,
        client_name=_client_name(),
        client_version=client_version(),
    )


def evict(source: Source | Iterable[Source] | None) -> pb.EvictRequest:
    """The request to evict a checkpoint, or every idle one. Raises TypeError and ValueError."""
    from penstock.v1 import streamer_pb2 as pb

    return pb.EvictRequest(sources=[] if source is None else absolute_sources(source))


def _client_name() -> str:
    """The name of this process in the daemon's log and status."""
    return Path(sys.argv[0] if sys.argv else "").name[:200]


def _group(given: object) -> tuple[str, int]:
    if isinstance(given, (tuple, list)) and len(given) == 2:
        name, size = given
        if isinstance(name, str) and isinstance(size, int):
            return name, size
    raise TypeError(f"group={given!r} is no name with a number of loads: give both, as in ('job', 8)")


def _variant(given: object) -> str:
    """Empty stands for the default variant."""
    if given is None:
        return ""
    if not isinstance(given, str) or not given:
        raise TypeError(
            f"variant={given!r} is no name of a variant: give one as in the files' names, such as 'fp16', or "
            "None for the default one"
        )
    return given


def _verify(given: object) -> str:
    """Empty stands for the daemon's own setting."""
    if given is None:
        return ""
    if given not in ("off", "auto", "require"):
        raise ValueError(f"verify={given!r} is no way to verify: give 'off', 'auto' or 'require', or None")
    return str(given)


def _digests(given: object) -> dict[str, str]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(
        isinstance(name, str) and isinstance(digest, str) for name, digest in given.items()
    ):
        raise TypeError(
            f"digests={given!r:.200} is no mapping of names to digests: give SHA-256 in hexadecimal digits "
            "by the file's name, such as {'model.safetensors': '9f86d0…'}"
        )
    return dict(given)


def _patterns(argument: str, given: str | Iterable[str] | None) -> list[str]:
    patterns = [given] if isinstance(given, str) else list(given or ())
    if given is not None and not patterns:
        raise ValueError(f"{argument} is an empty list: give patterns, or leave it out")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"{argument}: {pattern!r} is no pattern; give a str such as '*.json'")
    return patterns
