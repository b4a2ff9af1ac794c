"""From sizes and sources as people write them to the values of the wire."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

_FACTORS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _FACTORS[_letter] = _FACTORS[f"{_letter}b"] = 1000**_power
    _FACTORS[f"{_letter}i"] = _FACTORS[f"{_letter}ib"] = 1024**_power
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_MAX_BYTES = 2**63 - 1
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://", re.ASCII)
# The first that is set counts; users of the Run:ai streamer have the second.
_LIMIT_VARIABLES = ("PENSTOCK_MEMORY_LIMIT", "RUNAI_STREAMER_MEMORY_LIMIT")

_PINNED_VARIABLE = "PENSTOCK_PINNED_BYTES"
_PINNED_BYTES = 512 << 20
_LEAST_PINNED_BYTES = 1 << 20

Source = str | os.PathLike[str]


def parse_memory_limit(limit: int | str | None) -> int | None:
    """Bytes, 0 for just enough for the largest tensor, None for as much as the daemon allows.

    `limit` is a number of bytes or text such as "4GB", "4GiB", "4000000000"; -1 is no wish; None takes
    PENSTOCK_MEMORY_LIMIT, else RUNAI_STREAMER_MEMORY_LIMIT, else -1. Raises ValueError.
    """
    origin = ""
    if limit is None:
        origin = next((name for name in _LIMIT_VARIABLES if os.environ.get(name, "").strip()), "")
        if not origin:
            return None
        limit = os.environ[origin]
    if isinstance(limit, bool) or not isinstance(limit, (int, str)):
        raise TypeError(f"memory_limit={limit!r} is no size: give an int, a str or None")
    size_bytes = _parse(limit, origin or "memory_limit")
    return None if size_bytes == -1 else size_bytes


def _parse(limit: int | str, origin: str) -> int:
    if isinstance(limit, str):
        match = _SIZE.fullmatch(limit)
        factor = _FACTORS.get(match[2].lower()) if match else None
        if match is not None and factor is not None:
            value = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
        elif limit.strip() == "-1":
            value = -1
        else:
            value = -2
    else:
        value = limit
    if not -1 <= value <= _MAX_BYTES:
        raise ValueError(
            f"{origin}={limit!r} is not a memory limit: write -1 (what the daemon allows), 0 (as little as "
            "possible), bytes, or a number with a unit such as 4GB or 4GiB"
        )
    return value


def parse_size(argument: str, size: int | str | None) -> int | None:
    """Bytes, from a number or from text such as "4GB" or "4GiB"; None is none. Raises ValueError that names
    the argument."""
    if size is None:
        return None
    match = _SIZE.fullmatch(str(size))
    factor = _FACTORS.get(match[2].lower()) if match and not isinstance(size, bool) else None
    size_bytes = int(float(match[1]) * factor) if match and factor and "." in match[1] else -1
    if match and factor and "." not in match[1]:
        size_bytes = int(match[1]) * factor
    if not 0 <= size_bytes <= _MAX_BYTES:
        raise ValueError(
            f"{argument}={size!r} is not a size: write bytes, or a number with a unit such as 4GB or 4GiB"
        )
    return size_bytes


def pinned_bytes() -> int:
    """The most host memory that a load to a CUDA device may pin: $PENSTOCK_PINNED_BYTES, else 512 MiB.

    Raises ValueError for a text that is no size, and for a size too small to copy through.
    """
    text = os.environ.get(_PINNED_VARIABLE, "").strip()
    if not text:
        return _PINNED_BYTES
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    size_bytes = int(float(match[1]) * factor) if match and factor else 0
    if not _LEAST_PINNED_BYTES <= size_bytes <= _MAX_BYTES:
        raise ValueError(
            f"{_PINNED_VARIABLE}={text!r} is not a size that can be copied through: write bytes or a number "
            "with a unit, such as 256MiB; 1MiB is the least"
        )
    return size_bytes


def absolute_sources(source: Source | Iterable[Source]) -> list[str]:
    """The sources of a request: URIs as they are, paths made absolute (symlinks and `~` kept).

    Raises ValueError for no source, an empty one, or a name that is not UTF-8.
    """
    if not isinstance(source, (str, os.PathLike, Iterable)) or isinstance(source, bytes):
        raise TypeError(f"source={source!r} is no source: give a path, a URI or a list of these")
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    if not sources:
        raise ValueError("source is an empty list: name a file, a directory or a URI")
    return [_absolute(one) for one in sources]


def _absolute(source: Source) -> str:
    text = os.fspath(source)
    if not isinstance(text, str):
        raise TypeError(
            f"the source {source!r} is a path of {type(text).__name__}: give a str, or a path of str"
        )
    if not text or "\0" in text:
        raise ValueError(f"the source {text!r} is no path: name a file, a directory or a URI")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the path {text!r} is not valid UTF-8, which the daemon needs: rename it"
        ) from error
    return text if _URI.match(text) else os.path.abspath(text)


def show_bytes(size_bytes: float) -> str:
    """`4.02 GB`, for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.2f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.2f} TB"
