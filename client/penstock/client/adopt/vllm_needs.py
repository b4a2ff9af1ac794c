"""The tensors of a checkpoint that a rank of vLLM needs, so that the others are not read. Not needed are:

    layers of other pipeline stages     vLLM puts a placeholder in the place of such a layer
    experts of other ranks              the model's expert layers know which experts they hold

The model that vLLM has made answers both, for names that the model's own mapper has changed. In doubt a
tensor is read: its name leads to no layer of the model, experts are placed differently than vLLM's function
for skipping them assumes, or experts may be moved (EPLB). Embeddings and heads are always read, as models tie
them to each other.

vLLM's own `is_pp_missing_parameter` is not called: it remembers models by their `id`, which a later model of
the same process may have too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_LAYER = re.compile(r".*\.\d+")
_EXPERTS = ".experts"

MapName = Callable[[str], "str | None"]
"""From a checkpoint's name to the model's; None for a name that the model leaves out."""


@dataclass(frozen=True, slots=True)
class Needs:
    """The tensors that one rank leaves out. Ranks send this to each other."""

    other_stages: tuple[str, ...] = ()
    """Prefixes of the layers that other pipeline stages have, in the model's names."""
    expert_layers: frozenset[str] = frozenset()
    """Parents of the expert layers, in the model's names."""
    experts: frozenset[int] | None = None
    """The experts that this rank has in its expert layers, and the replicas on its node; None is all."""
    expert_count: int = 0

    def leaves_out(self, name: str, mapped: str | None) -> bool:
        """Whether the rank has no use for the tensor `name`, which the model calls `mapped`."""
        if mapped is None:
            return False
        if mapped.startswith(self.other_stages):
            return True
        if self.experts is None or mapped.partition(f"{_EXPERTS}.")[0] not in self.expert_layers:
            return False
        from vllm.model_executor.model_loader.ep_weight_filter import parse_expert_id, should_skip_weight

        expert = parse_expert_id(name)
        # Numbers from `expert_count` on belong to other layers, or to shared experts.
        known = expert is not None and expert < self.expert_count
        return known and bool(should_skip_weight(name, self.experts))


EVERYTHING = Needs()


def selection(needs: Iterable[Needs], map_name: MapName) -> Callable[[str], bool] | None:
    """Whether any of the ranks needs a tensor, by its name in the checkpoint; None if they need all."""
    stages = _merged(needs)
    nobody_s = set.intersection(*(set(stage.other_stages) for stage in stages))
    complete = [stage for stage in stages if stage.experts is None]
    if (not nobody_s and complete == stages) or any(not stage.other_stages for stage in complete):
        return None

    def is_needed(name: str) -> bool:
        mapped = map_name(name)
        return not all(stage.leaves_out(name, mapped) for stage in stages)

    return is_needed


def _merged(needs: Iterable[Needs]) -> list[Needs]:
    """The needs of ranks with the same layers, merged."""
    merged: dict[Needs, set[int] | None] = {}
    for one in needs:
        layers = replace(one, experts=None)
        here = merged.setdefault(layers, set())
        if here is not None and one.experts is not None:
            here |= one.experts
        if one.experts is None or len(merged[layers] or ()) == one.expert_count:
            merged[layers] = None
    return [
        replace(layers, experts=None if experts is None else frozenset(experts))
        for layers, experts in merged.items()
    ]


def mapper_of(model: nn.Module) -> MapName | None:
    """The function by which the model renames tensors of checkpoints. None if there is no such function."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return lambda name: name
    map_name: MapName | None = getattr(mapper, "map_name", None) or getattr(mapper, "_map_name", None)
    return map_name


def needs_of(model: nn.Module) -> Needs:
    """The needs of the model that vLLM made for this rank. To be called while vLLM's configuration is set."""
    layers = _layers_of_other_stages(model)
    experts = _experts_here(model)
    return Needs(layers) if experts is None else Needs(layers, *experts)


def _layers_of_other_stages(model: nn.Module) -> tuple[str, ...]:
    try:
        from vllm.model_executor.models.utils import PPMissingLayer
    except ImportError:
        return ()
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PPMissingLayer) and _LAYER.fullmatch(name)
    )


def _experts_here(model: nn.Module) -> tuple[frozenset[str], frozenset[int], int] | None:
    """(parents of expert layers, experts of this node's replicas, experts in all), or None to read all."""
    try:
        from vllm.config import get_current_vllm_config
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.model_loader.ep_weight_filter import compute_local_expert_ids
    except ImportError:
        return None
    try:
        parallel = get_current_vllm_config().parallel_config
    except AssertionError:  # vLLM is not loading a model
        return None
    if not parallel.enable_expert_parallel or parallel.enable_eplb:
        return None
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RoutedExperts) and _EXPERTS in name
    }
    held = {(module.global_num_experts, frozenset(_held(module))) for module in layers.values()}
    if len(held) != 1:
        return None
    ((count, here),) = held
    place = next(iter(layers.values())).moe_config.moe_parallel_config
    strategy = parallel.expert_placement_strategy
    if here != compute_local_expert_ids(count, place.ep_size, place.ep_rank, strategy):
        return None
    # Replicas of this node ask for the same tensors, so that they share what is read.
    replica_size = place.ep_size // place.dp_size
    for replica in _replicas_here(parallel, place):
        rank = place.ep_rank + (replica - place.dp_rank) * replica_size
        here |= compute_local_expert_ids(count, place.ep_size, rank, strategy) or set()
    return frozenset(name.partition(_EXPERTS)[0] for name in layers), here, count


def _held(layer: Any) -> list[int]:
    """By the table that the layer looks experts up in when it loads them."""
    held: list[int] = layer.expert_map_manager.get_local_expert_ids()
    return held


def _replicas_here(parallel: Any, place: Any) -> range:
    """Data-parallel ranks on this node, as far as vLLM says so."""
    local = parallel.data_parallel_rank_local
    if local is None:
        return range(place.dp_rank, place.dp_rank + 1)
    first = max(0, place.dp_rank - local)
    return range(first, min(first + parallel.data_parallel_size_local, place.dp_size))
