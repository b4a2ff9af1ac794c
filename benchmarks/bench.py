"""Measures Penstock and its peers side by side. `make bench` runs all scenarios, `--only` some of them.

    python -m benchmarks.bench --only warm cold
    python -m benchmarks.bench --only warm --size 1GB --rounds 3 --no-page

Prints tables, and writes docs/benchmarks.md and docs/benchmarks.png. Scenarios can be measured one by one: a
run leaves the tables of the others as they were, and each table names its commit. Run it on an idle machine.
As root it also measures huge pages for shared memory. For that it changes a setting of the machine, and
restores it.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import report
from benchmarks.contenders import CONTENDERS
from benchmarks.disk import again, cold, small, sparse, startup, warm
from benchmarks.fetch import fetch
from benchmarks.make_checkpoint import parse_size
from benchmarks.operate import operate
from benchmarks.regression import before
from benchmarks.runner import Runner
from benchmarks.s3 import s3
from benchmarks.s3_latency import s3latency
from benchmarks.sharing import node, queue, warm10

# In the order in which they run.
_SCENARIOS: dict[str, Callable[[Runner], None]] = {
    scenario.__name__: scenario
    for scenario in (
        warm,
        cold,
        again,
        startup,
        small,
        sparse,
        node,
        warm10,
        queue,
        operate,
        s3,
        s3latency,
        fetch,
    )
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*_SCENARIOS, "before"], default=_SCENARIOS, metavar="SCENARIO"
    )
    parser.add_argument("--contenders", nargs="+", choices=sorted(CONTENDERS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=parse_size, default=4 * 10**9, help="bytes of the checkpoint (4GB)")
    parser.add_argument("--small-tensors", type=int, default=100_000, metavar="COUNT")
    parser.add_argument("--sparse", type=parse_size, default=200 * 10**9, metavar="SIZE")
    parser.add_argument(
        "--staged-size", type=parse_size, default=10 * 10**9, help="bytes of the checkpoint of warm10 (10GB)"
    )
    parser.add_argument("--clients", type=int, default=64, help="clients in the queue (64)")
    parser.add_argument(
        "--before", type=Path, metavar="CHECKOUT", help="checkout to compare with, for the scenario before"
    )
    parser.add_argument("--no-page", dest="page", action="store_false", help="only print")
    options = parser.parse_args(arguments)

    # SIGTERM runs the clean-up of every `with`: daemons, temporary directories, the machine's settings.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runner = Runner(
        rounds=options.rounds,
        size_bytes=options.size,
        sparse_bytes=options.sparse,
        staged_bytes=options.staged_size,
        small_tensors=options.small_tensors,
        clients=options.clients,
        contenders=options.contenders or list(CONTENDERS),
        write_page=options.page,
        before=options.before,
    )
    for name, scenario in {**_SCENARIOS, "before": before}.items():
        if name in options.only:
            print(f"{name} ...", file=sys.stderr)
            scenario(runner)
    if options.page:
        report.draw()


if __name__ == "__main__":
    main(sys.argv[1:])
