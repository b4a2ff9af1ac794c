"""Users who load at once each get an equal part of what storage gives, however many loads each has."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch

from ..e2e.support import Nursery, expected, random_tensors, wait_until
from .conftest import StartTarget
from .fuse import mounted

MIB = 1 << 20
TENSORS = random_tensors(8, MIB // 4)
GREEDY, ANNE, BERT = 54321, 54322, 54323


@pytest.mark.usefixtures("root")
def test_a_user_with_four_loads_gets_no_more_bytes_than_one_with_a_single_load(
    start_target: StartTarget, attackers: Nursery, tmp_path: Path
) -> None:
    """What is read until two others have all their bytes: theirs, and about as much of the greedy user's."""
    daemon = start_target("--allow", "/", "--concurrency", "2", "--block-size", "128KiB")
    for parent in itertools.takewhile(
        lambda parent: parent != Path("/tmp"), (tmp_path, *tmp_path.parents[:-1])
    ):
        parent.chmod(0o755)
    names = {f"greedy-{number}.safetensors": GREEDY for number in range(4)}
    names |= {"anne.safetensors": ANNE, "bert.safetensors": BERT}
    content = safetensors.torch.save(TENSORS)
    with mounted(tmp_path / "models", dict.fromkeys(names, content)) as system:
        system.hang("read", beyond=MIB)
        clients = [
            attackers.start("load", uid=uid, socket_dir=daemon.socket_dir, source=system.mount_point / name)
            for name, uid in names.items()
        ]
        waits = ["storage"] * len(names)
        wait_until(
            lambda: [load["waits_for"] for load in daemon.status()["loads"]] == waits,
            "all to wait for storage",
        )
        wait_until(lambda: system.kept, "the readers to hang")
        before = len(system.reads)
        system.release()
        for client in clients:
            assert client.hear("loaded")["found"] == expected(TENSORS)
        read: Counter[int] = Counter()
        missing = {name: len(content) for name in names if names[name] != GREEDY}
        for name, count in system.reads[:before]:
            if name in missing:
                missing[name] -= count
        for name, count in system.reads[before:]:
            read[names[name]] += count
            if name in missing:
                missing[name] -= count
            if all(count <= 0 for count in missing.values()):
                break
        assert read[GREEDY] <= 1.5 * max(read[ANNE], read[BERT])
