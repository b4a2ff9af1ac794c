"""StreamerClient: the interface to a daemon."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from . import errors, requests
from .requests import Selection
from .ring.calls import Calls
from .ring.socket_dir import socket_directory
from .system import descriptors
from .system.sizes import Source

if TYPE_CHECKING:
    import torch
    from torch.nn.modules.module import _IncompatibleKeys

    from penstock.v1.streamer_pb2 import OpenLoad

    from .embedded import EmbeddedDaemon
    from .load import Load
    from .operations import Evicted
    from .prefetch import Prefetched
    from .ring.stream import Choose

_T = TypeVar("_T")


class StreamerClient:
    """Loads checkpoints through the penstock daemon that listens in `socket_dir`.

    `socket_dir` defaults to $PENSTOCK_SOCKET_DIR, else /run/penstock. Nothing connects before the first
    call, and every call has a connection of its own: one client serves any number of threads.
    If the daemon goes away after it accepted a load or a prefetch, even if only into its queue, the call
    waits up to `reconnect_timeout` seconds for the next daemon.

    Every method raises DaemonUnavailableError if no daemon answers, and other errors of
    `penstock.client.errors` if the daemon refuses.
    """

    def __init__(
        self, socket_dir: str | os.PathLike[str] | None = None, *, reconnect_timeout: float = 60.0
    ) -> None:
        self.socket_dir = socket_directory(socket_dir)
        self._calls = Calls(self.socket_dir, reconnect_timeout=reconnect_timeout)
        self._daemon: EmbeddedDaemon | None = None
        self._loads: weakref.WeakSet[Load] = weakref.WeakSet()

    @classmethod
    def embedded(
        cls,
        memory_limit: int | str | None = -1,
        *,
        environment: Mapping[str, str | None] | None = None,
        **flags: Any,
    ) -> StreamerClient:
        """Starts a private daemon, which ends with this client, and returns a client of it.

        `flags` are penstockd's: `concurrency=4` is `--concurrency 4`, a list repeats the flag, True
        gives it without a value. `environment` has the changes to this process's environment for the
        daemon, such as credentials (None removes a variable). Needs the `server` extra.

        Raises ValueError for flags that make no sense here, such as `socket_dir`.
        """
        from .embedded import EmbeddedDaemon

        daemon = EmbeddedDaemon(memory_limit=memory_limit, flags=flags, environment=environment)
        # Nobody starts another private daemon after this one.
        client = cls(daemon.socket_dir, reconnect_timeout=0.0)
        client._daemon = daemon
        weakref.finalize(client, daemon.close)
        return client

    def load(
        self,
        source: Source | Iterable[Source],
        *,
        device: str | int | torch.device = "cpu",
        tensors: Selection | None = None,
        memory_limit: int | str | None = None,
        owned: bool = True,
        group: tuple[str, int] | None = None,
        variant: str | None = None,
        verify: str | None = None,
        digests: Mapping[str, str] | None = None,
        progress: bool = False,
    ) -> Load:
        """Opens a load of one checkpoint; iterate it for (name, tensor). Returns when it has begun.

        source: a safetensors file, a directory, an `*.index.json`, a URI, or a list of these that
            are loaded together. Relative paths start at this process's working directory.
        device: where the tensors are yielded. On "cuda:N" they are copies, made on a stream of the
            client's ahead of the one yielded and safe on the caller's current stream (docs/cuda.md).
        tensors: names to load, or a predicate over names; None is all.
        memory_limit: the most that this load may take of the staging buffer: bytes, "4GB", 0 for just
            enough for the largest tensor, -1 for as much as the daemon allows. None takes
            PENSTOCK_MEMORY_LIMIT or RUNAI_STREAMER_MEMORY_LIMIT from the environment, else -1.
        owned: a yielded tensor stays valid for as long as it is held, and may keep the checkpoint's
            staging memory with it. False saves a copy when the staging buffer is smaller than the
            checkpoint. A tensor is then valid only until the next iteration, and shows zeros or
            another tensor's bytes after it.
        group: (name, size): `size` loads under this name share one pass over the storage.
        variant: which variant to load from a directory that holds several, as in the names of the files:
            "fp16" for `model.fp16.safetensors`. None is the variant without such a name.
        verify: "auto" compares files with the CRCs that their stores keep. "require" also compares with a
            SHA-256 of the store or of SHA256SUMS beside the files, and refuses files that have no checksum.
            "off" compares nothing. None is the daemon's setting (penstockd --verify).
        digests: SHA-256 by the name or URI of a file. These files are verified in any case. A file that does
            not match ends the load with CheckpointCorruptError. Some of its tensors may have been yielded
            before.
        progress: shows a bar on stderr; needs tqdm.

        Raises a PenstockError for a problem of the source or the daemon, and ValueError for a bad argument.
        """
        import torch

        return self._open_load(
            source,
            lambda request: requests.choose(request, tensors),
            device=torch.device(device),
            memory_limit=memory_limit,
            owned=owned,
            group=group,
            variant=variant,
            verify=verify,
            digests=digests,
            progress=progress,
        )

    def load_state_dict(
        self,
        source: Source | Iterable[Source],
        *,
        device: str | int | torch.device = "cpu",
        tensors: Selection | None = None,
        memory_limit: int | str | None = None,
        variant: str | None = None,
        verify: str | None = None,
        digests: Mapping[str, str] | None = None,
        progress: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Loads all tensors into a dict; arguments as in `load()`.

        Raises DuplicateTensorError when two files hold a tensor of the same name.
        """
        state: dict[str, torch.Tensor] = {}
        with self.load(
            source,
            device=device,
            tensors=tensors,
            memory_limit=memory_limit,
            variant=variant,
            verify=verify,
            digests=digests,
            progress=progress,
        ) as load:
            for name, tensor in load:
                if name in state:
                    raise errors.DuplicateTensorError(
                        f"two files of the checkpoint hold a tensor {name!r}; iterate load() to get both",
                        load_id=load.load_id,
                    )
                state[name] = tensor
        return state

    def load_into(
        self,
        module: torch.nn.Module,
        source: Source | Iterable[Source],
        *,
        device: str | int | torch.device | None = None,
        strict: bool = True,
        dtype: torch.dtype | None = None,
        memory_limit: int | str | None = None,
        group: tuple[str, int] | None = None,
        variant: str | None = None,
        verify: str | None = None,
        digests: Mapping[str, str] | None = None,
        progress: bool = False,
    ) -> _IncompatibleKeys:
        """Fills a module with a checkpoint, as `module.load_state_dict` would, holding one tensor at a time.

        A parameter or buffer that has the right device and dtype is written in place. Any other is
        replaced, as are those on the meta device. On the CPU the new tensor is a view of the staging buffer
        if the checkpoint fits there, and leases it for as long as the module lives. Names that share a tensor
        are loaded once, and one of them in the checkpoint is enough. Dtypes are the module's, not the
        checkpoint's.

        Modules with state dict hooks, or that override how they load, get their tensors all at once by their
        own `load_state_dict`.

        device: the device for all tensors. None leaves each where it is, and takes the CPU for the meta
            device.
        strict: every name has to be in both. If False, names that are only in one are left alone, and
            reported.
        dtype: for floating-point tensors.
        memory_limit, group, variant, verify, digests, progress: as in `load()`.

        Returns (missing_keys, unexpected_keys). Raises RuntimeError for names, shapes or dtypes that do not
        fit, DuplicateTensorError for a name in two files, UnsupportedDtypeError for a dtype that torch lacks:
        all before anything is changed. A module whose own loading method looks at values can raise only at
        the end.
        """
        import torch

        from .module import fill

        open_load = functools.partial(
            self._open_load,
            source,
            memory_limit=memory_limit,
            group=group,
            variant=variant,
            verify=verify,
            digests=digests,
            progress=progress,
        )
        target = None if device is None else torch.device(device)
        return fill(module, open_load, device=target, dtype=dtype, strict=strict)

    def prefetch(
        self,
        source: Source | Iterable[Source],
        pin: bool = False,
        *,
        variant: str | None = None,
        verify: str | None = None,
        digests: Mapping[str, str] | None = None,
        progress: bool = False,
    ) -> Prefetched:
        """Reads a checkpoint into the staging buffer, and returns when it is there.

        `pin` keeps it there until `evict()`, whatever else needs the memory. `variant`, `verify` and
        `digests` are as in `load()`.
        `progress` shows a bar on stderr; needs tqdm.
        """
        from .prefetch import follow

        request = requests.prefetch(source, pin=pin, variant=variant, verify=verify, digests=digests)
        return self._calls.persist(
            lambda session, bar: follow(session, request, bar), "prefetch" if progress else None
        )

    def fetch(
        self,
        source: Source,
        directory: str | os.PathLike[str] | None = None,
        *,
        allow: str | Iterable[str] | None = None,
        ignore: str | Iterable[str] | None = None,
        max_bytes: int | str | None = None,
        max_files: int | None = None,
        progress: bool = False,
    ) -> Path:
        """Copies the files beside the weights, such as configuration, tokenizer and code. Returns the
        complete directory that holds them.

        source: a directory, or the URI of a prefix in an object store, with all files below it.
        directory: the target. It must be new, empty, or made by a fetch, and is replaced in one step. None is
            the cache, $PENSTOCK_CACHE_DIR or ~/.cache/penstock. Files that the cache has in the same version
            are not sent again. If a file has changed, the result is another directory. Do not write to it.
        allow, ignore: patterns of relative names, as in a shell, but `*` matches `/` too, and `code/` matches
            all files below it. None takes all files except weights (`*.safetensors`, `*.bin`, `*.pt`,
            `*.gguf` and so on) and files below `original/` and `.git/`. `ignore` wins.
        max_bytes, max_files: more is refused. None is 1 GiB and 10,000 files.
        progress: shows a bar on stderr; needs tqdm.

        Raises CheckpointInvalidError for too many bytes or files, or for names that cannot be created,
        CheckpointChangedError if a file changes meanwhile, and OSError if the directory cannot be written.
        After an error `directory` is as it was.
        """
        from .fetch import to_cache, to_place

        request = requests.fetch(source, allow=allow, ignore=ignore, max_bytes=max_bytes, max_files=max_files)
        return self._calls.persist(
            lambda session, bar: (
                to_cache(session, request, bar)
                if directory is None
                else to_place(session, request, Path(directory), bar)
            ),
            "fetch" if progress else None,
        )

    def fetch_into(
        self,
        source: Source,
        directory: str | os.PathLike[str],
        *,
        allow: str | Iterable[str] | None = None,
        ignore: str | Iterable[str] | None = None,
        max_bytes: int | str | None = None,
        max_files: int | None = None,
        progress: bool = False,
    ) -> None:
        """Copies files into a directory of the caller's, beside the files there; arguments as in `fetch()`.

        Nothing there changes before all files have arrived. Then each replaces the file of the same name. No
        versions are recorded, so each call copies all files.
        """
        from .fetch import into

        request = requests.fetch(source, allow=allow, ignore=ignore, max_bytes=max_bytes, max_files=max_files)
        place = Path(os.path.abspath(directory))
        self._calls.persist(
            lambda session, bar: into(session, request, place, bar), "fetch" if progress else None
        )

    def from_pretrained(self, cls: type[_T], source: Source, *arguments: Any, **options: Any) -> _T:
        """`cls.from_pretrained(source, …)` of transformers, with files and weights through the daemon.

        cls: a model's class or an Auto class, such as AutoModelForCausalLM.
        source: a directory, or a URI, which transformers alone could not load.
        arguments, options: those of transformers, such as `dtype`, `device_map` and `trust_remote_code`.
            Options about downloads have no effect.

        The model is equal to the one that transformers loads from a copy of the directory. Only safetensors
        weights are loaded. On the CPU its parameters may be views of the staging buffer, which the model then
        leases for as long as it lives. The files beside the weights are in the cache of `fetch()`, where
        `AutoTokenizer.from_pretrained(model.name_or_path)` finds it.
        """
        from .pretrained import from_pretrained

        made: _T = from_pretrained(self, cls, source, *arguments, **options)
        return made

    def list_files(
        self,
        source: Source,
        *,
        allow: str | Iterable[str] | None = "*",
        ignore: str | Iterable[str] | None = None,
    ) -> dict[str, int]:
        """Relative names of the files at or below a directory or prefix, and their sizes in bytes; arguments
        as in `fetch()`. At most 10,000 files."""
        from .fetch import listed

        request = requests.fetch(source, allow=allow, ignore=ignore, max_bytes=2**63 - 1, max_files=None)
        files = self._calls.persist(lambda session, bar: listed(session, request))
        return {file.name: file.size_bytes for file in files}

    def evict(self, source: Source | Iterable[Source] | None = None) -> Evicted:
        """Evicts the staged checkpoint `source`, pinned or not; None evicts every idle one."""
        from .operations import evict

        request = requests.evict(source)
        return self._calls.persist(lambda session, bar: evict(session, request))

    def status(self) -> dict[str, Any]:
        """The daemon's state: GetStatusResponse as dicts, lists, numbers and strings.

        Every field of the message has its name in streamer.proto. An optional field that is absent, such as
        `staging.limit_bytes` of an unlimited daemon, is None.
        """
        from .operations import status

        return self._calls.persist(lambda session, bar: status(session))

    def close(self) -> None:
        """Ends the loads that run, and the daemon that `embedded()` started. May be called again."""
        self._calls.close()
        for load in list(self._loads):
            load.close()
        if self._daemon is not None:
            self._daemon.close()

    def __enter__(self) -> StreamerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[], StreamerClient], tuple[()]]:
        """Pickled and copied as a new client of the same daemon, without loads. A private daemon still ends
        with the client that started it."""
        make = functools.partial(
            StreamerClient, os.fspath(self.socket_dir), reconnect_timeout=self._calls.reconnect_timeout
        )
        return make, ()

    def __repr__(self) -> str:
        kind = "embedded daemon" if self._daemon is not None else "daemon"
        state = ", closed" if self._calls.closed else ""
        return f"<StreamerClient of the {kind} in {self.socket_dir}{state}>"

    def _open_load(
        self,
        source: Source | Iterable[Source],
        choose: Callable[[OpenLoad], Choose | None],
        *,
        device: torch.device,
        memory_limit: int | str | None,
        owned: bool,
        group: tuple[str, int] | None,
        variant: str | None,
        progress: bool,
        verify: str | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> Load:
        """See `load()`. `choose` puts the selection into the request, or returns a function that selects."""
        from .load import Load

        self._calls.check_open()
        descriptors.require()
        request = requests.open_load(
            source,
            memory_limit=memory_limit,
            group=group,
            variant=variant,
            verify=verify,
            digests=digests,
        )
        load = Load(
            self.socket_dir,
            request,
            choose=choose(request),
            device=device,
            owned=owned,
            progress=progress,
            reconnect_timeout=self._calls.reconnect_timeout,
        )
        self._loads.add(load)
        return load
