"""Ranks of an engine: one read for those of a node, and of nothing that none of them has use for."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from ...e2e.conftest import StartDaemon
from ...e2e.support import DaemonProcess, running_daemon
from .conftest import Engines, auto, done, penstock
from .models import EXPERTS, MODELS

TP: dict[str, Any] = {"tensor_parallel_size": 2}
# A read may go over what is not wanted between tensors that are.
GAPS_BYTES = 64 << 10
EP: dict[str, Any] = {**TP, "enable_expert_parallel": True}
PP: dict[str, Any] = {"pipeline_parallel_size": 2}


@pytest.fixture
def other_node() -> Iterator[DaemonProcess]:
    """The daemon of another node."""
    with running_daemon("--memory-limit", "128MiB") as daemon:
        yield daemon


class Ranks:
    """Loads a model in two processes, and gives the weights that each of them has."""

    def __init__(self, engines: Engines, tmp_path: Path) -> None:
        self._engines = engines
        self._tmp_path = tmp_path

    def load(self, model: Path, options: dict[str, Any], *loads: dict[str, Any], **more: Any) -> list[str]:
        """`loads`: for each rank, or one for both."""
        store = str(self._tmp_path / uuid.uuid4().hex[:8])
        ranks = [
            self._engines.launch("load_as_rank", model, load, options, rank=rank, store=store, **more)
            for rank, load in enumerate(loads if len(loads) == 2 else loads * 2)
        ]
        weights = [done(rank)["weights"] for rank in ranks]
        assert not list(Path("/dev/shm").glob(f"{Path(store).name}*")), (
            "what vLLM leaves, as its ranks just end"
        )
        return weights


@pytest.fixture
def ranks(engines: Engines, tmp_path: Path) -> Ranks:
    return Ranks(engines, tmp_path)


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of each tensor of a checkpoint."""
    files = directory.glob("*.safetensors")
    return {name: t.nbytes for file in files for name, t in safetensors.torch.load_file(file).items()}


def test_an_engine_of_two_ranks_reads_once_and_says_the_same(
    engines: Engines, start_daemon: StartDaemon, models: dict[str, Path]
) -> None:
    daemon = start_daemon("--memory-limit", "4MiB")
    options = {**TP, "distributed_executor_backend": "mp"}
    alone = engines.run(models["float32 tied"], auto())
    together = engines.run(models["float32 tied"], penstock(daemon), options=options)
    assert together["tokens"] == alone["tokens"]
    assert daemon.read_bytes() == sum(sizes(models["float32 tied"]).values())
    groups = re.findall(r" opened .*\bgroup=(\S+) .*\bgroup_size=(\d+)\b", daemon.log())
    assert len(groups) == 2
    assert set(groups) == {(groups[0][0], "2")}, "one group of both ranks"


@pytest.mark.parametrize("limit", ["4MiB", "128MiB"])
@pytest.mark.parametrize("options", [TP, EP, PP], ids=["TP", "EP", "PP"])
def test_ranks_of_one_node_have_the_same_weights_and_read_once(
    options: dict[str, Any], limit: str, ranks: Ranks, start_daemon: StartDaemon, models: dict[str, Path]
) -> None:
    daemon = start_daemon("--memory-limit", limit)
    expected = ranks.load(models["mixtral"], options, auto())
    assert ranks.load(models["mixtral"], options, penstock(daemon)) == expected
    assert daemon.read_bytes() == sum(sizes(models["mixtral"]).values())


def test_experts_of_another_node_are_not_read(
    ranks: Ranks, start_daemon: StartDaemon, other_node: DaemonProcess, models: dict[str, Path]
) -> None:
    daemon = start_daemon("--memory-limit", "128MiB")
    expected = ranks.load(models["mixtral"], EP, auto())
    assert ranks.load(models["mixtral"], EP, penstock(daemon), penstock(other_node)) == expected
    all_sizes = sizes(models["mixtral"])
    experts = {name: int(match[1]) for name in all_sizes if (match := re.search(r"\.experts\.(\d+)\.", name))}
    assert len(experts) == MODELS["mixtral"].layers * EXPERTS * 3
    for node, own in ((daemon, (0, 1)), (other_node, (2, 3))):
        wanted = sum(size for name, size in all_sizes.items() if experts.get(name, own[0]) in own)
        assert node.read_bytes() == wanted < sum(all_sizes.values())


def test_all_experts_are_read_where_they_may_be_moved(
    ranks: Ranks, start_daemon: StartDaemon, other_node: DaemonProcess, models: dict[str, Path]
) -> None:
    daemon = start_daemon("--memory-limit", "128MiB")
    expected = ranks.load(models["mixtral"], EP, auto(), spare_experts=2)
    found = ranks.load(models["mixtral"], EP, penstock(daemon), penstock(other_node), spare_experts=2)
    assert found == expected != ranks.load(models["mixtral"], EP, auto())
    assert daemon.read_bytes() == other_node.read_bytes() == sum(sizes(models["mixtral"]).values())


@pytest.mark.parametrize("name", ["mixtral", "int8"])
def test_layers_of_a_stage_on_another_node_are_not_read(
    name: str, ranks: Ranks, start_daemon: StartDaemon, other_node: DaemonProcess, models: dict[str, Path]
) -> None:
    daemon = start_daemon("--memory-limit", "128MiB")
    expected = ranks.load(models[name], PP, auto())
    assert ranks.load(models[name], PP, penstock(daemon), penstock(other_node)) == expected
    all_sizes = sizes(models[name])
    for node, first in ((daemon, 0), (other_node, MODELS[name].layers // 2)):
        own = range(first, first + MODELS[name].layers // 2)
        layers = {key: int(found[1]) for key in all_sizes if (found := re.search(r"layers\.(\d+)\.", key))}
        wanted = sum(size for key, size in all_sizes.items() if layers.get(key, first) in own)
        assert wanted <= node.read_bytes() < wanted + GAPS_BYTES < sum(all_sizes.values())
