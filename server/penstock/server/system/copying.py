"""Copying between pieces of memory without the interpreter's lock."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence


def _address(view: memoryview) -> int:
    """The address of a writable view."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def copy(parts: Sequence[memoryview], target: memoryview) -> None:
    """Copies the parts, one after the other, to the start of the target, which must be long enough."""
    at = 0
    for part in parts:
        _copy(part, target[at : at + len(part)])
        at += len(part)


def spread(data: memoryview, targets: Sequence[memoryview]) -> None:
    """Copies the data into the targets, one after the other. Together they must be long enough."""
    at = 0
    for target in targets:
        count = min(len(target), len(data) - at)
        _copy(data[at : at + count], target[:count])
        at += count


def _copy(source: memoryview, target: memoryview) -> None:
    """Both have the same length."""
    if source.readonly or len(source) < 4096:
        target[:] = source
    else:
        ctypes.memmove(_address(target), _address(source), len(source))  # ctypes releases the lock
