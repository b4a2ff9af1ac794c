"""One frozen Config, validated once, from flags and environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from .errors import ConfigError
from .limits import OVERHEAD_BYTES, MemoryBound
from .linux import HUGE_PAGE_BYTES, PAGE_BYTES
from .units import parse_size, show_size

DEFAULT_SOCKET_DIR = "/run/penstock"
SLABS_PER_LIMIT = 64
MIN_SLAB_BYTES = HUGE_PAGE_BYTES
MAX_SLAB_BYTES = 1 << 30
UNLIMITED_SLAB_BYTES = 64 << 20
DEFAULT_BLOCK_BYTES = 8 << 20
MAX_CONCURRENCY = 1024
UNIX_PATH_BYTES = 107
"""Longer socket paths fail in the kernel."""

UNLIMITED = -1
MINIMAL = 0


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """Port 0: any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Config:
    """What the daemon runs with. Sizes in bytes, times in seconds."""

    socket_dir: Path
    memory_limit: int
    """As asked for: -1 unlimited, 0 minimal, else bytes."""
    capacity_bytes: int
    """What the staging buffer may never exceed, whatever the mode: the limit, or what the machine bears."""
    slab_bytes: int
    concurrency: int
    block_bytes: int
    window_bytes: int
    allow: tuple[str, ...]
    prefetch: tuple[str, ...]
    ready_after_prefetch: bool
    trim_after_seconds: float
    queue_timeout_seconds: float
    group_timeout_seconds: float
    grace_seconds: float
    stall_timeout_seconds: float
    max_loads: int
    populate: bool
    http_address: HttpAddress | None
    """None: no HTTP."""
    log_format: str
    log_level: str
    exit_with_stdin: bool
    s3_concurrency: int
    s3_block_bytes: int
    s3_retries: int
    s3_timeout_seconds: float
    s3_addressing: str
    s3_unsigned: bool
    s3_requester_pays: bool

    def concurrency_of(self, kind: str) -> int:
        """Threads that read from that kind of storage at once."""
        return self.s3_concurrency if kind == "s3" else self.concurrency

    def block_bytes_of(self, kind: str) -> int:
        return self.s3_block_bytes if kind == "s3" else self.block_bytes

    @property
    def max_slabs(self) -> int:
        return self.capacity_bytes // self.slab_bytes

    @property
    def keeps_warm(self) -> bool:
        return self.memory_limit != MINIMAL

    @property
    def trims(self) -> bool:
        """Memory that nobody uses goes back to the system after a while."""
        return self.memory_limit <= 0


@dataclass(frozen=True, slots=True)
class _Option:
    """One flag, the variables that stand in for it, and how its text is read."""

    flag: str
    default: str
    parse: Callable[[str], Any]
    help: str
    metavar: str | None = None
    variables: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    repeatable: bool = False

    @property
    def field(self) -> str:
        return self.flag.lstrip("-").replace("-", "_")

    @property
    def sources(self) -> tuple[str, ...]:
        return (f"PENSTOCK_{self.field.upper()}", *self.variables)


def parse_memory_limit(text: str) -> int:
    """-1, 0 or bytes. Raises ValueError."""
    if text.strip() == "-1":
        return UNLIMITED
    return parse_size(text)


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a whole number above 0")
    return int(text)


def _concurrency(text: str) -> int:
    threads = _positive(text)
    if threads > MAX_CONCURRENCY:
        raise ValueError(f"{text!r}: at most {MAX_CONCURRENCY} reader threads")
    return threads


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < 1e9:
        raise ValueError(f"{text!r} is not a number of seconds")
    return seconds


def _stall_timeout(text: str) -> float:
    seconds = _seconds(text)
    if seconds < 0.1:
        raise ValueError(f"{text!r} is too short: at least 0.1 seconds")
    return seconds


def _block_size(text: str) -> int:
    size = parse_size(text)
    if not 64 << 10 <= size <= 1 << 30:
        raise ValueError(f"{text!r}: a block has 64KiB to 1GiB")
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def _http_address(text: str) -> HttpAddress | None:
    if text.strip() == "none":
        return None
    host, _, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdecimal() or int(port[:6]) > 65535:
        raise ValueError(f"{text!r} is neither none nor HOST:PORT, such as 127.0.0.1:9464 or [::1]:9464")
    return HttpAddress(host, int(port))


