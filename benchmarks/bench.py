"""Measures Penstock and its peers side by side: `make bench`, or parts of it with `--only`.

    python benchmarks/bench.py --only warm cold
    python benchmarks/bench.py --only warm --size 1GB --rounds 3 --no-page

Prints tables, and writes docs/benchmarks.md and docs/benchmarks.png. A run of some scenarios leaves the
others on the page as they were, so that they may be measured one by one; each says of which commit it is. Run
it on a machine that does nothing else. As root it also measures huge pages for shared memory, for which it
changes a setting of the machine and puts it back.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import report
from contenders import CONTENDERS
from disk import again, cold, small, sparse, startup, warm
from fetch import fetch
from make_checkpoint import parse_size
from operate import operate
from regression import before
from runner import Runner
from s3 import s3
from s3_latency import s3latency
from sharing import node, queue, warm10

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
    parser.add_argument("--size", type=parse_size, default=4 * 10**9, help="of the checkpoint (4GB)")
    parser.add_argument("--small-tensors", type=int, default=100_000, metavar="COUNT")
    parser.add_argument("--sparse", type=parse_size, default=200 * 10**9, metavar="SIZE")
    parser.add_argument("--staged-size", type=parse_size, default=10 * 10**9, help="of warm10's (10GB)")
    parser.add_argument("--clients", type=int, default=64, help="of the queue (64)")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="of the scenario of that name")
    parser.add_argument("--no-page", dest="page", action="store_false", help="only print")
    options = parser.parse_args(arguments)

    # Ends through the clean-up of every `with`: daemons, temporary directories, the machine's settings.
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
