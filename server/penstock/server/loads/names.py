"""The names of tensors that a request selects, as they came: packed, because as Python strings in a set they
take many times the space.

They are unpacked only to be looked up (`checkpoint/selection.py`), for one request of the daemon at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from penstock.v1 import streamer_pb2 as pb

from ..errors import InvalidRequestError

NAME_COST_BYTES = 160
"""The bytes of a name in a set of Python, besides its own."""
WIDEST = 4
"""Bytes of each character of a Python string that has one of the widest."""
MAX_UNPACKED_BYTES = 24 << 20


class Names:
    """Grows by `add`, is iterated any number of times. Counts its packed bytes by `keep` and `release`."""

    def __init__(self, keep: Callable[[int], None], release: Callable[[int], None]) -> None:
        """`keep` takes bytes from the user's share of memory, or raises a PenstockError."""
        self._keep = keep
        self._release = release
        self._parts: list[bytes] = []
        self._packed_bytes = 0
        self._unpacked_bytes = 0
        self._count = 0
        self.more = False
        """The last part was not the last of the list."""

    def add(self, part: pb.SelectTensors) -> None:
        """Raises InvalidRequestError for too many names, and what `keep` raises."""
        self.more = part.more
        raw = part.SerializeToString()
        size_bytes = len(raw)
        self._count += len(part.names)
        # Lengths of names may be no ASCII either.
        plain = raw.isascii() or all(map(str.isascii, part.names))
        self._unpacked_bytes += len(part.names) * NAME_COST_BYTES + size_bytes * (1 if plain else WIDEST)
        if self._unpacked_bytes > MAX_UNPACKED_BYTES:
            raise InvalidRequestError(
                f"tensors: {self._count} names are more than penstockd looks up at once (about "
                f"{MAX_UNPACKED_BYTES // (NAME_COST_BYTES + 32)}, fewer if they are long): select fewer, or "
                "load all"
            )
        if size_bytes:
            self._keep(size_bytes)
            self._packed_bytes += size_bytes
            self._parts.append(raw)

    def close(self) -> None:
        """They have been looked up. May be called again."""
        self._parts.clear()
        packed_bytes, self._packed_bytes = self._packed_bytes, 0
        self._release(packed_bytes)

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            yield from pb.SelectTensors.FromString(part).names
