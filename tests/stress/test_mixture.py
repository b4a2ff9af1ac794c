"""A seeded mixture of everything that clients, users, files and daemons do to each other.

STRESS_SEED=N runs one seed, and STRESS_LOADS=N as many loads of it, in either form; a failure prints both.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from ..e2e.support import DaemonProcess
from . import plans
from .fleet import Fleet
from .mixture import Mixture

SHORT_LOADS, LONG_LOADS = 36, 200
SHORT_SEEDS = (2, 4, 7, 15)
LONG_SEEDS = range(100, 124)


def _seeds(seeds: tuple[int, ...] | range) -> list[int]:
    chosen = os.environ.get("STRESS_SEED")
    return [int(chosen)] if chosen else list(seeds)


@pytest.mark.parametrize("seed", _seeds(SHORT_SEEDS))
def test_short_mixture(seed: int, fleet: Fleet) -> None:
    run(seed, int(os.environ.get("STRESS_LOADS", SHORT_LOADS)), fleet)


@pytest.mark.stress
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", _seeds(LONG_SEEDS))
def test_long_mixture(seed: int, fleet: Fleet) -> None:
    run(seed, int(os.environ.get("STRESS_LOADS", LONG_LOADS)), fleet)


def run(seed: int, loads: int, fleet: Fleet) -> None:
    if os.geteuid():
        pytest.skip("needs root, to be several users")
    top = Path(tempfile.mkdtemp(prefix="pst-"))
    top.chmod(0o755)
    daemons: list[DaemonProcess] = []
    mixture = None
    try:
        mixture = Mixture(plans.make(seed, loads), fleet, top, daemons)
        mixture.run()
    except BaseException:
        print(f"reproduce with STRESS_SEED={seed} STRESS_LOADS={loads}")
        raise
    finally:
        if mixture is not None:
            mixture.end()
            print(f"seed {seed}: {dict(sorted(mixture.results.items()))}, peak {mixture.peak_bytes}")
        for daemon in daemons:
            daemon.kill()
        shutil.rmtree(top)
