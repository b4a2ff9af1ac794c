"""An adapter of PEFT through the daemon: the same weights, alone and on its base model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ..support import DaemonProcess
from .patched import Library, library_daemon, reading_through, same_modules

transformers: Any = Library("transformers")
peft: Any = Library("peft")


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with library_daemon() as daemon:
        yield daemon


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # what PEFT asks of transformers
def test_an_adapter_and_its_base_are_the_same(daemon: DaemonProcess, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=100, n_positions=32)
    )
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    adapted = peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base"), lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")

    def load() -> Any:
        model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        return peft.PeftModel.from_pretrained(model, tmp_path / "adapter")

    wanted = load()
    with reading_through(daemon, tmp_path):
        found = load()
    same_modules(found, wanted)
    tokens = torch.arange(5)[None]
    with torch.inference_mode():
        assert torch.equal(found(tokens).logits, wanted(tokens).logits)
        assert not torch.equal(found(tokens).logits, base(tokens).logits)
    del found
