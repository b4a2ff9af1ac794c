"""`SafetensorsStreamer` with the interface of runai_model_streamer 0.17, served by a penstock daemon.

    - from runai_model_streamer import SafetensorsStreamer
    + from penstock.client import SafetensorsStreamer

docs/migrate.md lists what differs. A wrong argument, a damaged checkpoint and a refused access are a
ValueError, as there. If no daemon answers, that is a PenstockError.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .. import errors
from .ambient import S3Credentials, ambient_client, is_private
from .ranks import shared_group

if TYPE_CHECKING:
    import torch

    from ..load import Load

OBJECT_SCHEMES = ("s3://", "gs://", "az://", "abfss://", "hf://", "https://", "http://")
_CONTAINERS = {"bucket", "container", "repository"}
"""Details of an error that name a missing bucket, container or repository."""
_HUB_MODELS = "hf://models/"
_PRIVATE_LIMIT_BYTES = 40_000_000_000
"""The limit of runai_model_streamer if RUNAI_STREAMER_MEMORY_LIMIT is not set."""
_INVALID = (
    errors.AccessDeniedError,
    errors.CheckpointChangedError,
    errors.CheckpointInvalidError,
    errors.CheckpointNotFoundError,
    errors.InvalidRequestError,
    errors.MemoryLimitTooSmallError,
    errors.SourceUnavailableError,
    errors.TensorNotFoundError,
    errors.UnsupportedDtypeError,
)


class SafetensorsStreamer:
    """Streams the tensors of safetensors files; a context manager.

        with SafetensorsStreamer() as streamer:
            streamer.stream_files(paths)
            for name, tensor in streamer.get_tensors():
                ...

    Uses the daemon in $PENSTOCK_SOCKET_DIR, else the one in /run/penstock. Else it starts a private daemon,
    which ends with this process.
    """

    def __init__(self) -> None:
        self._entered = False
        self._load: Load | None = None
        self._tensors: Iterator[tuple[str, torch.Tensor]] = iter(())
        self.total_size = 0
        """Bytes of the tensors of the last `stream_files()`."""
        self.device_str: str | None = None
        """The device of the tensors, as the caller named it."""
        self.files_to_tensors_metadata: dict[int, Sequence[int]] = {}
        """Has as many entries, over all its values, as there are tensors, for callers that count them."""

    def __enter__(self) -> SafetensorsStreamer:
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        self._end()

    def __repr__(self) -> str:
        return f"<SafetensorsStreamer: {self._load or 'idle'}>"

    def stream_file(
        self,
        path: str,
        s3_credentials: Any = None,
        device: str | torch.device | None = "cpu",
        is_distributed: bool = False,
        tensor_names: Collection[str] | None = None,
        owned: bool = True,
    ) -> None:
        """`stream_files()` of one file."""
        self.stream_files([path], s3_credentials, device, is_distributed, tensor_names, owned)

    def stream_files(
        self,
        paths: Sequence[str],
        s3_credentials: Any = None,
        device: str | torch.device | None = "cpu",
        is_distributed: bool = False,
        tensor_names: Collection[str] | None = None,
        owned: bool = True,
    ) -> None:
        """Opens the files; `get_tensors()` yields their tensors.

        paths: safetensors files, or URIs of such files in object storage; not directories.
        s3_credentials: an S3Credentials, used for s3:// only. A private daemon is started with them. A daemon
            that others use too reads with its own credentials, and refuses these.
        device: where the tensors go; None is the CPU.
        is_distributed: all ranks of torch.distributed call this together. Those that ask one daemon for the
            same tensors share one pass over the storage. Nothing is sent from rank to rank.
        tensor_names: only these tensors. Each must be in exactly one of the files.
        owned: False saves copies; a tensor is then valid until the next one is asked for.

        Raises ValueError for wrong arguments or files, TypeError for arguments of a wrong type,
        DaemonUnavailableError if no daemon answers.
        """
        names = _checked_names(tensor_names)
        sources = _checked_paths(paths)
        if not self._entered:
            raise ValueError("this SafetensorsStreamer is not open: use it in a with statement")
        if self._load is not None and self._load.tensor_count:
            raise ValueError(
                "the tensors of the stream before were not all taken: exhaust or close get_tensors() first"
            )
        self._end()
        self.device_str = device if device is None else str(device)
        self.total_size, self.files_to_tensors_metadata = 0, {}
        distributed = is_distributed and _distribution_wanted()
        if not sources:
            if names:
                raise ValueError(
                    f"tensor_names not found in checkpoint: {sorted(names)}; paths is empty, name the files "
                    "that have them"
                )
            return
        client = ambient_client(S3Credentials.for_source(sources[0], s3_credentials))
        private = is_private(client)
        group = None
        if distributed and not private:
            group = shared_group(client.socket_dir, (tuple(sources), names))
        with _as_value_error():
            load = client.load(
                sources,
                device="cpu" if device is None else device,
                tensors=names,
                memory_limit=_private_limit() if private else None,
                owned=owned,
                group=group,
            )
        try:
            _check_found(load, sources, names)
        except BaseException:
            load.close()
            raise
        self._load, self._tensors = load, iter(load)
        self.total_size = load.total_bytes
        self.files_to_tensors_metadata = {0: range(load.tensor_count)}

    def get_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor) in the order of the files, and of the tensors in each."""
        if not self._entered:
            raise ValueError("this SafetensorsStreamer is not open: use it in a with statement")
        load = self._load
        try:
            with _as_value_error():
                yield from self._tensors
        finally:
            if load is self._load:
                self._end()

    def _end(self) -> None:
        load, self._load, self._tensors = self._load, None, iter(())
        if load is not None:
            load.close()


