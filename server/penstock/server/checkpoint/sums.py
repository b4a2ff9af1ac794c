"""`SHA256SUMS` beside the files of a checkpoint, as `sha256sum` writes it. Blocks."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import AccessDeniedError, CheckpointInvalidError, CheckpointNotFoundError
from ..sources import Access, RetryingReader, Source, SourceFile, join, parent
from ..sources.checksums import Checksum
from ..sources.verification import SUMS_NAME, parse_sums
from ..system.quota import Quota
from .opening import Descriptors, Opening, open_together

MAX_SUMS_BYTES = 1 << 20
"""Some 10,000 names."""


def listed(files: Iterable[tuple[Source, SourceFile]], access: Access, quota: Quota) -> dict[str, Checksum]:
    """What the lists in the directories of these files say, by the URI of a file. `quota` is that of
    descriptors. Raises CheckpointInvalidError for a list that is too long, and SourceUnavailableError."""
    directories: dict[str, tuple[Source, set[str]]] = {}
    for source, file in files:
        directories.setdefault(parent(file.uri), (source, set()))[1].add(file.uri)
    found: dict[str, Checksum] = {}
    for directory, (source, wanted) in directories.items():
        for name, checksum in parse_sums(_read(source, join(directory, SUMS_NAME), access, quota)).items():
            uri = join(directory, name)
            if uri in wanted:  # a list may have thousands of others, and a load thousands of lists
                found[uri] = checksum
    return found


def _read(source: Source, location: str, access: Access, quota: Quota) -> str:
    """Empty where there is none, or none that the caller may read."""

    def read(opening: Opening[str]) -> str:
        try:
            file = source.open(location, access)
        except (CheckpointNotFoundError, AccessDeniedError):
            return ""
        try:
            if file.size_bytes > MAX_SUMS_BYTES:
                raise CheckpointInvalidError(
                    f"{location} has {file.size_bytes} bytes, more than {MAX_SUMS_BYTES}; leave only the "
                    "names of the checkpoint's files in it",
                    file=location,
                )
            content = bytearray(file.size_bytes)
            if content:
                RetryingReader(file, opening.give_up_at).read_into(0, [memoryview(content)])
            file.check_unchanged()
            opening.read()
            return content.decode(errors="replace")
        finally:
            file.close()

    descriptors = Descriptors(quota, access.uid)
    descriptors.take(source.descriptors_per_file, 1)
    try:
        (text,) = open_together(
            [
                Opening(
                    source.workers(location, access.uid),
                    read,
                    lambda text: None,
                    location,
                    patience_seconds=source.patience_seconds,
                    descriptors=source.descriptors_per_file,
                )
            ],
            descriptors,
        )
    finally:
        descriptors.release()
    return text
