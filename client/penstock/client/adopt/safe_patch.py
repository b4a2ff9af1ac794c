"""Puts our `safe_open` in the place of the safetensors library's, and takes it away again.

Every reader of files in that library (`load_file` and `load_model`, for each framework) looks `safe_open` up
in its module when it is called. So do transformers, diffusers, PEFT and accelerate. So that class is all
there is to replace, in every module that has it under any name: modules that took it by `from safetensors
import safe_open` before the patch have it too. The class itself is built in, and cannot be changed. Code that
keeps it elsewhere since before the patch, as a default argument say, goes on with the library's.

Code that keeps ours after the patch was undone opens files with the library again.
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
from .safe_open import FRAMEWORKS, REFUSALS, library_open, safe_open

VARIABLE = "PENSTOCK_PATCH_SAFETENSORS"
_ON, _OFF = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}
_OWN_PACKAGE = __name__.partition(".adopt.")[0]

_lock = threading.Lock()
# The last one decides. Replaced, not changed: readers take no lock, which a fork could leave taken.
_active: tuple[SafetensorsPatch, ...] = ()
_told: set[tuple[int, str]] = set()


def patch_safetensors(client: StreamerClient | None = None) -> SafetensorsPatch:
    """Makes whatever reads through the safetensors library read through a daemon, from now on.

        patch_safetensors()
        model = AutoModelForCausalLM.from_pretrained("/models/llama-3-8b")

    or, to undo it at the end of a block, `with patch_safetensors(): ...`. May be called again, and by any
    thread: the library is itself again when everything that was returned has been undone.

    Files that the daemon does not serve to this process are read by the library as before, with one
    FallbackWarning for each reason. A damaged file is an error, as it is for the library.

    client: the daemon to read through; None is the one in $PENSTOCK_SOCKET_DIR or /run/penstock, as it is
        when a file is opened.

    Raises ModuleNotFoundError where safetensors is not installed.
    """
    global _active
    patch = SafetensorsPatch(client)
    with _lock:
        first, _active = not _active, (*_active, patch)
        if first:
            _rebind(library_open, PatchedOpen)
    return patch


def patch_as_asked() -> None:
    """If PENSTOCK_PATCH_SAFETENSORS says so. Raises ValueError for what is neither yes nor no."""
    asked = os.environ.get(VARIABLE, "").strip().lower()
    if asked in _ON:
        patch_safetensors()
    elif asked not in _OFF:
        raise ValueError(
            f"{VARIABLE}={asked!r} is neither yes nor no: set 1 to read safetensors through the daemon, or 0"
        )


class SafetensorsPatch:
    """What `patch_safetensors()` did, until `undo()`; a context manager."""

    def __init__(self, client: StreamerClient | None) -> None:
        self._client = client

    @property
    def client(self) -> StreamerClient:
        return self._client or StreamerClient()

    def undo(self) -> None:
        """May be called again. Files that are open stay open."""
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
    """Stands for `safetensors.safe_open`: opens through the daemon if it can, else with the library."""

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
    """What is none is for the library to complain of."""
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
    """In the namespaces of all modules; lazy ones are not made to import anything."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or _is_own(module.__dict__.get("__name__")):
            continue
        for name, value in list(vars(module).items()):
            if value is old:
                vars(module)[name] = new


def _is_own(name: object) -> bool:
    return isinstance(name, str) and f"{name}.".startswith(f"{_OWN_PACKAGE}.")
