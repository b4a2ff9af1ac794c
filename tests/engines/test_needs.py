"""What ranks of vLLM leave out before it is read; tests/engines/real has the same with vLLM's own models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock.client.adopt.vllm_needs import EVERYTHING, Needs, mapper_of, needs_of, selection

from ..e2e.conftest import StartDaemon
from ..e2e.support import same, write_checkpoint
from . import interfaces
from .test_vllm import Model, loader, model_config

EXPERT = "model.layers.0.mlp.experts.{}.up_proj.weight"


def mixture(held: list[int], count: int, parallel: interfaces.FusedMoEParallelConfig) -> torch.nn.Module:
    """A model with one layer of experts."""
    model, layer, mlp = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
    mlp.experts = interfaces.RoutedExperts(held, count, parallel)
    layer.mlp = mlp
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([layer])
    return model


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> interfaces.ParallelConfig:
    """What vLLM is configured to do while it loads a model."""
    parallel = interfaces.ParallelConfig(enable_expert_parallel=True)
    config = SimpleNamespace(parallel_config=parallel)
    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: config)
    return parallel


def left_out(needs: Needs, count: int = 8) -> list[int]:
    return [n for n in range(count) if needs.leaves_out(EXPERT.format(n), EXPERT.format(n))]


def test_experts_that_a_rank_lacks_are_left_out(parallel: interfaces.ParallelConfig) -> None:
    place = interfaces.FusedMoEParallelConfig(ep_size=4, ep_rank=1)
    needs = needs_of(mixture([2, 3], 8, place))
    assert left_out(needs) == [0, 1, 4, 5, 6, 7]
    for kept in (
        EXPERT.format(8),  # of other layers, or shared ones
        EXPERT.format(0) + "_scale",
        EXPERT.format(0).replace("layers.0", "layers.1"),  # no layer of this model
        "vision.experts.0.up_proj.weight",
        "model.layers.0.mlp.gate.weight",
    ):
        assert not needs.leaves_out(kept, kept)


def test_replicas_of_a_node_ask_for_the_same_experts(parallel: interfaces.ParallelConfig) -> None:
    """Of four data-parallel ranks, two on each node."""
    parallel.data_parallel_size_local = 2
    asked = []
    for rank in range(4):
        parallel.data_parallel_rank_local = rank % 2
        place = interfaces.FusedMoEParallelConfig(ep_size=4, ep_rank=rank, dp_size=4, dp_rank=rank)
        asked.append(left_out(needs_of(mixture([2 * rank, 2 * rank + 1], 8, place))))
    assert asked == [[4, 5, 6, 7]] * 2 + [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    "odd", ["they may be moved", "they are placed in another way", "layers differ", "all are held"]
)
def test_all_experts_are_read_where_it_cannot_be_known_which_are_needed(
    odd: str, parallel: interfaces.ParallelConfig
) -> None:
    place = interfaces.FusedMoEParallelConfig(ep_size=2, ep_rank=0)
    model = mixture([0, 1], 4, place)
    assert left_out(needs_of(model), 4) == [2, 3]
    if odd == "they may be moved":
        parallel.enable_eplb = True
    elif odd == "they are placed in another way":
        model = mixture([0, 2], 4, place)
    elif odd == "layers differ":
        model.other = mixture([0, 1, 2], 6, place)
    else:
        parallel.enable_expert_parallel = False
    assert needs_of(model) == EVERYTHING


def test_what_no_rank_of_a_node_needs_is_left_out() -> None:
    layers = frozenset({"model.layers.0.mlp"})
    stage = "model.layers.1."
    some = [Needs((stage,), layers, frozenset({expert}), 3) for expert in (0, 1)]
    is_needed = selection(some, str)
    assert is_needed is not None
    assert [is_needed(EXPERT.format(expert)) for expert in range(3)] == [True, True, False]
    assert not is_needed(f"{stage}weight")
    assert is_needed("model.layers.10.weight")
    all_experts = selection([*some, Needs((stage,), layers, frozenset({2}), 3)], str)
    assert all_experts is not None
    assert all_experts(EXPERT.format(2))
    assert not all_experts(f"{stage}weight")
    assert selection([*some, EVERYTHING], str) is None
    assert selection([Needs(("a.0.",)), Needs(("a.1.",))], str) is None


def test_what_one_rank_of_a_node_needs_is_read_whatever_the_others_leave_out() -> None:
    is_needed = selection([Needs(("a.0.", "a.2.")), Needs(("a.1.", "a.2."))], str)
    assert is_needed is not None
    assert [is_needed(f"a.{layer}.weight") for layer in range(4)] == [True, True, False, True]


def staged(**attributes: Any) -> Model:
    """The first stage of a model with three layers."""
    model = Model(**attributes)
    model.layers = torch.nn.ModuleList(
        [torch.nn.Linear(1, 1), interfaces.PPMissingLayer(), interfaces.PPMissingLayer()]
    )
    model.head = interfaces.PPMissingLayer()
    return model


@pytest.mark.parametrize("mapper", ["map_name", "_map_name", None])
def test_layers_of_other_stages_are_not_read(
    mapper: str | None, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    names = ("embed.weight", *(f"block.{n}.weight" for n in (0, 1, 2, 10)), "head.weight")
    tensors = {name: torch.full((1 << 16,), float(n)) for n, name in enumerate(names)}
    write_checkpoint(tmp_path / "model.safetensors", tensors)
    daemon = start_daemon("--memory-limit", "64MiB")
    rename = SimpleNamespace(**({mapper: lambda name: name.replace("block", "layers")} if mapper else {}))
    model = staged(hf_to_vllm_mapper=rename)
    assert (mapper_of(model) is None) is (mapper is None)
    loader(socket_dir=str(daemon.socket_dir)).load_weights(model, model_config(tmp_path, quantization="x"))
    wanted = {name: tensors[name] for name in names if mapper is None or name not in names[2:4]}
    same(model.taken.items(), wanted)
    assert daemon.read_bytes() == sum(tensor.nbytes for tensor in wanted.values())


def test_all_layers_are_read_where_it_cannot_be_known_how_the_model_names_them(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Though the names look like those of layers that another stage has."""
    tensors = {f"layers.{n}.weight": torch.full((3,), float(n)) for n in range(3)}
    write_checkpoint(tmp_path / "model.safetensors", tensors)
    daemon = start_daemon("--memory-limit", "64MiB")
    model = staged(hf_to_vllm_mapper=object())
    loader(socket_dir=str(daemon.socket_dir)).load_weights(model, model_config(tmp_path, quantization="x"))
    same(model.taken.items(), tensors)


def test_everything_is_read_where_the_daemon_refuses_so_many_names(
    start_daemon: StartDaemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {f"{'x' * 8000}.{n}": torch.ones(1) for n in range(3200)}
    tensors["layers.1.weight"] = torch.ones(1)
    write_checkpoint(tmp_path / "model.safetensors", tensors)
    daemon = start_daemon("--memory-limit", "64MiB")
    model = staged()
    loader(socket_dir=str(daemon.socket_dir)).load_weights(model, model_config(tmp_path, quantization="x"))
    assert set(model.taken) == set(tensors) - {"layers.1.weight"}
    assert "tensors that this node does not need" in caplog.text
