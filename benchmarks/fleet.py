"""Runs a small fleet on this machine, and compares its requests with the formulas of docs/fleet.md.

    python -m benchmarks.fleet                        # 8 daemons, 100 MB each, about two minutes
    python -m benchmarks.fleet --only cold tier --nodes 4 --size 60MB

All daemons read the same checkpoint from one server, and share its rate. The server counts requests and
bytes. Each scenario adds rows to a table. If a formula does not hold, a line says which one, and the exit
code is 1.

    cold       all daemons start at once, and have nothing
    tier       the same with empty tiers. Then all daemons are restarted, and read from their tiers
    warm-set   warm sets: the first look, checks, and a new version
    refusals   the server refuses requests when there are too many at once, as S3 does with SlowDown: to the
               daemons, and to daemons with a lower --object-concurrency
    cache      the same as cold, twice, with a caching nginx (docs/fleet-cache.conf) before the store
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import fleet_cache, fleet_formulas, fleet_store, local_server, make_checkpoint, report, system
from benchmarks.fleet_nodes import Fleet, Scenario
from benchmarks.fleet_store import LIST, FleetStore, Request

_SHARDS = 4
_INTERVAL_SECONDS = 2.0
_CHECKED_SECONDS = 12.0
_FEW_CONNECTIONS = 4
_RETRIES = 30
"""More than the default, because the store refuses requests for as long as it is busy with others."""
_NO_LIMIT = 1 << 30


def cold(fleet: Fleet) -> None:
    formula = fleet_formulas.first_load(fleet.checkpoint, fleet.block_bytes).times(fleet.nodes)
    with fleet.started() as daemons:
        seconds = fleet.load(daemons)
    fleet.compare("first load", formula, fleet.store.requests(), seconds)


def tier(fleet: Fleet) -> None:
    first = fleet_formulas.first_load(fleet.checkpoint, fleet.block_bytes).times(fleet.nodes)
    versions = fleet_formulas.versions(fleet.checkpoint).times(fleet.nodes)
    with fleet.started(tiers=True) as daemons:
        seconds = fleet.load(daemons)
        fewer = fleet_formulas.read_twice_bytes(fleet.checkpoint) * fleet.nodes
        fleet.compare("first load, empty tiers", first, fleet.store.requests(), seconds, fewer_bytes=fewer)
        fleet.wait_until_kept(daemons)
    with fleet.started(tiers=True) as daemons:
        seconds = fleet.load(daemons)
        fleet.compare("after a restart, from the tiers", versions, fleet.store.requests(), seconds)
        fleet.store.reset()
        seconds = fleet.load(daemons)
        fleet.compare("load again, from memory", versions, fleet.store.requests(), seconds)


def warm_set(fleet: Fleet) -> None:
    wishes = fleet.temporary / "warm-set.yaml"
    wishes.write_text(f'checkpoints: [{{name: model, source: "{fleet.uri}"}}]\n')
    flags = ("--warm-set", str(wishes), "--warm-set-interval", str(_INTERVAL_SECONDS))
    first = fleet_formulas.first_in_warm_set(fleet.checkpoint, fleet.block_bytes).times(fleet.nodes)
    changed = fleet_formulas.new_version_in_warm_set(fleet.checkpoint, fleet.block_bytes).times(fleet.nodes)
    fleet.store.reset()
    with fleet.started(*flags, warmed_up=False):
        fleet.wait_until_served(first.body_bytes, "the warm sets to be read")
        time.sleep(_CHECKED_SECONDS)
        fleet.store.publish()
        published_at = time.monotonic()
        fleet.wait_until_served((first + changed).body_bytes, "the new version to be read")
        read_seconds = time.monotonic() - published_at
        time.sleep(_INTERVAL_SECONDS)
    requests = fleet.store.requests()
    looks = [_looks([request for request in requests if request.node == node]) for node in range(fleet.nodes)]
    checks: list[Request] = []
    news: list[Request] = []
    pauses, delays = [], []
    for each in looks:
        new = _changed(each)
        news += [request for number in new for request in each[number]]
        # The daemon may have ended within the last look.
        regular = [look for number, look in enumerate(each[:-1]) if number > 1 and number not in new]
        checks += [request for look in regular for request in look]
        begins = [look[0].at for look in each]
        staged = {1, *new[1:]}  # staging follows a look at once
        pauses += [
            later - earlier
            for number, (earlier, later) in enumerate(itertools.pairwise(begins), start=1)
            if number not in staged
        ]
        delays += [begins[number] - published_at for number in new[:1]]
    firsts = [request for each in looks for look in each[:2] for request in look]
    count = sum(request.kind == LIST for request in checks)
    fleet.compare("warm set, the first time", first, firsts)
    versions = fleet_formulas.versions(fleet.checkpoint).times(count)
    fleet.compare(f"warm set, {count} checks", versions, checks)
    fleet.compare("warm set, a new version", changed, news)
    least, shortest = min(pauses), _INTERVAL_SECONDS * (1 - fleet_formulas.JITTER)
    fleet.expect(
        least >= shortest, f"warm set: two looks are {least:.3f} s apart, which is less than {shortest:.3f} s"
    )
    print(
        f"  looks are {least:.2f} to {max(pauses):.2f} s apart; the nodes noticed a new version after "
        f"{min(delays):.2f} to {max(delays):.2f} s, and all had it after {read_seconds:.1f} s",
        file=sys.stderr,
    )


def _looks(requests: Sequence[Request]) -> list[list[Request]]:
    """What a node asked, in looks at the store, which begin with a list: the first look, staging, checks, the
    look that finds a new version, staging, and more checks."""
    groups = fleet_formulas.split([request.kind for request in requests], LIST)
    return [[requests[position] for position in group] for group in groups]


def _changed(looks: Sequence[Sequence[Request]]) -> list[int]:
    """The looks after the first two that asked for more than versions."""
    return [
        number
        for number, look in enumerate(looks)
        if number > 1 and any(request.method == "GET" and request.kind != LIST for request in look)
    ]


def refusals(fleet: Fleet) -> None:
    formula = fleet_formulas.first_load(fleet.checkpoint, fleet.block_bytes).times(fleet.nodes)
    most = 2 * fleet.nodes * _FEW_CONNECTIONS
    retries = ("--object-retries", str(_RETRIES))
    few = ("--object-concurrency", str(_FEW_CONNECTIONS))
    for what, flags in (
        (f"a store that takes {most} requests at once", retries),
        (f"the same with {' '.join(few)}", retries + few),
    ):
        with fleet.started(*flags) as daemons:
            fleet.store.most_at_once = most
            seconds = fleet.load(daemons)
            fleet.store.most_at_once = _NO_LIMIT
        requests = fleet.store.requests()
        fleet.compare(f"{what}, {fleet_store.refused(requests)} refused", formula, requests, seconds)


def cache(fleet: Fleet) -> None:
    if local_server.nginx() is None:
        print("  cache is left out: there is no nginx; install Debian's nginx-light", file=sys.stderr)
        return
    opened = fleet_formulas.opened(fleet.checkpoint).times(fleet.nodes)
    first = fleet_formulas.first_loads_behind_cache(fleet.checkpoint, fleet.block_bytes, fleet.nodes)
    with fleet_cache.Cache() as nginx:
        for what, formula in (("first load, behind nginx", first), ("new nodes, behind nginx", opened)):
            with fleet.started(proxy=nginx.url) as daemons:
                seconds = fleet.load(daemons)
            fleet.compare(what, formula, fleet.store.requests(), seconds)


SCENARIOS: dict[str, Scenario] = {
    "cold": cold,
    "tier": tier,
    "warm-set": warm_set,
    "refusals": refusals,
    "cache": cache,
}


def lines(fleet: Fleet) -> list[str]:
    """Markdown: the machine, the fleet, and the table."""
    formula, counted = "lists / HEAD / GET, formula", "counted"
    head = [f"{fleet.nodes} nodes", formula, counted, "MB, formula", "counted", "s at least", "s"]
    index = " and an index" if fleet.checkpoint.index_bytes else ""
    return [
        *system.describe(),
        f"- Fleet: {fleet.nodes} daemons, a checkpoint of {fleet.total_bytes / 1e6:.0f} MB in "
        f"{len(fleet.checkpoint.files)} files{index}, blocks of {fleet.block_bytes / (1 << 20):g} MiB, and "
        f"a store of {fleet.rate_bytes / 1e6:.0f} MB/s on the same machine",
        "",
        *report.markdown_table(head, fleet.rows),
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = make_checkpoint.parse_size
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="SCENARIO")
    parser.add_argument("--nodes", type=int, default=8, help="daemons (8)")
    parser.add_argument("--size", type=size, default=100_000_000, help="bytes of the checkpoint (100MB)")
    parser.add_argument("--block-size", type=size, default=4 << 20, help="--object-block-size (4MiB)")
    parser.add_argument("--rate", type=size, default=200_000_000, help="bytes a second of the store (200MB)")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where the tiers are written")
    options = parser.parse_args(arguments)
    # SIGTERM runs the clean-up of every `with`: daemons, nginx, temporary directories.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    needed_bytes = options.nodes * (options.size * 3 // 2 + 300_000_000)
    if needed_bytes > system.available_bytes():
        raise SystemExit(
            f"{options.nodes} daemons with {options.size / 1e6:.0f} MB each need "
            f"{needed_bytes / 1e9:.1f} GB of memory, and {system.available_bytes() / 1e9:.1f} GB are "
            "available; lower --nodes or --size"
        )
    directory = make_checkpoint.llama_checkpoint(options.size, shards=_SHARDS)
    with (
        tempfile.TemporaryDirectory(prefix="penstock-fleet-", dir=options.directory) as temporary,
        FleetStore(options.rate) as store,
    ):
        checkpoint = fleet_formulas.read_checkpoint(directory)
        fleet = Fleet(
            store, options.nodes, directory, checkpoint, options.block_size, options.rate, Path(temporary)
        )
        for name in options.only:
            print(f"{name} ...", file=sys.stderr)
            SCENARIOS[name](fleet)
    print("\n".join(lines(fleet)))
    for line in fleet.broken:
        print(f"does not hold: {line}")
    return 1 if fleet.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
