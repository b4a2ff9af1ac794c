"""Parameters that nothing was written to are found, whatever they held before, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from penstock.client.adopt.written import every_parameter_written


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16))
        self.norm = nn.Parameter(torch.ones(3))
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float16))
        self.transposed = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64).T)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.counts = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
        self.register_buffer("cache", torch.zeros(3))


def fill(model: Model, *left_out: str) -> None:
    """With what is there from the start, as a checkpoint may have it."""
    values = {"fused": 0.0, "norm": 1.0, "scale": 2.0, "transposed": 0.0}
    for name, value in values.items():
        if name not in left_out:
            model.get_parameter(name).data.fill_(value)


def test_a_model_whose_parameters_are_all_written_is_left_as_loaded() -> None:
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with every_parameter_written(model):
        fill(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", ["fused", "norm", "scale", "transposed"])
def test_a_parameter_that_nothing_was_written_to_is_named(name: str) -> None:
    model = Model()
    with (
        pytest.raises(ValueError, match=f"the checkpoint has nothing: {name};"),
        every_parameter_written(model),
    ):
        fill(model, name)


def test_many_that_are_missing_are_told_by_the_first_and_their_number() -> None:
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(6))
    with pytest.raises(ValueError, match=r"3\.weight and 4 more"), every_parameter_written(model):
        pass


def test_a_parameter_that_was_replaced_or_removed_is_not_missing() -> None:
    model = Model()
    with every_parameter_written(model):
        fill(model, "norm", "fused")
        model.norm = nn.Parameter(torch.ones(3))
        del model.fused