def _waiting_seconds(text: str) -> float:
    seconds = _seconds(text)
    if seconds == 0:
        raise ValueError(f"{text!r}: it must be above 0")
    return seconds


def _switch(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("0", "1", "false", "true"):
        raise ValueError(f"{text!r} is neither 0 nor 1")
    return word in ("1", "true")


def _addressing(text: str) -> str:
    """The Run:ai variable says only whether virtual-hosted style is used."""
    word = text.strip().lower()
    word = {"0": "path", "false": "path", "1": "virtual", "true": "virtual"}.get(word, word)
    if word not in ("auto", "path", "virtual"):
        raise ValueError(f"{text!r} is none of auto, path, virtual")
    return word


def _locations(text: str) -> tuple[str, ...]:
    locations = tuple(line.strip() for line in text.splitlines() if line.strip())
    for location in locations:
        if not location.startswith(("/", "file:///", "s3://")):
            raise ValueError(f"{location!r} is neither an absolute path nor an s3:// URI")
    return locations


def _prefixes(text: str) -> tuple[str, ...]:
    """Paths as paths, since that is what they are compared with."""
    return tuple(
        unquote(location.removeprefix("file://")) if location.startswith("file://") else location
        for location in _locations(text)
    )


_OPTIONS = (
    _Option(
        "--socket-dir",
        DEFAULT_SOCKET_DIR,
        lambda text: Path(os.path.abspath(text)),
        "directory of penstock.sock and handoff.sock; made if it is missing",
        "DIR",
    ),
    _Option(
        "--memory-limit",
        "-1",
        parse_memory_limit,
        "cap of the staging buffer: -1 as much as is loaded, 0 per load as much as its largest tensor, "
        "or a size such as 8GB or 8GiB",
        "SIZE",
        ("RUNAI_STREAMER_MEMORY_LIMIT",),
    ),
    _Option("--concurrency", "16", _concurrency, "reader threads", "N", ("RUNAI_STREAMER_CONCURRENCY",)),
    _Option(
        "--block-size",
        f"{DEFAULT_BLOCK_BYTES >> 20}MiB",
        _block_size,
        "bytes that one thread reads at once",
        "SIZE",
        ("RUNAI_STREAMER_CHUNK_BYTESIZE",),
    ),
    _Option(
        "--window-size",
        "4GiB",
        parse_size,
        "most that the window of one load takes when its checkpoint does not fit the limit",
        "SIZE",
    ),
    _Option(
        "--allow",
        "",
        _prefixes,
        "path prefix that users other than root and the daemon's own may load from; repeatable, in the "
        "variable one a line",
        "PREFIX",
        repeatable=True,
    ),
    _Option(
        "--prefetch",
        "",
        _locations,
        "checkpoint to stage at start and to keep staged; repeatable, in the variable one a line",
        "URI",
        repeatable=True,
    ),
    _Option(
        "--trim-after",
        "60",
        _seconds,
        "without a limit: seconds after which unused memory goes back to the system",
        "SECONDS",
    ),
    _Option("--queue-timeout", "600", _seconds, "seconds that a load may wait for memory", "SECONDS"),
    _Option("--group-timeout", "60", _seconds, "seconds that a group waits for its members", "SECONDS"),
    _Option("--grace", "30", _seconds, "seconds that running loads get after SIGTERM", "SECONDS"),
    _Option(
        "--stall-timeout",
        "60",
        _stall_timeout,
        "seconds without a turn of the event loop, or with every reader in one read, after which health says "
        "that the daemon hangs",
        "SECONDS",
    ),
    _Option("--max-loads", "256", _positive, "loads at a time, waiting ones included", "N"),
    _Option(
        "--http-address",
        "127.0.0.1:9464",
        _http_address,
        "where /metrics, /healthz, /readyz, /status and the status page are served, to whoever can connect; "
        "none switches it off, port 0 takes any",
        "HOST:PORT",
    ),
    _Option(
        "--s3-concurrency",
        "32",
        _concurrency,
        "connections that read from S3 at once",
        "N",
        ("RUNAI_STREAMER_CONCURRENCY",),
    ),
    _Option("--s3-block-size", "16MiB", _block_size, "bytes asked of S3 in one request", "SIZE"),
    _Option(
        "--s3-retries",
        "8",
        _positive,
        "attempts in a row without a byte after which a read from S3 fails",
        "N",
    ),
    _Option(
        "--s3-timeout",
        "30",
        _waiting_seconds,
        "seconds to connect, and without a byte, after which a request to S3 is made again",
        "SECONDS",
    ),
    _Option(
        "--s3-addressing",
        "auto",
        _addressing,
        "how a bucket is named: path, virtual (as a host name), or auto, as botocore does",
        "STYLE",
        ("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING",),
    ),
    _Option(
        "--s3-unsigned",
        "0",
        _switch,
        "1: ask S3 without credentials, for public buckets",
        "0|1",
        ("RUNAI_STREAMER_S3_UNSIGNED",),
    ),
    _Option(
        "--s3-requester-pays", "0", _switch, "1: agree to pay for requests to requester-pays buckets", "0|1"
    ),
    _Option("--log-format", "text", str, "one line an event", choices=("text", "json")),
    _Option("--log-level", "info", str, "least severity", choices=("debug", "info", "warning", "error")),
)


_SWITCHES = ("READY_AFTER_PREFETCH", "NO_POPULATE")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="penstockd",
        description="Reads checkpoints into a capped shared-memory buffer and hands them to the processes "
        "of this node.",
        epilog="A flag wins over its variable, PENSTOCK_... over RUNAI_STREAMER_....",
        allow_abbrev=False,
    )
    for option in _OPTIONS:
        text = f"{option.help} (default: {option.default or 'none'}; variables: {', '.join(option.sources)})"
        parser.add_argument(
            option.flag,
            help=text,
            metavar=option.metavar or f"{{{','.join(option.choices)}}}",
            action="append" if option.repeatable else "store",
        )
    parser.add_argument(
        "--ready-after-prefetch",
        action="store_true",
        help="take loads at once, but report readiness only when every --prefetch is staged (variable: "
        "PENSTOCK_READY_AFTER_PREFETCH=1)",
    )
    parser.add_argument(
        "--no-populate",
        action="store_true",
        help="do not touch the buffer's pages ahead of the first load (variable: PENSTOCK_NO_POPULATE=1)",
    )
    parser.add_argument("--exit-with-stdin", action="store_true", help="stop when standard input is closed")
    parser.add_argument("--version", action="version", version=f"penstockd {distribution_version()}")
    return parser


