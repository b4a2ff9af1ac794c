"""The figures and the files of a Load."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadStats:
    """Figures of a load, so far or at its end."""

    # Delivered to the caller.
    bytes: int
    tensors: int
    # From the request to the end, or to now.
    seconds: float
    # Of these, waiting for memory. Known at the end.
    waited_seconds: float
    # From the request to the first tensor; None before it.
    first_tensor_seconds: float | None
    # The whole load was in the staging buffer already.
    cache_hit: bool
    # Read from the source meanwhile, for this load or others that share it. Known at the end.
    read_bytes: int
    # Of these, from the daemon's tier on a local disk, and so not from the object store. Known at the end.
    tier_bytes: int = 0
    # The store could not be asked (penstockd --tier-stale): how many seconds ago it said that this version is
    # the current one. None: it was asked. Known at the end.
    stale_seconds: float | None = None
    # Of `bytes`, those of files that were read whole and match a checksum of their store or of `digests`.
    # Known at the end.
    verified_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LoadedFile:
    """A file of the checkpoint as the daemon resolved it, with its `__metadata__`."""

    uri: str
    size_bytes: int
    metadata: dict[str, str]
    # There is metadata that is too large to be passed on.
    metadata_omitted: bool
    # The algorithm of the checksum that the file is compared with if it is read whole; empty: with none.
    verified_by: str = ""
