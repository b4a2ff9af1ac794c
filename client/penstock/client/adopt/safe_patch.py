"""Replaces the safetensors library's `safe_open` by Penstock's, and undoes that.

All functions of that library that read files (`load_file` and `load_model`, for each framework) look
`safe_open` up in its module when they are called. So do transformers, diffusers, PEFT and accelerate. So it
suffices to replace that class, in every module that has it under any name: modules that imported it by `from
safetensors import safe_open` before the patch are covered too. The class itself is built in, and cannot be
changed. Code that keeps it elsewhere since before the patch, for example as a default argument, goes on with
the library's.

Code that keeps Penstock's class after the patch was undone opens files with the library again.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from types import ModuleType, TracebackType
from typing import Any

from .. import errors
from ..client import StreamerClient
from .safe_errors import REFUSALS
from .safe_open import FRAMEWORKS, library_open, safe_open

VARIABLE = "PENSTOCK_PATCH_SAFETENSORS"
_ON, _OFF = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}
_OWN_PACKAGE = __name__.partition(".adopt.")[0]

_lock = threading.Lock()
# The last one counts. The list is replaced and not changed: readers take no lock, which a fork could leave
# held.
_active: tuple[SafetensorsPatch, ...] = ()
_told: set[tuple[int, str]] = set()


def patch_safetensors(client: StreamerClient | None = None) -> SafetensorsPatch:
    """From now on, code that reads through the safetensors library reads through a daemon.

        patch_safetensors()
        model = AutoModelForCausalLM.from_pretrained("/models/llama-3-8b")

    or, to undo it at the end of a block, `with patch_safetensors(): ...`. May be called again, and by any
    thread. The library is itself again when every returned object has been undone.

    The library reads files that the daemon does not serve to this process, as before, with one
    FallbackWarning for each reason. A damaged file is an error, as it is for the library.

    client: the daemon to read through; None is the one in $PENSTOCK_SOCKET_DIR or /run/penstock at the time
    when a file is opened.

    Raises ModuleNotFoundError if safetensors is not installed.
    """
    global _active
    patch = SafetensorsPatch(client)
    with _lock:
        first, _active = not _active, (*_active, patch)
        if first:
            _rebind(library_open, PatchedOpen)
    return patch


def patch_as_asked() -> None:
    """Patches if PENSTOCK_PATCH_SAFETENSORS asks for it. Raises ValueError for a value that is neither yes
    nor no."""
    asked = os.environ.get(VARIABLE, "").strip().lower()
    if asked in _ON:
        patch_safetensors()
    elif asked not in _OFF:
        raise ValueError(
            f"{VARIABLE}={asked!r} is neither yes nor no: set 1 to read safetensors through the daemon, or 0"
        )


class SafetensorsPatch:
    """The patch of one `patch_safetensors()` call, until `undo()`; a context manager."""

    def __init__(self, client: StreamerClient | None) -> None:
        self._client = client

    @property
    def client(self) -> StreamerClient:
        return self._client or StreamerClient()

    def undo(self) -> None:
        """May be called again. Open files stay open."""
        global _active
        with _lock:
            if self not in _active:
                return
            _active = tuple(patch for patch in _active if patch is not self)
            if not _active:
                _rebind(PatchedOpen, library_open)

    def __enter__(self) -> SafetensorsPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


class _Kind(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, (library_open, safe_open))


class PatchedOpen(metaclass=_Kind):
    """Replaces `safetensors.safe_open`: opens through the daemon if possible, else with the library."""

    def __new__(cls, filename: Any, framework: Any, device: Any = "cpu", **options: Any) -> Any:
        def by_library() -> Any:
            return library_open(filename, framework, device, **options)

        active = _active
        if not active or framework not in FRAMEWORKS or not _is_file(filename):
            return by_library()
        path = os.path.abspath(filename)
        before = _identity(path)

        def rescue(error: errors.PenstockError) -> Any:
            if _identity(path) != before:
                raise _changed(path) from error
            _tell(path, error)
            return library_open(path, framework, device, **options)

        try:
            return safe_open(path, framework, device, client=active[-1].client, rescue=rescue, **options)
        except REFUSALS as error:
            _tell(path, error)
        return by_library()


PatchedOpen.__name__ = PatchedOpen.__qualname__ = "safe_open"


def _is_file(filename: Any) -> bool:
    """Whether it is the path of a file. For anything else the library raises its own error."""
    return isinstance(filename, (str, os.PathLike)) and os.path.isfile(filename)


def _identity(path: str) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _changed(path: str) -> errors.CheckpointChangedError:
    return errors.CheckpointChangedError(f"{path} changed while it was read; load it again")


def _tell(path: str, error: errors.PenstockError) -> None:
    reason = (os.getpid(), type(error).__name__)
    if reason in _told:
        return
    _told.add(reason)
    warnings.warn(
        f"the safetensors library reads {path} itself, and will read others that the daemon refuses for the "
        f"same reason without another warning: {error}",
        errors.FallbackWarning,
        stacklevel=4,
    )


def _rebind(old: object, new: object) -> None:
    """Replaces `old` in the namespaces of all modules, without making lazy ones import anything."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or _is_own(module.__dict__.get("__name__")):
            continue
        for name, value in list(vars(module).items()):
            if value is old:
                vars(module)[name] = new


def _is_own(name: object) -> bool:
    return isinstance(name, str) and f"{name}.".startswith(f"{_OWN_PACKAGE}.")
