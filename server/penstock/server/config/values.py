"""Parsers for the text of a flag or variable. Each raises ValueError with a sentence for people."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..system.linux import PAGE_BYTES
from .units import parse_size

UNLIMITED = -1
MINIMAL = 0
MAX_CONCURRENCY = 1024


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """Port 0: any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def directory(text: str) -> Path:
    """Absolute. An empty text, mostly a shell variable that is not set, would be the working directory."""
    if not text.strip():
        raise ValueError("it is empty; name a directory, or leave it out for the default")
    return Path(os.path.abspath(text))


def optional_file(text: str) -> Path | None:
    """Absolute; None for an empty text."""
    if not text.strip():
        return None
    if text.endswith("/") or Path(text).name in ("", ".."):
        raise ValueError(f"{text!r} is a directory; name a file in it")
    return Path(os.path.abspath(text))


def optional_directory(text: str) -> Path | None:
    """Absolute; None for an empty text."""
    return directory(text) if text.strip() else None


def memory_limit(text: str) -> int:
    """UNLIMITED, MINIMAL or bytes."""
    if text.strip() == "-1":
        return UNLIMITED
    return parse_size(text)


def positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a whole number above 0; write one")
    return int(text)


def concurrency(text: str) -> int:
    threads = positive(text)
    if threads > MAX_CONCURRENCY:
        raise ValueError(f"{text!r} is more than {MAX_CONCURRENCY} reader threads; lower it")
    return threads


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < 1e9:
        raise ValueError(f"{text!r} is not a number of seconds; write one")
    return number


def waiting_seconds(text: str) -> float:
    number = seconds(text)
    if number == 0:
        raise ValueError(f"{text!r} is not above 0; raise it")
    return number


def stall_timeout(text: str) -> float:
    number = seconds(text)
    if number < 0.1:
        raise ValueError(f"{text!r} is less than 0.1 seconds; raise it")
    return number


def block_size(text: str) -> int:
    size = parse_size(text)
    if not 64 << 10 <= size <= 1 << 30:
        raise ValueError(f"{text!r} is not between 64KiB and 1GiB; choose a size that is")
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def http_address(text: str) -> HttpAddress | None:
    if text.strip() == "none":
        return None
    host, _, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdecimal() or int(port[:6]) > 65535:
        raise ValueError(f"{text!r} is neither none nor HOST:PORT; write it as 127.0.0.1:9464 or [::1]:9464")
    return HttpAddress(host, int(port))


def switch(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("0", "1", "false", "true"):
        raise ValueError(f"{text!r} is neither 0 nor 1; choose one")
    return word in ("1", "true")


def _as_it_is(location: str) -> str:
    return location


@dataclass(frozen=True, slots=True)
class Locators:
    """How locations in one kind of storage are written on the command line."""

    beginnings: tuple[str, ...]
    """The texts that such locations begin with."""
    name: str
    """In error messages, such as "an s3:// URI"."""
    prefix: Callable[[str], str] = _as_it_is
    """Turns such a location into a prefix of `--allow`, with which locations are compared."""


def locations(text: str, stores: Sequence[Locators]) -> tuple[str, ...]:
    """One a line."""
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    for location in found:
        _locators(location, stores)
    return found


def prefixes(text: str, stores: Sequence[Locators]) -> tuple[str, ...]:
    return tuple(_locators(location, stores).prefix(location) for location in locations(text, stores))


def paths(text: str) -> tuple[str, ...]:
    """One a line."""
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    for path in found:
        if not path.startswith("/"):
            raise ValueError(f"{path!r} is no absolute path; write one")
    return found


def _locators(location: str, stores: Sequence[Locators]) -> Locators:
    """Those of the store that it is in. Raises ValueError."""
    for store in stores:
        if location.startswith(store.beginnings):
            return store
    names = " nor ".join(store.name for store in stores)
    raise ValueError(f"{location!r} is neither {names}; write one")
