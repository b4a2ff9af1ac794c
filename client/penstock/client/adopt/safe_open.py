"""`safe_open`, `load_file` and `load_model` of the safetensors library (0.8), read through a daemon.

The library itself checks the arguments: it opens an empty file in memory with them.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .. import errors
from ..client import StreamerClient
from ..system import missing
from .safe_file import SafeFile

missing.need("safetensors")

import safetensors  # noqa: E402
from safetensors import SafetensorError  # noqa: E402

from .safe_errors import REFUSALS, as_library  # noqa: E402
from .safe_parts import as_numpy, numpy_part  # noqa: E402

if TYPE_CHECKING:
    import torch

    from ..system.sizes import Source

library_open: Any = safetensors.safe_open
"""The library's own class, even while `patch_safetensors` replaces it."""
_EMPTY_FILE = b"\x08\0\0\0\0\0\0\0{}      "
_T = TypeVar("_T")


class safe_open:
    """Opens a safetensors file, and returns tensors or parts of them; a context manager.

    filename: a path, or a URI that the daemon reads.
    framework: "pt" or "np" (and their longer names).
    device: where tensors go, for "pt": "cpu", "cuda:0", ...
    backend: checked as the library does, and without effect: the daemon reads.
    client: the daemon to read through; None is the one in $PENSTOCK_SOCKET_DIR or /run/penstock.

    Raises SafetensorError for a damaged file, a missing tensor and a closed file, FileNotFoundError for a
    missing file, and the errors of `penstock.client.errors` if the daemon refuses.
    """

    def __init__(
        self,
        filename: Source,
        framework: str,
        device: Any = "cpu",
        *,
        backend: str = "mmap",
        client: StreamerClient | None = None,
        rescue: Callable[[errors.PenstockError], Any] | None = None,
    ) -> None:
        """`rescue` opens the file with the library if the daemon refuses it, even in the middle."""
        if not isinstance(filename, (str, os.PathLike)):
            raise TypeError(f"filename={filename!r} is no path: give a str or an os.PathLike")
        _check_arguments(framework, device, backend)
        if framework not in FRAMEWORKS:
            raise SafetensorError(
                f"framework {framework!r} is not read through a daemon: use 'pt' or 'np', or the safetensors "
                "library"
            )
        if os.path.isdir(filename):
            raise IsADirectoryError(
                f"{os.fspath(filename)} is a directory: name a file in it, or use StreamerClient.load()"
            )
        self._filename = os.fspath(filename)
        self._handle: _Handle | None = _Handle(
            self._filename, FRAMEWORKS[framework], _device(device), client or StreamerClient(), rescue
        )

    def __enter__(self) -> safe_open:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file. Tensors and slices stay valid."""
        self._handle = None

    def keys(self) -> list[str]:
        """Names of the tensors, sorted."""
        return self._open.through(lambda file: sorted(file.entries), lambda other: other.keys())

    def offset_keys(self) -> list[str]:
        """Names of the tensors, in the order of the file."""
        return self._open.through(lambda file: list(file.entries), lambda other: other.offset_keys())

    def metadata(self) -> dict[str, str] | None:
        """The file's metadata; None if it has none."""
        metadata: dict[str, str] | None = self._open.through(
            lambda file: dict(file.metadata) or None, lambda other: other.metadata()
        )
        return metadata

    def get_tensor(self, name: str) -> Any:
        """The tensor, on the device. On the CPU it may be a view of the staging buffer, and is writable."""
        return self._open.tensor(name)

    def get_tensors(self) -> dict[str, Any]:
        """Every tensor by name, in the order of the file, by one load."""
        return self._open.tensors()

    def get_slice(self, name: str) -> SafeSlice:
        """An object that returns parts of the tensor, also after the file was closed."""
        self._open.entry(name)
        return SafeSlice(self._open, name)

    @property
    def _open(self) -> _Handle:
        if self._handle is None:
            raise SafetensorError(f"{self._filename} is closed: open it again")
        return self._handle

    def __reduce__(self) -> NoReturn:
        _refuse_pickling(self._filename)

    def __repr__(self) -> str:
        return f"<safe_open of {self._filename} through penstock>"


class SafeSlice:
    """One tensor of an open file; `slice[index]` gives that part of it."""

    def __init__(self, handle: _Handle, name: str) -> None:
        self._handle, self._name = handle, name

    def __getitem__(self, index: Any) -> Any:
        """As torch indexes a tensor. With numpy: integers, slices that go forward within the tensor, and
        an ellipsis."""
        return self._handle.part(self._name, index)

    def get_shape(self) -> list[int]:
        """As in the file: for F4, twice what torch shows in the last dimension."""
        return list(self._handle.entry(self._name).shape)

    def get_dtype(self) -> str:
        """As in the file: "F32", "BF16", ..."""
        return str(self._handle.entry(self._name).dtype)

    def __reduce__(self) -> NoReturn:
        _refuse_pickling(self._name)


