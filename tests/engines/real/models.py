"""Tiny models that vLLM serves: configuration, weights from a seed and a tokenizer, all made here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

VOCABULARY = 512
HEAD = 64
"""Length of an attention head's vectors."""
QUERIES_PER_KEY = 2
EXPERTS = 4


@dataclass(frozen=True, slots=True)
class Model:
    """What to make. `files` is how many shards."""

    kind: str = "llama"
    """"llama", "qwen2" or "mixtral"."""
    dtype: torch.dtype = torch.bfloat16
    layers: int = 4
    tied: bool = False
    int8: bool = False
    files: int = 1
    seed: int = 0
    hidden: int = 256
    intermediate: int = 512


MODELS = {
    "llama": Model("llama"),
    "other llama": Model("llama", seed=1),
    "draft": Model("llama", layers=1, seed=2),
    "float32 tied": Model("llama", dtype=torch.float32, tied=True),
    "int8": Model("llama", int8=True),
    "qwen2": Model("qwen2", files=3),
    "mixtral": Model("mixtral", files=2),
}


def write(directory: Path, model: Model) -> dict[str, torch.Tensor]:
    """A directory as the Hugging Face Hub has it; returns the tensors of its files."""
    directory.mkdir(parents=True)
    write_config(directory, model)
    tensors = dict(_tensors(model))
    names = list(tensors)
    count = model.files
    index: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        part = names[number * len(names) // count : (number + 1) * len(names) // count]
        safetensors.torch.save_file({name: tensors[name] for name in part}, directory / file)
        index |= dict.fromkeys(part, file)
    if count > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tensors


def write_config(directory: Path, model: Model) -> None:
    """All but the weights."""
    config: dict[str, Any] = {
        "architectures": [f"{model.kind.capitalize()}ForCausalLM"],
        "model_type": model.kind,
        "vocab_size": VOCABULARY,
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.hidden // HEAD,
        "num_key_value_heads": model.hidden // HEAD // QUERIES_PER_KEY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tied,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if model.kind == "mixtral":
        config |= {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    if model.int8:
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
                    "input_activations": {
                        "num_bits": 8,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "token",
                        "dynamic": True,
                    },
                }
            },
        }
    (directory / "config.json").write_text(json.dumps(config))
    _write_tokenizer(directory)


def write_adapter(directory: Path) -> None:
    """A LoRA adapter of every query projection of "llama"."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    rank, hidden = 8, MODELS["llama"].hidden
    tensors = {}
    for layer in range(MODELS["llama"].layers):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(hidden, rank, generator=generator)
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def write_bge_m3(directory: Path) -> None:
    """A model of embeddings whose last layers are in files of their own, which are no safetensors."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(4)
    hidden, intermediate, layers, positions = 128, 256, 2, 130

    def linear(outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        weight = torch.randn(outputs, inputs, generator=generator).mul_(0.1)
        return {"weight": weight, "bias": torch.randn(outputs, generator=generator).mul_(0.1)}

    norm = {"weight": torch.ones(hidden), "bias": torch.zeros(hidden)}
    modules = {"embeddings.LayerNorm": norm, "pooler.dense": linear(hidden, hidden)}
    for name, rows in (("word", VOCABULARY), ("position", positions), ("token_type", 1)):
        modules[f"embeddings.{name}_embeddings"] = {"weight": linear(rows, hidden)["weight"]}
    for number in range(layers):
        layer = f"encoder.layer.{number}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            modules[f"{layer}.attention.{name}"] = linear(hidden, hidden)
        modules[f"{layer}.intermediate.dense"] = linear(intermediate, hidden)
        modules[f"{layer}.output.dense"] = linear(hidden, intermediate)
        for name in ("attention.output", "output"):
            modules[f"{layer}.{name}.LayerNorm"] = norm
    tensors = {
        f"{module}.{name}": one.clone() for module, own in modules.items() for name, one in own.items()
    }
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    torch.save(linear(1, hidden), directory / "sparse_linear.pt")
    torch.save(linear(hidden, hidden), directory / "colbert_linear.pt")
    config = {
        "architectures": ["BgeM3EmbeddingModel"],
        "model_type": "xlm-roberta",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "max_position_embeddings": positions,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))
    _write_tokenizer(directory)


def _tensors(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(model.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.1).to(model.dtype)

    def linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, torch.Tensor]]:
        if not model.int8:
            yield f"{name}.weight", random(outputs, inputs)
            return
        weight = random(outputs, inputs).float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        yield f"{name}.weight", (weight / scale).round().to(torch.int8)
        yield f"{name}.weight_scale", scale.to(model.dtype)

    yield "model.embed_tokens.weight", random(VOCABULARY, model.hidden)
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}"
        yield from _attention(f"{prefix}.self_attn", model, linear, random)
        if model.kind == "mixtral":
            yield f"{prefix}.block_sparse_moe.gate.weight", random(EXPERTS, model.hidden)
            for expert in range(EXPERTS):
                name = f"{prefix}.block_sparse_moe.experts.{expert}"
                yield from linear(f"{name}.w1", model.intermediate, model.hidden)
                yield from linear(f"{name}.w2", model.hidden, model.intermediate)
                yield from linear(f"{name}.w3", model.intermediate, model.hidden)
        else:
            yield from linear(f"{prefix}.mlp.gate_proj", model.intermediate, model.hidden)
            yield from linear(f"{prefix}.mlp.up_proj", model.intermediate, model.hidden)
            yield from linear(f"{prefix}.mlp.down_proj", model.hidden, model.intermediate)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", 1 + random(model.hidden)
    yield "model.norm.weight", 1 + random(model.hidden)
    if not model.tied:
        yield "lm_head.weight", random(VOCABULARY, model.hidden)


def _attention(
    prefix: str,
    model: Model,
    linear: Callable[[str, int, int], Iterator[tuple[str, torch.Tensor]]],
    random: Callable[..., torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    kv = model.hidden // QUERIES_PER_KEY
    for name, outputs in (("q_proj", model.hidden), ("k_proj", kv), ("v_proj", kv)):
        yield from linear(f"{prefix}.{name}", outputs, model.hidden)
        if model.kind == "qwen2":
            yield f"{prefix}.{name}.bias", random(outputs)
    yield from linear(f"{prefix}.o_proj", model.hidden, model.hidden)


def _write_tokenizer(directory: Path) -> None:
    """Byte-level BPE with a few merges."""
    alphabet = sorted(_byte_characters())
    merges = [("t", "h"), ("e", "r"), ("i", "n"), ("a", "n")]
    tokens = ["<s>", "</s>", *alphabet, *(first + second for first, second in merges)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [
        {"id": number, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, token in enumerate(tokens[:2])
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [" ".join(pair) for pair in merges],
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _byte_characters() -> list[str]:
    """A printable character for each byte, as GPT-2 has them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
