"""Which files of a tree a fetch takes, and which names it refuses. Pure."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
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
"""Unless the caller says what to take: weights, in whatever format, and what belongs to no model."""
_RECORDS = (".penstock.json", "*/.penstock.json")
"""By which a client knows again what it fetched (`system/trees.py` there): no file of a model, ever."""
MAX_PATTERNS = 32
MAX_PATTERN_CHARACTERS = 256
MAX_PART_BYTES = 255
"""Of a name between slashes: no file system takes more."""
MAX_NAME_BYTES = 1024
"""As many as a key of an object store has at most."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Choice:
    """By patterns as in a shell, of whole relative names; `*` matches `/` too. A pattern that ends in `/`
    stands for all below it."""

    def __init__(self, allow: Iterable[str], ignore: Iterable[str]) -> None:
        """Raises InvalidRequestError for too many patterns, or too long ones."""
        allowed, ignored = list(allow), list(ignore)
        for field, patterns in (("allow", allowed), ("ignore", ignored)):
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
        self._allowed = _compiled(allowed) if allowed else None
        ignored += _RECORDS if allowed else (*LEFT_OUT, *_RECORDS)
        self._ignored = _compiled(ignored)
        self._pruned = _compiled(pattern for pattern in ignored if pattern.endswith(("*", "/")))

    def wanted(self, name: str) -> bool:
        """As `sources.Wanted`."""
        if name.endswith("/"):
            # What matches `name/` and ends in `*` matches all that begins so.
            return not _matches(self._pruned, name)
        return (self._allowed is None or _matches(self._allowed, name)) and not _matches(self._ignored, name)


def check_name(top: str, name: str) -> None:
    """Raises CheckpointInvalidError for a name below `top` that can't be made below any directory, or could
    lead elsewhere."""
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
    """Raises CheckpointInvalidError if one name takes another's place. None has control characters."""
    # What lies below a name comes next to it in this order, as nothing sorts before `/` then.
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
