"""Mutations of recorded bytes, as Hypothesis draws and shrinks them: what fails is reduced to few changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from .http2 import PREFACE, Frame, frame, parse_frames

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x3FFF, 0x4000, 0x4001, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
"""Where lengths, windows and identifiers have their borders."""
MAX_CHANGES = 4


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a byte string. Places are fractions, and so fit a string of any length."""

    kind: str
    place: float
    span: float
    data: bytes

    def apply(self, value: bytes) -> bytes:
        start = int(self.place * len(value))
        end = start + int(self.span * self.span * self.span * (len(value) - start)) + 1
        if self.kind == "replace":
            return value[:start] + self.data + value[start + len(self.data) :]
        if self.kind == "insert":
            return value[:start] + self.data + value[start:]
        if self.kind == "delete":
            return value[:start] + value[end:]
        if self.kind == "repeat":
            return value[:end] + value[start:end] * (1 + len(self.data)) + value[end:]
        if self.kind == "move":
            return value[:start] + value[end:] + value[start:end]
        assert self.kind == "cut", self.kind
        return value[:start]


def changes(pieces: Sequence[bytes]) -> st.SearchStrategy[list[Change]]:
    """A few changes at most; what they put in is one of the `pieces`, a border number or any bytes."""
    numbers = st.builds(
        lambda number, size: (number & (1 << 8 * size) - 1).to_bytes(size, "big"),
        st.sampled_from(NUMBERS),
        st.sampled_from((1, 2, 3, 4)),
    )
    fraction = st.floats(0, 1, exclude_max=True)
    one = st.builds(
        Change,
        st.sampled_from(("replace", "insert", "delete", "repeat", "move", "cut")),
        fraction,
        fraction,
        st.one_of(st.sampled_from(list(pieces)), numbers, st.binary(min_size=1, max_size=8)),
    )
    return st.lists(one, max_size=MAX_CHANGES)


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes], pieces: Sequence[bytes]) -> bytes:
    """One of the seeds, with a few changes."""
    value = draw(st.sampled_from(list(seeds)))
    for change in draw(changes(pieces)):
        value = change.apply(value)
    return value


@st.composite
def mutated_frames(draw: st.DrawFn, seeds: Sequence[bytes], pieces: Sequence[bytes]) -> bytes:
    """One of the seeds, HTTP/2 as a client sends it, with a few changes of its frames: of their order, their
    fields or their payload. Their lengths stay true, so that the code behind the framing is reached."""
    frames = parse_frames(draw(st.sampled_from(list(seeds))))
    for _ in range(draw(st.integers(0, MAX_CHANGES))):
        place = draw(st.integers(0, len(frames)))
        what = draw(st.sampled_from(("new", "drop", "repeat", "swap", "kind", "flags", "stream", "payload")))
        if what == "new":
            kinds, flags = st.integers(0, 12), st.integers(0, 255)
            streams, payload = st.sampled_from((0, 1, 2, 3, 5, 0x7FFFFFFF)), st.binary(max_size=20)
            frames.insert(place, draw(st.builds(Frame, kinds, flags, streams, payload)))
        elif place < len(frames):
            _change_frame(draw, frames, place, what, pieces)
    return PREFACE + b"".join(frame(one.kind, one.flags, one.stream, one.payload) for one in frames)


def _change_frame(
    draw: st.DrawFn, frames: list[Frame], place: int, what: str, pieces: Sequence[bytes]
) -> None:
    one = frames[place]
    kind, flags, stream, payload = one.kind, one.flags, one.stream, one.payload
    if what == "drop":
        del frames[place]
        return
    if what == "repeat":
        frames[place:place] = [one] * draw(st.integers(1, 30))
        return
    if what == "swap":
        frames.append(frames.pop(place))
        return
    if what == "kind":
        kind = draw(st.integers(0, 12))
    elif what == "flags":
        flags ^= 1 << draw(st.integers(0, 7))
    elif what == "stream":
        stream = draw(st.sampled_from((0, 1, 2, 3, 5, 0x7FFFFFFF)))
    else:
        for change in draw(changes(pieces)):
            payload = change.apply(payload)
    frames[place] = Frame(kind, flags, stream, payload)
