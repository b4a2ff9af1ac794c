"""From arguments of `load()` as people write them to the fields of the wire."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ring.stream import Choose

# Names to load, or a function that says for a name whether to load it.
Selection = Collection[str] | Callable[[str], bool]


# The bytes of a field's tag and length in a message, and those kept for the fields beside the names.
_NAME_OVERHEAD_BYTES, _SPARE_BYTES = 4, 4096


def parts(names: Sequence[str], max_message_bytes: int) -> Iterator[list[str]]:
    """The names in lists that each fit into one message to a daemon that takes so many bytes; at least one
    list. 0: the daemon takes no list in parts."""
    if not max_message_bytes:
        yield list(names)
        return
    room = max_message_bytes - _SPARE_BYTES
    part: list[str] = []
    size_bytes = 0
    for name in names:
        name_bytes = len(name.encode()) + _NAME_OVERHEAD_BYTES
        if part and size_bytes + name_bytes > room:
            yield part
            part, size_bytes = [], 0
        part.append(name)
        size_bytes += name_bytes
    yield part


def wire_group(given: object) -> tuple[str, int]:
    if isinstance(given, (tuple, list)) and len(given) == 2:
        name, size = given
        if isinstance(name, str) and isinstance(size, int):
            return name, size
    raise TypeError(f"group={given!r} is no name with a number of loads: give both, as in ('job', 8)")


def checked_variant(given: object) -> str:
    """`variant` as the wire has it; empty is the default one."""
    if given is None:
        return ""
    if not isinstance(given, str) or not given:
        raise TypeError(
            f"variant={given!r} is no name of a variant: give one as in the files' names, such as 'fp16', or "
            "None for the default one"
        )
    return given


def checked_verify(given: object) -> str:
    """`verify` as the wire has it; empty is what the daemon does."""
    if given is None:
        return ""
    if given not in ("off", "auto", "require"):
        raise ValueError(f"verify={given!r} is no way to verify: give 'off', 'auto' or 'require', or None")
    return str(given)


def checked_digests(given: object) -> dict[str, str]:
    """`digests` as the wire has them."""
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


def choice(request: Any, tensors: Selection | None) -> Choose | None:
    """Puts names into the request; returns how to choose among the daemon's names, for a predicate."""
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
