"""One load, from the request to the last tensor.

load()      connect, ask, wait for memory, get the manifest, map the slabs      (ring/stream.py)
iterate     segment by segment, from the daemon that runs at the time           (segments.py)
            views or copies of the host, or copies on a device ahead            (delivery.py)
            counted on the way                                                  (account.py)
close       at the end, or when the caller stops early: the call, the channel, the mapping
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch

from penstock.v1 import streamer_pb2 as pb

from . import errors
from .account import Account
from .cuda import device as cuda
from .cuda.transfer import Transfer
from .delivery import AheadDelivery, Delivery, HostDelivery
from .ring.stream import Choose
from .segments import Segments
from .summary import LoadedFile, LoadStats
from .system.sizes import pinned_bytes, show_bytes

_log = logging.getLogger("penstock.client")


class Load:
    """Yields (name, tensor) once, in the order of the files. Made by `StreamerClient.load()`.

    Leaving it early by `close()`, by its `with` block, by an exception or by dropping it gives back
    everything that no living tensor needs. Only one thread may iterate it; any thread may close it.
    """

    def __init__(
        self,
        socket_dir: Path,
        request: pb.OpenLoad,
        *,
        choose: Choose | None,
        device: torch.device,
        owned: bool,
        progress: bool,
        reconnect_timeout: float,
    ) -> None:
        """Opens the load. Raises the error with which the daemon refuses it, and ValueError for an absent
        device."""
        self._account = Account(progress=progress)
        self._iterated = False
        self._owned = owned
        self._delivery = _delivery_to(device, owned=owned)
        self._segments = Segments(
            socket_dir, request, choose, self._account, reconnect_timeout=reconnect_timeout
        )
        # Only objects that do not keep this Load alive.
        self._finalizer = weakref.finalize(self, _close_all, self._segments, self._delivery)
        self._manifest = self._segments.manifest
        _log.info(
            "load %s of %s begins: %d tensors, %d bytes, of which %d are staged",
            self.load_id,
            ", ".join(request.sources[:3]),
            self.tensor_count,
            self.total_bytes,
            self._manifest.warm_bytes,
        )
        self._account.show()
        self._warn()

    @property
    def load_id(self) -> str:
        """Names this load in the daemon's log."""
        return self._manifest.load_id

    @property
    def tensor_count(self) -> int:
        """Tensors that this load yields."""
        return self._manifest.tensor_count

    @property
    def total_bytes(self) -> int:
        """Bytes of these tensors."""
        return self._manifest.total_bytes

    @property
    def full(self) -> bool:
        """Whether the staging buffer has room for all of it at once. Otherwise it comes through a window."""
        return self._manifest.full

    @property
    def version(self) -> str:
        """Identifies the bytes: the same for the same versions of the same files."""
        return self._manifest.version

    @property
    def files(self) -> tuple[LoadedFile, ...]:
        """The checkpoint's files, in the order of the sources."""
        return tuple(
            LoadedFile(
                file.uri, file.size_bytes, dict(file.metadata), file.metadata_omitted, file.verified_by
            )
            for file in self._manifest.files
        )

    @property
    def metadata(self) -> dict[str, str]:
        """The `__metadata__` of all files in one dict. If files disagree, the last file's value counts."""
        return {key: value for file in self._manifest.files for key, value in file.metadata.items()}

    @property
    def stats(self) -> LoadStats:
        """A snapshot of the load's figures."""
        return self._account.stats(cache_hit=self._manifest.warm_bytes == self._manifest.total_bytes)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Raises LoadClosedError the second time and after `close()`. It and the iterator raise
        ForkedProcessError in a process that was forked from the load's own."""
        self._segments.check_process()
        if self._iterated or self._segments.closed.is_set():
            raise errors.LoadClosedError(
                "this load was iterated before; open another one"
                if self._iterated
                else "this load is closed; open another one",
                load_id=self.load_id,
            )
        self._iterated = True
        return self._run()

    def close(self) -> None:
        """Ends the load. Tensors already yielded stay valid as `owned` promises. May be called again.

        In a process that was forked from the load's own, it gives up only that process's part.
        """
        segments = self._segments
        segments.closed.set()
        self._account.close()
        if self._owned and not segments.stream.manifest.full:  # not the manifest it began with
            segments.stream.revoke()  # a suspended iterator may refer to the window, no tensor does
        self._finalizer()
        self._delivery.join()

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"load {self.load_id} cannot be pickled, as its memory and its connection are this process's: "
            "send the client and the source to the other process, and load there"
        )

    def __repr__(self) -> str:
        state = "closed" if self._segments.closed.is_set() else "open"
        kind = "all at once" if self._manifest.full else "through a window"
        return (
            f"<Load {self.load_id} {state}: {self._account.tensors} of {self.tensor_count} tensors, "
            f"{show_bytes(self._account.bytes)} of {show_bytes(self.total_bytes)}, {kind}>"
        )

    def _run(self) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            yield from self._delivery.run(self._segments)
            if self._account.tensors != self.tensor_count:
                raise errors.broken(
                    f"{self._account.tensors} of {self.tensor_count} tensors were sent", load_id=self.load_id
                )
            if not self._owned:
                # The caller's loop variable still holds the last view. Its lease would make this
                # process wait for itself when it loads the next checkpoint.
                self._segments.stream.revoke()
            _log.info("load %s is done: %.3f s", self.load_id, self._account.seconds)
        except errors.PenstockError as error:
            error.load_id = error.load_id or self.load_id
            if not isinstance(error, errors.LoadClosedError):
                # As text: a log handler that keeps the record must not keep the traceback and its tensors.
                _log.warning("load %s failed: %s", error.load_id, str(error))
            raise
        finally:
            self.close()

    def _warn(self) -> None:
        """Issues the daemon's warnings about the files."""
        try:
            for text in self._manifest.warnings:
                warnings.warn(f"{text} (load {self.load_id})", errors.CheckpointWarning, stacklevel=4)
        except BaseException:  # if warnings are errors
            self.close()
            raise


def _delivery_to(device: torch.device, *, owned: bool) -> Delivery:
    """Raises ValueError for an absent device."""
    if device.type == "cuda":
        return AheadDelivery(Transfer(cuda.open_device(device), pinned_bytes=pinned_bytes()))
    return HostDelivery(None if device.type == "cpu" else device, owned=owned)


def _close_all(segments: Segments, delivery: Delivery) -> None:
    with contextlib.ExitStack() as stack:  # if a device failed, everything else is given back all the same
        stack.callback(segments.close)
        stack.callback(delivery.close)