def distribution_version() -> str:
    try:
        return version("penstock")
    except PackageNotFoundError:  # run from a source tree
        return "0+unknown"


def load_config(
    arguments: Sequence[str], environment: Mapping[str, str], bound: Callable[[], MemoryBound]
) -> Config:
    """Raises ConfigError with one line that names the flag or variable; exits on `--help` and usage."""
    flags = vars(_parser().parse_args(arguments))
    values: dict[str, Any] = {}
    for option in _OPTIONS:
        values[option.field] = _value(option, flags[option.field], environment)
    ready_after_prefetch = flags["ready_after_prefetch"] or _switched("READY_AFTER_PREFETCH", environment)
    no_populate = flags["no_populate"] or _switched("NO_POPULATE", environment)
    limit: int = values["memory_limit"]
    _check_together(values)
    capacity = _capacity(limit, bound())
    return Config(
        socket_dir=_checked_socket_dir(values["socket_dir"]),
        memory_limit=limit,
        capacity_bytes=capacity,
        slab_bytes=slab_bytes(limit),
        concurrency=values["concurrency"],
        block_bytes=values["block_size"],
        window_bytes=values["window_size"],
        allow=values["allow"],
        prefetch=values["prefetch"],
        ready_after_prefetch=ready_after_prefetch,
        trim_after_seconds=values["trim_after"],
        queue_timeout_seconds=values["queue_timeout"],
        group_timeout_seconds=values["group_timeout"],
        grace_seconds=values["grace"],
        stall_timeout_seconds=values["stall_timeout"],
        max_loads=values["max_loads"],
        populate=limit > 0 and not no_populate,
        http_address=values["http_address"],
        log_format=values["log_format"],
        log_level=values["log_level"],
        exit_with_stdin=flags["exit_with_stdin"],
        s3_concurrency=values["s3_concurrency"],
        s3_block_bytes=values["s3_block_size"],
        s3_retries=values["s3_retries"],
        s3_timeout_seconds=values["s3_timeout"],
        s3_addressing=values["s3_addressing"],
        s3_unsigned=values["s3_unsigned"],
        s3_requester_pays=values["s3_requester_pays"],
    )


