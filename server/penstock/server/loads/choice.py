"""Which files of a tree a fetch copies, and which names it refuses. Pure."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from ..errors import CheckpointInvalidError, InvalidRequestError
from ..system.shown import encodable

WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.tflite",
    "*.ot",
)
LEFT_OUT = (*WEIGHTS, "original/", ".git/", "lost+found/")
"""Left out unless the caller chooses: weights in all formats, and files that are not part of a model."""
_RECORDS = (".penstock.json", "*/.penstock.json")
"""The file by which a client recognises a copy (`system/trees.py` there). It is never a file of a model."""
MAX_PATTERNS = 32
MAX_PATTERN_CHARACTERS = 256
MAX_PART_BYTES = 255
"""Most bytes of a name between slashes: the limit of file systems."""
MAX_NAME_BYTES = 1024
"""Most bytes of a whole name: the limit for the key of an object store."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Choice:
    """A choice of files by patterns as in a shell, which match whole relative names; `*` matches `/` too. A
    pattern that ends in `/` matches all names below that directory."""

    def __init__(self, allow: Iterable[str], ignore: Iterable[str]) -> None:
        """Raises InvalidRequestError for too many patterns, or too long ones."""
        self._allow, self._ignore = list(allow), list(ignore)
        for field, patterns in (("allow", self._allow), ("ignore", self._ignore)):
            if len(patterns) > MAX_PATTERNS:
                raise InvalidRequestError(
                    f"{field}: {len(patterns)} patterns are more than {MAX_PATTERNS}; give fewer"
                )
            for pattern in patterns:
                if len(pattern) > MAX_PATTERN_CHARACTERS:
                    raise InvalidRequestError(
                        f"{field}: {pattern[:50]!r} and so on has {len(pattern)} characters, more than "
                        f"{MAX_PATTERN_CHARACTERS}; write a shorter pattern"
                    )

    @property
    def is_own(self) -> bool:
        """It has patterns of the caller's."""
        return bool(self._allow or self._ignore)

    @cached_property
    def _compiled(self) -> _Compiled:
        """Made by who lists, and not where the request is read: on the event loop. It takes milliseconds a
        pattern."""
        ignored = [*self._ignore, *(_RECORDS if self._allow else (*LEFT_OUT, *_RECORDS))]
        return _Compiled(
            allowed=_compiled(self._allow) if self._allow else None,
            ignored=_compiled(ignored),
            pruned=_compiled(pattern for pattern in ignored if pattern.endswith(("*", "/"))),
        )

    def wanted(self, name: str) -> bool:
        """Whether a file is to be copied, as `sources.Wanted`. A name that is longer than any that may be is
        not compared, which could take seconds."""
        compiled = self._compiled
        if len(name) > MAX_NAME_BYTES:
            return True
        if name.endswith("/"):
            # A pattern that matches `name/` and ends in `*` matches all names that begin so.
            return not _matches(compiled.pruned, name)
        allowed = compiled.allowed is None or _matches(compiled.allowed, name)
        return allowed and not _matches(compiled.ignored, name)


@dataclass(frozen=True, slots=True)
class _Compiled:
    allowed: list[re.Pattern[str]] | None
    """None: all that are not ignored."""
    ignored: list[re.Pattern[str]]
    pruned: list[re.Pattern[str]]
    """Of those, what leaves out all below a directory."""


def check_name(top: str, name: str) -> None:
    """Raises CheckpointInvalidError for a name below `top` that cannot be created below every directory, or
    could lead out of it."""
    parts = name.split("/")
    if encodable(name) != name:
        raise _refused(top, name, "is not UTF-8")
    if _CONTROL.search(name):
        raise _refused(top, name, "holds a control character")
    if "" in parts or "." in parts or ".." in parts:
        raise _refused(top, name, "has a '.', a '..' or nothing between slashes")
    if max(len(part.encode()) for part in parts) > MAX_PART_BYTES or len(name.encode()) > MAX_NAME_BYTES:
        raise _refused(
            top, name, f"has more than {MAX_NAME_BYTES} bytes, or {MAX_PART_BYTES} between slashes"
        )


def check_together(top: str, names: Iterable[str]) -> None:
    """Raises CheckpointInvalidError if one name is a file and another lies below it. No name has control
    characters."""
    # Sorted like this, the names below a name follow it directly, since nothing sorts before `/`.
    ordered = sorted(name.replace("/", "\0") for name in names)
    for name, following in pairwise(ordered):
        if name == following:
            raise _refused(top, name.replace("\0", "/"), "is listed twice")
        if following.startswith(name + "\0"):
            raise _refused(top, name.replace("\0", "/"), "is that of a file and of a directory")


def _refused(top: str, name: str, why: str) -> CheckpointInvalidError:
    return CheckpointInvalidError(
        f"{top}: the name {encodable(name)[:200]!r} {why}, so that it cannot be made at the client; rename "
        "the file, or leave it out by `ignore`",
        file=top,
    )


def _compiled(patterns: Iterable[str]) -> list[re.Pattern[str]]:
    whole = (pattern + "*" if pattern.endswith("/") else pattern for pattern in patterns)
    return [re.compile(fnmatch.translate(pattern)) for pattern in dict.fromkeys(whole)]


def _matches(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    return any(pattern.match(name) for pattern in patterns)