class _Handle:
    """An open file as a framework sees it; shared by `safe_open` and its slices."""

    def __init__(
        self,
        filename: str,
        framework: str,
        device: str,
        client: StreamerClient,
        rescue: Callable[[errors.PenstockError], Any] | None,
    ) -> None:
        self._filename, self._framework, self._device, self._rescue = filename, framework, device, rescue
        self._library: Any = None
        with as_library():
            self._file = SafeFile(client, filename)

    def through(self, ours: Callable[[SafeFile], _T], theirs: Callable[[Any], _T]) -> _T:
        """The daemon's answer; once it refused and there is a rescue, the library's."""
        if self._library is None:
            try:
                with as_library():
                    return ours(self._file)
            except REFUSALS as error:
                if self._rescue is None:
                    raise
                self._library = self._rescue(error)
        return theirs(self._library)

    def entry(self, name: str) -> Any:
        """Shape and dtype of a tensor. Raises TypeError, SafetensorError."""
        if not isinstance(name, str):
            raise TypeError(f"name={name!r} is no name of a tensor: give a str")
        entry = self._file.entries.get(name)
        if entry is None:
            raise SafetensorError(
                f"{self._filename} does not contain tensor {name}: see keys() for the names that it has"
            )
        return entry

    def tensor(self, name: str) -> Any:
        self.entry(name)
        return self.through(
            lambda file: self._converted(file.get(name)), lambda other: other.get_tensor(name)
        )

    def tensors(self) -> dict[str, Any]:
        def ours(file: SafeFile) -> dict[str, Any]:
            if self._framework == "pt":
                return file.get_all(self._device)
            return {name: as_numpy(tensor).copy() for name, tensor in file.get_all("cpu").items()}

        return self.through(ours, lambda other: other.get_tensors())

    def part(self, name: str, index: Any) -> Any:
        shape = list(self.entry(name).shape)

        def ours(file: SafeFile) -> Any:
            whole = file.get(name)
            if self._framework == "np":
                return numpy_part(as_numpy(whole), index)
            return self._converted(whole.view(shape)[index])

        return self.through(ours, lambda other: other.get_slice(name)[index])

    def _converted(self, tensor: torch.Tensor) -> Any:
        if self._framework == "np":
            return as_numpy(tensor).copy()
        return tensor if self._device == "cpu" else tensor.to(self._device)


def load_file(
    filename: Source,
    device: Any = "cpu",
    *,
    backend: str = "mmap",
    client: StreamerClient | None = None,
) -> dict[str, torch.Tensor]:
    """Every tensor of the file, as `safetensors.torch.load_file` returns them; arguments as in
    `safe_open`."""
    with safe_open(filename, "pt", device, backend=backend, client=client) as file:
        return file.get_tensors()


def load_model(
    model: torch.nn.Module,
    filename: Source,
    strict: bool = True,
    device: Any = "cpu",
    *,
    backend: str = "mmap",
    client: StreamerClient | None = None,
) -> tuple[list[str], list[str]]:
    """Fills a module as `safetensors.torch.load_model` does: its own code runs, with another `load_file`.

    Returns (missing, unexpected). Raises RuntimeError for names that do not fit, if `strict`.
    """
    import safetensors.torch as library

    def load(filename: Source, **options: Any) -> dict[str, torch.Tensor]:
        return load_file(filename, client=client, **options)

    theirs = library.load_model
    ours = types.FunctionType(
        theirs.__code__, {**vars(library), "load_file": load}, argdefs=theirs.__defaults__
    )
    ours.__kwdefaults__ = theirs.__kwdefaults__
    options = {} if backend == "mmap" else {"backend": backend}
    result: tuple[list[str], list[str]] = ours(model, filename, strict, device, **options)
    return result


def _check_arguments(framework: Any, device: Any, backend: Any) -> None:
    """Raises the library's errors for these arguments."""
    fd = os.memfd_create("penstock-arguments")
    try:
        os.write(fd, _EMPTY_FILE)
        options = {} if backend == "mmap" else {"backend": backend}  # older versions have none
        library_open(f"/proc/self/fd/{fd}", framework, device, **options)
    finally:
        os.close(fd)


FRAMEWORKS = {"pt": "pt", "torch": "pt", "pytorch": "pt", "np": "np", "numpy": "np"}
"""Frameworks that are read through a daemon."""


def _device(device: Any) -> str:
    if device is None:
        return "cpu"
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _refuse_pickling(what: str) -> NoReturn:
    raise TypeError(
        f"{what} is open in this process, whose memory it is in, and cannot be pickled: open it in the other "
        "process"
    )
