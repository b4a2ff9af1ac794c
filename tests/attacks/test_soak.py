"""The hostile soak: every attack at once, by several strangers, while honest users load real checkpoints."""

from __future__ import annotations

import os
import shutil
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from penstock.client.cli.demo import find_model

from ..e2e.support import (
    MIB,
    ClientProcess,
    Nursery,
    assert_no_shared_memory_but,
    random_tensors,
    shared_memory,
    wait_until,
    write_checkpoint,
)
from . import hostile_files
from .conftest import StartTarget
from .honest import load_in_a_loop, sum_of
from .strangers import assault, catalogue
from .support import MEMORY_BOUND_BYTES, TargetDaemon

STRANGERS = (1201, 1202, 1203)
HONEST = 1204
ROOT = 0
USERS = len(STRANGERS) + 2
LATENCY_CONSTANT_SECONDS = 5.0
"""With n users active a load takes at most n times what it takes alone, and this: docs/security.md."""
LOADS_ALONE = 3
PATIENCE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Soak:
    """How much of it."""

    seconds: float
    processes: int
    """Of each stranger; they share the attacks."""
    scale: float
    """Of the hostile files."""
    contained: bool
    """In a container of the documented size. Where none can be made the test is skipped."""
    real_model: bool
    timed: bool
    """Whether the latency is judged: only where nothing else is on the machine."""


SHORT = Soak(seconds=10, processes=4, scale=0.1, contained=False, real_model=False, timed=False)
LONG = Soak(seconds=120, processes=12, scale=1.0, contained=True, real_model=True, timed=True)


@pytest.mark.parametrize(
    "soak",
    [
        pytest.param(SHORT, id="short"),
        pytest.param(LONG, id="long", marks=[pytest.mark.stress, pytest.mark.timeout(600)]),
    ],
)
def test_honest_users_are_served_while_strangers_try_every_attack_at_once(
    soak: Soak, root: None, models: Path, start_target: StartTarget, attackers: Nursery
) -> None:
    hostile_files.write(models, scale=soak.scale)
    checkpoint = real_model(models) if soak.real_model else written_model(models)
    shared_before = shared_memory()
    daemon = start_target("--allow", str(models), memory_limit_bytes=256 * MIB, contained=soak.contained)
    alone = load(attackers, daemon, checkpoint, HONEST, LOADS_ALONE)
    alone.go()
    alone_seconds = max(one["seconds"] for one in alone.hear("done")["loads"])
    wait_until(lambda: not daemon.usage().sessions, "the first user to be gone")
    before = daemon.usage()

    with daemon.watched() as watch:
        strangers = {uid: besiege(attackers, daemon, models, uid, soak) for uid in STRANGERS}
        users = {uid: load(attackers, daemon, checkpoint, uid, 1) for uid in (ROOT, HONEST)}
        played = {
            uid: [
                process.hear("ended", patience_seconds=soak.seconds + PATIENCE_SECONDS)
                for process in processes
            ]
            for uid, processes in strangers.items()
        }
        for user in users.values():
            user.go()
        loads = {
            uid: user.hear("done", patience_seconds=PATIENCE_SECONDS)["loads"] for uid, user in users.items()
        }
    bound_seconds = USERS * alone_seconds + LATENCY_CONSTANT_SECONDS
    print(f"alone {alone_seconds:.2f} s, bound {bound_seconds:.1f} s, peak {watch.peak}")
    for uid, done in loads.items():
        print(f"uid {uid}: {len(done)} loads, {summary([one['seconds'] for one in done])}")
        for line in slowest_lines(daemon.log(), uid):
            print(f"  {line}")
    print_attacks(played)

    daemon.assert_alive()
    wrong = [one for done in loads.values() for one in done if one["error"] or one["sum"] != checkpoint.sum]
    assert not wrong, (
        f"{len(wrong)} of {sum(map(len, loads.values()))} honest loads failed, such as {wrong[:3]}"
    )
    watch.assert_bounded(MEMORY_BOUND_BYTES)
    if soak.timed:
        slowest = max(one["seconds"] for done in loads.values() for one in done)
        assert slowest <= bound_seconds, f"a load took {slowest:.1f} s"
    for uid, ended in played.items():
        assert set().union(*(one["rounds"] for one in ended)) == set(catalogue()), f"not all played by {uid}"

    for process in [*users.values(), *(one for processes in strangers.values() for one in processes)]:
        assert process.wait() == 0, process.errors()
    # A checkpoint that a killed client was loading is warm as far as it came, and its files stay open.
    with daemon.client() as client:
        client.evict()
    daemon.assert_comes_back(before)
    assert_no_shared_memory_but(shared_before)
    assert not list(daemon.temporary.iterdir())
    last = load(attackers, daemon, checkpoint, HONEST, 1)
    last.go()
    assert [one["sum"] for one in last.hear("done")["loads"]] == [checkpoint.sum]


@dataclass(frozen=True, slots=True)
class Model:
    path: Path
    sum: str
    """Of what safetensors itself reads."""


def real_model(models: Path) -> Model:
    """A real one, as the demo's. Skips where its package is not installed."""
    try:
        found = find_model()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    shutil.copy(found, models / "real.safetensors")
    return Model(models / "real.safetensors", sum_of(safetensors.torch.load_file(found).items()))


def written_model(models: Path) -> Model:
    tensors = random_tensors(24, MIB // 4, seed=1)
    return Model(write_checkpoint(models / "written.safetensors", tensors), sum_of(tensors.items()))


def load(nursery: Nursery, daemon: TargetDaemon, model: Model, uid: int, at_least: int) -> ClientProcess:
    """An honest user's process, which loads from now on until it is told to go."""
    user = nursery.start(
        load_in_a_loop, uid=uid or None, socket_dir=daemon.socket_dir, source=model.path, at_least=at_least
    )
    user.hear("loads")
    return user


def besiege(
    nursery: Nursery, daemon: TargetDaemon, models: Path, uid: int, soak: Soak
) -> list[ClientProcess]:
    """A stranger's processes, which attack from now on."""
    own = models / str(uid)
    own.mkdir()
    os.chown(own, uid, uid)
    names = list(catalogue())
    processes = [
        nursery.start(
            assault,
            uid=uid,
            socket_dir=daemon.socket_dir,
            http=daemon.http_address,
            models=models,
            own=own,
            names=names[first :: soak.processes],
            seconds=soak.seconds,
        )
        for first in range(soak.processes)
    ]
    for process in processes:
        process.hear("attacks")
    return processes


def slowest_lines(log: str, uid: int, count: int = 5) -> list[str]:
    """What the daemon said of the loads of a user that took it longest."""
    lines = [line for line in log.splitlines() if f" uid={uid} " in line and " seconds=" in line]
    return sorted(lines, key=lambda line: -float(line.partition(" seconds=")[2].split()[0]))[:count]


def summary(seconds: list[float]) -> str:
    return f"median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s"


def print_attacks(played: dict[int, list[dict[str, Any]]]) -> None:
    """How often each attack was played and what refused it, for people who look at the test's output."""
    rounds: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    for ended in played.values():
        for one in ended:
            rounds.update(one["rounds"])
            refusals.update(one["refusals"])
    for name, count in sorted(rounds.items()):
        print(f"{name}: {count} rounds")
    for text, count in sorted(refusals.items()):
        print(f"  {count} x {text}")
