"""Every flag of penstockd and the variables that stand in for it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import ConfigError
from ..system.version import distribution_version
from . import values
from .units import parse_size

DEFAULT_SOCKET_DIR = "/run/penstock"
DEFAULT_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Option:
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


def _nothing_to_check(_: Mapping[str, Any]) -> None:
    """No flags of the store contradict each other."""


@dataclass(frozen=True, slots=True)
class StoreFlags:
    """The part of the command line that belongs to one kind of storage."""

    locators: values.Locators
    options: tuple[Option, ...] = ()
    """Flags that it alone has."""
    check: Callable[[Mapping[str, Any]], None] = _nothing_to_check
    """Raises ConfigError where flags contradict each other, given the values of all."""


_FIRST_OPTIONS = (
    Option(
        "--socket-dir",
        DEFAULT_SOCKET_DIR,
        values.directory,
        "directory of penstock.sock and handoff.sock; made if it is missing",
        "DIR",
    ),
    Option(
        "--memory-limit",
        "-1",
        values.memory_limit,
        "cap of the staging buffer: -1 as much as is loaded, 0 per load as much as its largest tensor, "
        "or a size such as 8GB or 8GiB",
        "SIZE",
        ("RUNAI_STREAMER_MEMORY_LIMIT",),
    ),
    Option("--concurrency", "16", values.concurrency, "reader threads", "N", ("RUNAI_STREAMER_CONCURRENCY",)),
    Option(
        "--block-size",
        f"{DEFAULT_BLOCK_BYTES >> 20}MiB",
        values.block_size,
        "bytes that one thread reads at once",
        "SIZE",
        ("RUNAI_STREAMER_CHUNK_BYTESIZE",),
    ),
    Option(
        "--window-size",
        "4GiB",
        parse_size,
        "most that the window of one load takes when its checkpoint does not fit the limit",
        "SIZE",
    ),
)
_WARM_OPTIONS = (
    Option(
        "--warm-set",
        "",
        values.optional_file,
        "file that lists checkpoints to keep warm, as YAML; it is watched, and a change counts at once",
        "FILE",
    ),
    Option(
        "--warm-set-interval",
        "300",
        values.waiting_seconds,
        "seconds, give or take a fifth, between two looks whether storage has another version of a "
        "checkpoint of --warm-set",
        "SECONDS",
    ),
    Option(
        "--node-features",
        "",
        values.optional_file,
        "file to keep for node-feature-discovery: a label for each checkpoint of --warm-set that is warm",
        "FILE",
    ),
)
_FURTHER_OPTIONS = (
    Option(
        "--trim-after",
        "900",
        values.seconds,
        "without a limit: seconds after which a checkpoint that nobody uses is evicted; it goes at once when "
        "the machine or the container runs short of memory",
        "SECONDS",
    ),
    Option("--queue-timeout", "600", values.seconds, "seconds that a load may wait for memory", "SECONDS"),
    Option("--group-timeout", "60", values.seconds, "seconds that a group waits for its members", "SECONDS"),
    Option("--grace", "30", values.seconds, "seconds that running loads get after SIGTERM", "SECONDS"),
    Option(
        "--stall-timeout",
        "60",
        values.stall_timeout,
        "seconds without a turn of the event loop, or with every reader in one read, after which health says "
        "that the daemon hangs",
        "SECONDS",
    ),
    Option("--max-loads", "256", values.positive, "loads at a time, waiting ones included", "N"),
    Option(
        "--http-address",
        "127.0.0.1:9464",
        values.http_address,
        "where /metrics, /healthz, /readyz, /status and the status page are served, to whoever can connect; "
        "none switches it off, port 0 takes any",
        "HOST:PORT",
    ),
    Option(
        "--verify",
        "auto",
        str,
        "compare the bytes of files with checksums: auto where the store gives a CRC, off, or require, which "
        "refuses what cannot be verified",
        choices=("auto", "off", "require"),
    ),
    Option(
        "--object-concurrency",
        "32",
        values.concurrency,
        "connections that read from object stores at once",
        "N",
        ("RUNAI_STREAMER_CONCURRENCY",),
    ),
    Option(
        "--object-block-size",
        "32MiB",
        values.block_size,
        "bytes asked of an object store in one request",
        "SIZE",
    ),
    Option(
        "--object-retries",
        "8",
        values.positive,
        "attempts in a row without a byte after which a read from an object store fails",
        "N",
    ),
    Option(
        "--object-timeout",
        "30",
        values.waiting_seconds,
        "seconds to connect, without a byte, and for 64 KiB, after which a request to an object store is "
        "made again",
        "SECONDS",
    ),
    Option(
        "--tier-dir",
        "",
        values.optional_directory,
        "directory on a local disk, for this daemon alone, that keeps what is read from object stores; made "
        "if it is missing",
        "DIR",
    ),
    Option(
        "--tier-limit",
        "0",
        parse_size,
        "most that --tier-dir takes of its disk, such as 500GB",
        "SIZE",
    ),
    Option(
        "--tier-files",
        "",
        values.paths,
        "path prefix of files of a network file system that --tier-dir keeps too; repeatable, in the "
        "variable one a line",
        "PREFIX",
        repeatable=True,
    ),
    Option(
        "--tier-stale",
        "0",
        values.seconds,
        "if an object store cannot be asked, load from --tier-dir the version that the store had at most so "
        "many seconds ago; 0 fails the load",
        "SECONDS",
    ),
)
_LOG_OPTIONS = (
    Option("--log-format", "text", str, "one line an event", choices=("text", "json")),
    Option("--log-level", "info", str, "least severity", choices=("debug", "info", "warning", "error")),
)


_SWITCHES = ("READY_AFTER_PREFETCH", "NO_POPULATE")


def _options(stores: Sequence[StoreFlags]) -> tuple[Option, ...]:
    """All flags that take a value, in the order of `--help`."""
    locators = [store.locators for store in stores]
    return (
        *_FIRST_OPTIONS,
        Option(
            "--allow",
            "",
            partial(values.prefixes, stores=locators),
            "path prefix that users other than root and the daemon's own may load from; repeatable, in the "
            "variable one a line",
            "PREFIX",
            repeatable=True,
        ),
        Option(
            "--prefetch",
            "",
            partial(values.locations, stores=locators),
            "checkpoint to stage at start and to keep staged; repeatable, in the variable one a line",
            "URI",
            repeatable=True,
        ),
        *_WARM_OPTIONS,
        *_FURTHER_OPTIONS,
        *(option for store in stores for option in store.options),
        *_LOG_OPTIONS,
    )


def read_options(
    arguments: Sequence[str], environment: Mapping[str, str], stores: Sequence[StoreFlags]
) -> dict[str, Any]:
    """What each flag means, by its name. Raises ConfigError; exits on `--help` and usage."""
    options = _options(stores)
    flags = vars(_parser(options).parse_args(arguments))
    read = {option.field: _value(option, flags[option.field], environment) for option in options}
    switches = {
        switch.lower(): flags[switch.lower()] or _switched(switch, environment) for switch in _SWITCHES
    }
    return {**flags, **read, **switches}


def known_variables(stores: Sequence[StoreFlags]) -> list[str]:
    """Every variable that stands in for a flag."""
    named = [source for option in _options(stores) for source in option.sources]
    return [*named, *(f"PENSTOCK_{switch}" for switch in _SWITCHES)]


def _parser(options: Sequence[Option]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="penstockd",
        description="Reads checkpoints into a capped shared-memory buffer and hands them to the processes "
        "of this node.",
        epilog="A flag wins over its variable, PENSTOCK_... over RUNAI_STREAMER_....",
        allow_abbrev=False,
    )
    for option in options:
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


def _value(option: Option, flag: Any, environment: Mapping[str, str]) -> Any:
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
            raise ValueError(f"{text!r} is none of {', '.join(option.choices)}; choose one")
        return option.parse(text)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _switched(switch: str, environment: Mapping[str, str]) -> bool:
    text = environment.get(f"PENSTOCK_{switch}", "").strip().lower()
    if text not in ("", "0", "1", "false", "true"):
        raise ConfigError(f"PENSTOCK_{switch}: {text!r} is neither 0 nor 1; choose one")
    return text in ("1", "true")