def list_safetensors(path: str, s3_credentials: Any = None) -> list[str]:
    """The safetensors files of a directory, or of a prefix in object storage with or without its last slash,
    sorted. Files in directories below it are left out. No file is read. Empty if there are none. Web servers
    have no lists.

    Credentials as in `SafetensorsStreamer.stream_files()`. Raises ValueError if the bucket or repository does
    not exist, or the daemon refuses this user.
    """
    if not _object_scheme(path):
        return _safetensors_in(path)
    client = ambient_client(S3Credentials.for_source(path, s3_credentials))
    prefix = os.path.join(path, "")  # with a slash, as the name alone may be an object's
    try:
        with _as_value_error():
            names = client.list_files(prefix, allow="*.safetensors", ignore="*/*")
    except ValueError as error:
        cause = error.__cause__
        if isinstance(cause, errors.CheckpointNotFoundError) and not _CONTAINERS & set(cause.details):
            return []
        raise
    return sorted(_as_told(prefix) + name for name in names)


def _safetensors_in(directory: str) -> list[str]:
    """As `directory/*.safetensors` in a shell, but with the directory's name taken literally."""
    try:
        names = os.listdir(directory or os.curdir)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    return sorted(os.path.join(directory, name) for name in found)


def _checked_names(tensor_names: Collection[str] | None) -> frozenset[str] | None:
    if tensor_names is None:
        return None
    if isinstance(tensor_names, str):
        raise ValueError(f"tensor_names={tensor_names!r} is one name: give a collection of names")
    if len(tensor_names) == 0:
        raise ValueError("tensor_names is empty; give None to stream every tensor")
    strange = [name for name in tensor_names if not isinstance(name, str)]
    if strange:
        hash(strange[0])
        raise ValueError(f"tensor_names not found in checkpoint: {strange[:3]}; give names as str")
    return frozenset(tensor_names)


def _checked_paths(paths: Sequence[str]) -> list[str]:
    """Absolute paths, so that ranks with other working directories ask for the same files."""
    if isinstance(paths, str):
        raise ValueError(f"paths={paths!r} is one path: give a list of paths, or use stream_file()")
    count = len(paths)
    for path in paths:
        if not isinstance(path, str):
            raise TypeError(f"the path {path!r} is a {type(path).__name__}: give a str")
    schemes = {_object_scheme(path) for path in paths}
    if len(schemes) > 1:
        raise ValueError(
            f"{count} paths of several kinds ({', '.join(sorted(schemes))}) in one stream; stream those of "
            "each kind by a call of their own"
        )
    if schemes != {""}:
        return [_as_told(path) for path in paths]
    for path in paths:
        if not path or path.endswith("/"):
            raise ValueError(f"{path!r} is no path of a file: name a safetensors file")
    return [os.path.abspath(path) for path in paths]


def _object_scheme(path: str) -> str:
    """The URI's scheme; empty for a path. Raises ValueError for upper case, which the daemon refuses too."""
    scheme = next((scheme for scheme in OBJECT_SCHEMES if path[: len(scheme)].lower() == scheme), "")
    if not path.startswith(scheme):
        raise ValueError(f"{path[:200]!r} has its scheme in upper case: write {scheme} in lower case")
    return scheme


def _as_told(uri: str) -> str:
    """The URI as the daemon writes it: without `models/`, as the daemon loads only models from the Hub."""
    return f"hf://{uri.removeprefix(_HUB_MODELS)}" if uri.startswith(_HUB_MODELS) else uri


def _check_found(load: Load, sources: Sequence[str], names: Collection[str] | None) -> None:
    """Checks that every source is a file of its own, and every name is in one file only."""
    found = [file.uri for file in load.files]
    for source, uri in zip(sources, found, strict=False):
        if uri != source:
            raise ValueError(
                f"{source} is no safetensors file; call list_safetensors() for those of a directory"
            )
    if len(found) != len(sources):
        raise ValueError(f"the {len(sources)} paths name {len(found)} files: give the files themselves")
    if names is not None and load.tensor_count != len(names):
        raise ValueError(
            f"tensor_names has {len(names)} names and the files have {load.tensor_count} tensors of these "
            "names, as some are in more than one file: name the files that have each of them once"
        )


def _distribution_wanted() -> bool:
    wanted = os.environ.get("RUNAI_STREAMER_DIST", "auto")
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"RUNAI_STREAMER_DIST={wanted!r} is not understood: set it to 0, 1 or auto")
    return wanted != "0"


def _private_limit() -> int | None:
    """The limit of a private daemon. By default it is that of runai_model_streamer, which is used to bound
    memory."""
    given = any(os.environ.get(name) for name in ("PENSTOCK_MEMORY_LIMIT", "RUNAI_STREAMER_MEMORY_LIMIT"))
    return None if given else _PRIVATE_LIMIT_BYTES


@contextmanager
def _as_value_error() -> Iterator[None]:
    try:
        yield
    except _INVALID as error:
        raise ValueError(str(error)) from error
