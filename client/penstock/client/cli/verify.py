"""`penstock verify`: every file is read whole and compared with its checksum, if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import errors
from ..client import StreamerClient
from ..summary import LoadedFile, LoadStats
from ..system.sizes import show_bytes


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result for one file."""

    word: str
    """ok, unverified, CORRUPT or failed."""
    uri: str
    why: str

    @property
    def wrong(self) -> bool:
        return self.word in ("CORRUPT", "failed")

    def __str__(self) -> str:
        return f"{self.word:<12}{self.uri}  {self.why}"


def verify(client: StreamerClient, sources: Sequence[str], *, variant: str | None, progress: bool) -> int:
    """Prints a line for each file as soon as it was read; returns how many are wrong. Raises PenstockError
    if the sources cannot be resolved."""
    with client.load(list(sources), tensors=[], variant=variant) as load:
        uris = list(dict.fromkeys(file.uri for file in load.files))
    wrong = 0
    for uri in uris:
        verdict = _verdict(client, uri, progress=progress)
        print(verdict, flush=True)
        wrong += verdict.wrong
    return wrong


def _verdict(client: StreamerClient, uri: str, *, progress: bool) -> Verdict:
    try:
        try:
            file, stats = _read(client, uri, "require", progress=progress)
        except errors.CheckpointInvalidError:  # it may be that there is nothing to compare it with
            file, stats = _read(client, uri, "auto", progress=progress)
    except errors.CheckpointCorruptError as error:
        details = error.details
        if "found" not in details:
            return Verdict("CORRUPT", uri, str(error))
        return Verdict(
            "CORRUPT",
            uri,
            f"{details['algorithm']} is {details['found']} and should be {details['expected']}",
        )
    except errors.PenstockError as error:
        return Verdict("failed", uri, str(error))
    size = show_bytes(file.size_bytes)
    if not stats.bytes:
        return Verdict("unverified", uri, f"{size}, no tensors")
    if stats.verified_bytes < stats.bytes:
        return Verdict("unverified", uri, f"{size} read; the store has no checksum, nor has SHA256SUMS")
    staged = ", staged and verified before" if stats.cache_hit else ""
    return Verdict("ok", uri, f"{size}, {file.verified_by}{staged}")


def _read(client: StreamerClient, uri: str, how: str, *, progress: bool) -> tuple[LoadedFile, LoadStats]:
    with client.load(uri, verify=how, owned=False, progress=progress) as load:
        for _ in load:
            pass
    return load.files[0], load.stats