def known_variables() -> list[str]:
    """Every variable that stands in for a flag."""
    named = [source for option in _OPTIONS for source in option.sources]
    return [*named, *(f"PENSTOCK_{switch}" for switch in _SWITCHES)]


def _switched(switch: str, environment: Mapping[str, str]) -> bool:
    text = environment.get(f"PENSTOCK_{switch}", "").strip().lower()
    if text not in ("", "0", "1", "false", "true"):
        raise ConfigError(f"PENSTOCK_{switch}: {text!r} is neither 0 nor 1")
    return text in ("1", "true")


def _check_together(values: Mapping[str, Any]) -> None:
    """Refuses flags that contradict each other."""
    limit = values["memory_limit"]
    if values["prefetch"] and limit == MINIMAL:
        raise ConfigError(
            "--prefetch: nothing can be kept staged with --memory-limit 0; give a limit that holds it, or -1"
        )
    if len(values["prefetch"]) >= values["max_loads"]:
        raise ConfigError(
            f"--max-loads: {values['max_loads']} loads leave no client any beside {len(values['prefetch'])} "
            "--prefetch, which are loads too"
        )
    if limit > 0 and values["block_size"] > max(limit, DEFAULT_BLOCK_BYTES):
        raise ConfigError(
            f"--block-size: a block of {values['block_size']} bytes is more than the whole --memory-limit of "
            f"{limit}"
        )


def slab_bytes(memory_limit: int) -> int:
    """A 64th of the limit in whole huge pages: rounding wastes little, and 64 descriptors are few.

    Without a limit 64 MiB; with the minimal limit as fine as it gets, because every load takes just what
    its largest tensor needs.
    """
    if memory_limit == UNLIMITED:
        return UNLIMITED_SLAB_BYTES
    share = memory_limit // SLABS_PER_LIMIT // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    return min(max(share, MIN_SLAB_BYTES), MAX_SLAB_BYTES)


def _value(option: _Option, flag: Any, environment: Mapping[str, str]) -> Any:
    origin, text = option.flag, flag
    if text is None:
        origin, text = next(
            ((name, environment[name]) for name in option.sources if environment.get(name)),
            ("the default", option.default),
        )
    if isinstance(text, list):
        text = "\n".join(text)
    try:
        if option.choices and text not in option.choices:
            raise ValueError(f"{text!r} is none of {', '.join(option.choices)}")
        return option.parse(text)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _capacity(limit: int, bound: MemoryBound) -> int:
    bearable = max(bound.limit_bytes - OVERHEAD_BYTES, 0)
    if limit <= 0:
        if bearable < UNLIMITED_SLAB_BYTES:
            raise ConfigError(
                f"{bound.origin} of {bound.limit_bytes} bytes leaves no room for a staging buffer beside the "
                f"{OVERHEAD_BYTES} bytes that penstockd itself may need; raise it"
            )
        return bearable
    if limit < MIN_SLAB_BYTES:
        raise ConfigError(f"--memory-limit: {limit} bytes are less than one slab of {MIN_SLAB_BYTES} bytes")
    if limit > bound.limit_bytes:
        raise ConfigError(
            f"--memory-limit: {limit} bytes ({show_size(limit)}) are more than {bound.origin} of "
            f"{bound.limit_bytes} bytes ({show_size(bound.limit_bytes)}); lower the limit, or raise that"
        )
    return limit


def _checked_socket_dir(path: Path) -> Path:
    longest = len(os.fsencode(path / "penstock.sock"))
    if longest > UNIX_PATH_BYTES:
        raise ConfigError(
            f"--socket-dir: {path} is too long: a socket in it would have {longest} of at most "
            f"{UNIX_PATH_BYTES} bytes"
        )
    return path
