"""The command line's commands, arguments and help texts. `commands.py` runs the commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..system.sizes import parse_memory_limit, parse_size
from ..system.version import client_version

_PIN = (
    "keep it until it is evicted; without --pin it stays until its memory is needed, and a daemon without a "
    "memory limit keeps it for penstockd --trim-after (15 minutes by default) at most, while the node has "
    "memory to spare"
)
_VARIANT = "which variant of a directory: the one with this in the names of its files, such as fp16"
_VERIFY = (
    "compare files with checksums: none, those of which the store has a CRC, or all (default: the daemon's "
    "setting)"
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of this process, or the given ones. `command` is the name of the command.

    Ends the process: with 2 for wrong usage, and with 0 for --help and --version.
    """
    return _parser().parse_args(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="penstock", description="Loads model checkpoints through the penstock daemon."
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        if name not in ("demo", "bench", "warm-set"):  # the first two start a daemon of their own
            added.add_argument(
                "--socket-dir",
                metavar="DIR",
                help="where the daemon listens (default: $PENSTOCK_SOCKET_DIR or /run/penstock)",
            )
        return added

    load = command("load", "Loads a checkpoint and prints how fast that was.")
    load.add_argument("source", nargs="+", metavar="SOURCE", help="file, directory, *.index.json or URI")
    load.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    load.add_argument(
        "--tensors", action="append", metavar="GLOB", help="only tensors whose name matches; repeatable"
    )
    load.add_argument(
        "--memory-limit",
        metavar="SIZE",
        type=_memory_limit,
        help="staging memory for this load: -1 what the daemon allows, 0 as little as possible, 4GB, 4GiB",
    )
    load.add_argument("--variant", metavar="NAME", help=_VARIANT)
    load.add_argument("--verify", choices=("off", "auto", "require"), help=_VERIFY)
    load.add_argument("--no-progress", action="store_true", help="no bar on stderr")

    status = command("status", "Shows the daemon's memory, loads and checkpoints.")
    status.add_argument("--json", action="store_true", help="every field, as JSON")
    status.add_argument("--watch", action="store_true", help="show it again every second, until Ctrl-C")

    health = command("health", "Exits with 0 if the daemon is ready, else with 1; for probes.")
    health.add_argument(
        "--live", action="store_true", help="check that the daemon does not hang, even if it is not ready"
    )
    health.add_argument(
        "--timeout", type=float, default=5.0, metavar="SECONDS", help="to wait for an answer (default: 5)"
    )

    prefetch = command("prefetch", "Reads a checkpoint into the staging buffer ahead of its loads.")
    prefetch.add_argument("source", nargs="+", metavar="SOURCE", help="as in load; all are one checkpoint")
    prefetch.add_argument("--pin", action="store_true", help=_PIN)
    prefetch.add_argument("--variant", metavar="NAME", help=_VARIANT)
    prefetch.add_argument("--verify", choices=("off", "auto", "require"), help=_VERIFY)
    prefetch.add_argument("--no-progress", action="store_true", help="no bar on a terminal")

    fetch = command("fetch", "Copies the files beside the weights, and prints the directory that holds them.")
    fetch.add_argument("source", metavar="SOURCE", help="directory, or URI of a prefix")
    fetch.add_argument(
        "directory",
        nargs="?",
        metavar="DIRECTORY",
        help="where to (default: the cache, $PENSTOCK_CACHE_DIR or ~/.cache/penstock)",
    )
    fetch.add_argument(
        "--allow", action="append", metavar="GLOB", help="only these; repeatable (default: all but weights)"
    )
    fetch.add_argument("--ignore", action="append", metavar="GLOB", help="not these; repeatable")
    fetch.add_argument(
        "--max-bytes", metavar="SIZE", type=_size, help="refuse more than that (default: 1GiB)"
    )
    fetch.add_argument(
        "--max-files", metavar="N", type=int, help="refuse more files than that (default: 10000)"
    )
    fetch.add_argument("--no-progress", action="store_true", help="no bar on a terminal")

    evict = command("evict", "Evicts a staged checkpoint, or all idle ones.")
    evict.add_argument("source", nargs="*", metavar="SOURCE", help="as in load (default: every idle one)")

    warm_set = command("warm-set", "Checks the file of penstockd's --warm-set.")
    actions = warm_set.add_subparsers(dest="action", required=True, metavar="ACTION")
    check_help = (
        "Exits with 0 if the file is a warm set, else with 1 and a line for each fault; needs no daemon."
    )
    check = actions.add_parser("check", help=check_help, description=check_help)
    check.add_argument("file", metavar="FILE", help="as for penstockd --warm-set")

    verify = command(
        "verify", "Reads every file and compares it with its checksum; exits with 1 if one differs."
    )
    verify.add_argument("source", nargs="+", metavar="SOURCE", help="as in load; all are one checkpoint")
    verify.add_argument("--variant", metavar="NAME", help=_VARIANT)
    verify.add_argument("--no-progress", action="store_true", help="no bar on stderr")

    bench = command("bench", "Measures what a store and this node can do, and says which flags to use.")
    bench.add_argument("source", nargs="+", metavar="SOURCE", help="as in load; all are one checkpoint")
    bench.add_argument(
        "--seconds", type=float, default=60.0, metavar="N", help="for all measurements together (default: 60)"
    )
    bench.add_argument(
        "--bytes", default="32GiB", metavar="SIZE", help="most that is read in all (default: 32GiB)"
    )
    bench.add_argument(
        "--memory-limit",
        default="1GiB",
        metavar="SIZE",
        type=_memory_limit,
        help="of the private daemon that measures (default: 1GiB)",
    )
    bench.add_argument("--no-progress", action="store_true", help="no bar on stderr")

    command("demo", "Loads a small real model with three memory limits and checks every byte.")
    return parser


class _Version(argparse.Action):
    """Looks it up only when asked: argparse's own would have every command do so."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> None:
        print(f"penstock {client_version()}")
        parser.exit()


def _memory_limit(text: str) -> str:
    try:
        parse_memory_limit(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _size(text: str) -> int | None:
    try:
        return parse_size("--max-bytes", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
