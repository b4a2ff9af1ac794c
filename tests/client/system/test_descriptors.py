"""A process that may open too few files is told so, with the number that is enough, before gRPC ends it."""

from __future__ import annotations

import json
import re
from typing import Any

from ...e2e.support import run_python
from ..conftest import StartDaemon
from ..fake_daemon import random_tensors

TENSORS = random_tensors(6, 400)
SLABS = 60

# For each case, in a process of its own: a load with so many descriptors to spare; then, told how many are
# enough, one with these.
PROGRAM = """
import json, os, resource, sys
import penstock.client.load
from penstock.client import PenstockError, StreamerClient

def loads(spare, which):
    client = StreamerClient(sys.argv[1])
    if which == "second":
        client.load_state_dict("/x")
    kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]
    before = len(os.listdir("/proc/self/fd"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def attempt(limit):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            return len(client.load_state_dict("/x"))
        except PenstockError as error:
            return str(error)

    said = attempt(before - 1 + spare)
    again = said
    if isinstance(said, str):
        again = attempt(int(said.split("Raise its limit to ")[1].split(":")[0]))
    print(json.dumps([said, again]), flush=True)

for case in json.loads(sys.argv[2]):
    child = os.fork()
    if not child:
        loads(*case)
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{case} failed")
"""


def loads(daemon: Any, cases: list[tuple[int, str]]) -> list[tuple[Any, Any]]:
    """What each load said, and the second one."""
    done = run_python("-c", PROGRAM, daemon.socket_dir, json.dumps(cases))
    assert done.returncode == 0, done.stderr
    return [(said, again) for said, again in map(json.loads, done.stdout.splitlines())]


def test_the_first_and_later_loads_say_how_many_files_they_need(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS)
    cases = [(spare, which) for which in ("first", "second") for spare in (0, 1, 5, 15)]
    for case, (said, again) in zip(cases, loads(daemon, cases), strict=True):
        assert re.match(r"too many open files: this process may have \d+ at a time", str(said)), (case, said)
        assert again == len(TENSORS), case


def test_a_load_of_many_slabs_says_how_many_files_it_needs(start_daemon: StartDaemon) -> None:
    """They come with one message, of which the kernel drops what does not fit."""
    daemon = start_daemon(TENSORS, window_slabs=SLABS)
    [(said, again)] = loads(daemon, [(30, "first")])
    (missing,) = re.findall(r"needs (\d+) more for a moment", said)
    assert SLABS - 30 < int(missing) <= SLABS
    assert again == len(TENSORS)
