"""A list of tensor names in parts, each small enough for one message to the daemon."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# The bytes of a field's tag and length in a message, and those kept for the fields beside the names.
_NAME_OVERHEAD_BYTES, _SPARE_BYTES = 4, 4096


def parts(names: Sequence[str], max_message_bytes: int) -> Iterator[list[str]]:
    """Lists of the names, at least one. Each fits into a message of `max_message_bytes`; 0: all names are in
    one list, since the daemon takes no list in parts."""
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
