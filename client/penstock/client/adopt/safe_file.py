"""Random access to one safetensors file, read by streaming loads.

    opening         a load of no tensors: names, dtypes, shapes, metadata and the file's version
    first tensor    alone, if the file is large: perhaps no other is ever asked for
    second tensor   the whole file in one load. Tensors that arrive before they are asked for are kept, as
                    views of the staging buffer, which cost nothing. Threads that ask for one do not wait.
    no room         if the daemon has no room for the whole file: the tensor and those after it, a batch at a
                    time, copied at once, so that the window is free after each

Every load asks for the version that was opened, so all tensors are of one version of the file. A tensor that
was handed out is not kept here: when the caller drops it, the staging buffer gets its memory back. Only a
tensor that is asked for again is kept until the file is closed, for callers that take it in pieces.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from .. import errors, requests
from ..system.sizes import Source, absolute_sources

if TYPE_CHECKING:
    import torch

    from penstock.v1 import streamer_pb2 as pb

    from ..client import StreamerClient
    from ..load import Load
    from ..ring.stream import Choose

SMALL_FILE_BYTES = 64 << 20
"""Up to this size the first tensor reads the whole file: a round trip costs more than the bytes."""
BATCH_BYTES = 256 << 20
"""Bytes that are read and copied at once of a file that does not fit the staging buffer."""
WINDOW_BYTES = 32 << 20
"""The window of such a batch in the staging buffer. Twice as fast as the smallest one (measured)."""
_DIGITS = re.compile(r"(\d+)")


class SafeFile:
    """One open file. Thread-safe. Releases its tensors when it is garbage-collected."""

    def __init__(self, client: StreamerClient, source: Source) -> None:
        """Raises the error of the file or of the daemon."""
        self._client, self._source = client, absolute_sources(source)[0]
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._version = ""
        entries: list[pb.Tensor] = []
        with self._open([], listed=entries) as load:
            tuple(load)
            self._version, files = load.version, load.files
        if len(files) != 1:
            raise errors.InvalidRequestError(
                f"{self._source} means {len(files)} files, and safe_open reads one: name a safetensors "
                "file, or use StreamerClient.load()"
            )
        if files[0].metadata_omitted:
            raise errors.InvalidRequestError(
                f"{self._source} has more metadata than the daemon passes on: load its tensors by "
                "StreamerClient.load(), or open the file with the safetensors library"
            )
        self.metadata: dict[str, str] = files[0].metadata
        self.entries: dict[str, pb.Tensor] = {entry.name: entry for entry in entries}
        """Shapes and dtypes by name, in the order of the file."""
        self._total_bytes = sum(entry.size_bytes for entry in entries)
        self._strange = {name for name, entry in self.entries.items() if not _known(entry)}
        self._begun, self._fits = False, True
        self._asked: set[str] = set()
        self._ready: dict[str, torch.Tensor] = {}
        self._kept: dict[str, torch.Tensor] = {}
        self._arriving: Iterator[tuple[str, torch.Tensor]] = iter(())
        self._awaited: set[str] = set()

    def get(self, name: str) -> torch.Tensor:
        """The tensor on the CPU; `name` must be one of `entries`."""
        while (tensor := self._take(name)) is None:
            self._check_process()
            with self._lock:
                if name not in self._ready:
                    self._read(name)
        return tensor

    def get_all(self, device: str) -> dict[str, torch.Tensor]:
        """Every tensor, by one load straight to the device."""
        self._check_process()
        with self._open(None, device=device) as load:
            return dict(load)

    def _take(self, name: str) -> torch.Tensor | None:
        """The tensor if it is there, without waiting."""
        kept = self._kept.get(name)
        if kept is not None:
            return kept.detach()  # an object of its own, as callers may set attributes on it
        tensor = self._ready.pop(name, None)
        if tensor is None:
            return None
        if name in self._asked:
            self._kept[name] = tensor
            return tensor.detach()
        self._asked.add(name)
        return tensor

    def _read(self, name: str) -> None:
        """Makes the tensor ready. The caller holds the lock."""
        if name not in self._awaited:
            alone = not self._begun and self._total_bytes > SMALL_FILE_BYTES
            self._begun = True
            if alone or name in self._asked or name in self._strange:
                with self._open([name]) as load:
                    self._ready.update(load)
                return
            if not self._fits or not self._begin():
                self._read_batch(self._batch(name))
                return
        self._await(name)

    def _begin(self) -> bool:
        """Opens the load of the whole file. False if it would come through a window."""
        names = [name for name in self.entries if name not in self._strange]
        load = self._open(names if self._strange else None)
        self._fits = load.full
        if self._fits:
            self._arriving, self._awaited = iter(load), set(names)
        else:
            load.close()
        return self._fits

    def _await(self, name: str) -> None:
        """Takes the arriving tensors until the one with that name."""
        try:
            for arrived, tensor in self._arriving:
                self._awaited.discard(arrived)
                if arrived not in self._asked:
                    self._ready[arrived] = tensor
                if arrived == name:
                    break
            if not self._awaited:
                tuple(self._arriving)  # lets the load end
        except BaseException:
            self._arriving, self._awaited = iter(()), set()
            raise

    def _read_batch(self, names: list[str]) -> None:
        # A window is granted at once. A load that asks for memory for the whole batch may have to wait.
        largest_bytes = max(self.entries[name].size_bytes for name in names)
        limit_bytes = max(WINDOW_BYTES, 2 * largest_bytes)
        with self._open(names, memory_limit=limit_bytes, owned=False) as load:
            for name, tensor in load:
                self._ready[name] = _copied(tensor)

    def _batch(self, name: str) -> list[str]:
        """The tensor and the next ones in the order of the layers, in which callers ask for them."""
        left = [
            known
            for known in self.entries
            if known == name or not (known in self._asked or known in self._ready or known in self._strange)
        ]
        left.sort(key=_natural)
        batch: list[str] = []
        size_bytes = 0
        for known in left[left.index(name) :]:
            size_bytes += self.entries[known].size_bytes
            if batch and size_bytes > BATCH_BYTES:
                break
            batch.append(known)
        return batch

    def _open(
        self,
        names: Collection[str] | None,
        *,
        device: str = "cpu",
        listed: list[pb.Tensor] | None = None,
        memory_limit: int | None = None,
        owned: bool = True,
    ) -> Load:
        """A load of these tensors; None is all. `listed` receives the file's tensors."""
        import torch

        def choose(request: Any) -> Choose | None:
            request.expect_version = self._version
            if listed is None:
                return requests.choose(request, names)
            request.list_tensors = True

            def note(found: list[pb.Tensor]) -> list[str]:
                listed.extend(found)
                return []

            return note

        return self._client._open_load(
            self._source,
            choose,
            device=torch.device(device),
            memory_limit=memory_limit,
            owned=owned,
            group=None,
            variant=None,
            progress=False,
        )

    def _check_process(self) -> None:
        """Called before the lock is taken: a thread of the parent may have held it when this process was
        forked."""
        if self._pid != os.getpid():
            raise errors.forked(f"the open file {self._source}", self._pid)


def _known(entry: pb.Tensor) -> bool:
    from ..ring.tensors import without_bytes

    try:
        without_bytes(entry)
    except errors.PenstockError:
        return False
    return True


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [
        (int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in _DIGITS.split(name)
    ]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy made with one core: torch's copies would spin on all cores, which the daemon's readers need."""
    import torch

    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    ctypes.memmove(copy.data_ptr(), tensor.data_ptr(), tensor.nbytes)
    return copy
