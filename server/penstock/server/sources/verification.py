"""Decides with which checksum the bytes of each file of a load are compared, if with any. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import CheckpointInvalidError, InvalidRequestError
from .checksums import Checksum, sha256_checksum

if TYPE_CHECKING:
    from . import SourceFile

OFF, AUTO, REQUIRE = MODES = ("off", "auto", "require")
SUMS_NAME = "SHA256SUMS"
MAX_DIGESTS = 10_000


@dataclass(frozen=True, slots=True)
class Wish:
    """How the bytes of a load are to be verified."""

    mode: str = AUTO
    """OFF: not at all. AUTO: those of files for which the store has a CRC. REQUIRE: all, or the load is
    refused."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 by the file's name or URI. These files are verified in any mode."""

    @classmethod
    def of(cls, daemon: str, asked: str, digests: Mapping[str, str]) -> Wish:
        """The wish of a load. REQUIRE of the daemon overrules the load's mode. Raises InvalidRequestError."""
        if asked not in ("", *MODES):
            raise InvalidRequestError(f"verify: {asked[:50]!r} is none of {', '.join(MODES)}; choose one")
        return cls(REQUIRE if daemon == REQUIRE else asked or daemon, digests)

    @property
    def wants_all(self) -> bool:
        return self.mode == REQUIRE


@dataclass(frozen=True, slots=True)
class Expected:
    """What is expected of one file of a load."""

    checksum: Checksum | None = None
    must: bool = False
    """Whether the load is refused if the bytes cannot be compared."""
    given: bool = False
    """Whether the checksum comes from the user, and not from the store."""


def given(files: Sequence[SourceFile], digests: Mapping[str, str]) -> dict[int, Checksum]:
    """The checksums in `digests`, by the file's number. Raises InvalidRequestError for a value that is no
    SHA-256, and for a name that is not that of exactly one file."""
    numbers: dict[str, list[int]] = {}
    uris: dict[str, set[str]] = {}
    for number, file in enumerate(files) if digests else ():
        numbers.setdefault(file.uri, []).append(number)
        for name in (file.uri, file.uri.rpartition("/")[2]):
            uris.setdefault(name, set()).add(file.uri)
    found: dict[int, Checksum] = {}
    for name, text in digests.items():
        checksum = sha256_checksum(text)
        if checksum is None:
            raise InvalidRequestError(
                f"digests: what is given for {name[:200]!r} is no SHA-256; write 64 hexadecimal digits"
            )
        named = uris.get(name, set())
        if len(named) != 1:
            wrong = "names several files" if named else "names no file"
            raise InvalidRequestError(
                f"digests: {name[:200]!r} {wrong} of the checkpoint; write the URI of one, as the load's "
                "`files` has it"
            )
        found.update(dict.fromkeys(numbers[next(iter(named))], checksum))
    return found


def expected(
    files: Sequence[SourceFile],
    wish: Wish,
    own: Mapping[int, Checksum],
    listed: Mapping[str, Checksum],
) -> tuple[Expected, ...]:
    """The expected checksum of each file: the user's first, then the store's. `own` is a result of `given`.
    `listed` has the checksums of SHA256SUMS, by URI. Raises CheckpointInvalidError if all files are to be
    verified and one cannot be."""
    result = []
    for number, file in enumerate(files):
        if number in own:
            result.append(Expected(own[number], must=True, given=True))
            continue
        if wish.mode == OFF:
            result.append(Expected())
            continue
        stored = [checksum for checksum in file.checksums if wish.wants_all or checksum.is_crc]
        checksum = stored[0] if stored else listed.get(file.uri)
        if checksum is None and wish.wants_all:
            raise CheckpointInvalidError(
                f"{file.uri} cannot be verified: its store says no checksum of the whole content; write a "
                f'{SUMS_NAME} beside it, give the load digests=, or load it with verify="auto"',
                file=file.uri,
            )
        result.append(Expected(checksum, must=wish.wants_all))
    return tuple(result)


def parse_sums(text: str) -> dict[str, Checksum]:
    """Parses the output of `sha256sum`: checksums by name. Skips lines of any other form."""
    found = {}
    for line in text.splitlines():
        digits, _, name = line.partition(" ")
        checksum = sha256_checksum(digits)
        if checksum is not None and name[:1] in (" ", "*"):
            found[name[1:].removeprefix("./")] = checksum
    return found
