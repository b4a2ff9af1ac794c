"""What the text of a flag or variable means. Each raises ValueError with a sentence for people."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

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


def addressing(text: str) -> str:
    """The Run:ai variable says only whether virtual-hosted style is used."""
    word = text.strip().lower()
    word = {"0": "path", "false": "path", "1": "virtual", "true": "virtual"}.get(word, word)
    if word not in ("auto", "path", "virtual"):
        raise ValueError(f"{text!r} is none of auto, path, virtual; choose one")
    return word


def locations(text: str) -> tuple[str, ...]:
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    for location in found:
        if not location.startswith(("/", "file:///", "s3://")):
            raise ValueError(f"{location!r} is neither an absolute path nor an s3:// URI; write one")
    return found


def prefixes(text: str) -> tuple[str, ...]:
    """Paths as paths, since that is what they are compared with."""
    return tuple(
        unquote(location.removeprefix("file://")) if location.startswith("file://") else location
        for location in locations(text)
    )
