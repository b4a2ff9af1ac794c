"""What processes with vLLM do. `nursery.py` imports this once, and forks a process for each program.

Standard output is for the test alone: what vLLM prints goes to standard error with its log.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.engines.real import shared_memory
from tests.engines.real.agreed import ENVIRONMENT, LIBRARIES_OF_STORES, PROMPTS, TOKENS

# One process for all of an engine, and functions sent to its workers.
os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_ALLOW_INSECURE_SERIALIZATION="1")

import torch
from vllm import LLM, EngineArgs, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader import get_model, get_model_loader
from vllm.v1.executor import multiproc_executor

from penstock.client.client import StreamerClient
from penstock.client.load import Load

for _module in (
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.mixtral",
    "vllm.model_executor.models.qwen2",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",  # which puts what a CPU lacks into torch
):
    importlib.import_module(_module)  # so that children need not

_test = -1


def say(word: str, **values: Any) -> None:
    os.write(_test, json.dumps({"word": word, **values}).encode() + b"\n")


def program(function: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Says what the function returns, or the message of what it raises."""

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        global _test
        _test = os.dup(1)
        os.dup2(2, 1)
        _forget_object_stores()
        try:
            result = function(**arguments)
        except Exception as error:
            _leave_nothing()
            say("failed", kind=type(error).__name__, message=str(error))
            raise
        _leave_nothing()
        say("done", **result)
        sys.stderr.flush()
        os._exit(0)  # vLLM's threads and groups need not end in order

    return run


def _forget_object_stores() -> None:
    """No engine needs credentials or a library for them."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "RUNAI_"))]:
        del os.environ[name]
    for name in LIBRARIES_OF_STORES:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it fails


def _leave_nothing() -> None:
    """This process does not end in order, and its ranks do not either."""
    shared_memory.remove(shared_memory.of_ranks(os.getpid()))


def digest(model: torch.nn.Module) -> str:
    """Of all parameters, as they are after loading."""
    state = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        tensor = parameter.detach().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        state.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def start(model: str, load: dict[str, Any], options: dict[str, Any]) -> LLM:
    # vLLM on a CPU would start its workers as new interpreters, each of which imports it for 15 s.
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    defaults = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4, "seed": 0}
    defaults["kv_cache_memory_bytes"] = 32 << 20
    return LLM(model, **{**defaults, **load, **options})


def tokens(llm: LLM, lora: str | None = None) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    request = None if lora is None else LoRARequest("adapter", 1, lora)
    answers = llm.generate(PROMPTS, sampling, lora_request=request, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def drafter(worker: Any) -> str:
    return digest(worker.model_runner.drafter.model)


@program
def generate(
    model: str,
    load: dict[str, Any],
    options: dict[str, Any],
    lora: str | None = None,
    reloads: tuple[str | None, ...] = (),
    variables: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Tokens and weights of a model; then those after weights were reloaded from each path."""
    os.environ.update(variables or {})
    llm = start(model, load, options)
    result: dict[str, Any] = {"tokens": tokens(llm)}
    if options.get("distributed_executor_backend") is None:
        result["weights"] = llm.apply_model(digest)[0]
    if "speculative_config" in options:
        result["draft"] = llm.collective_rpc(drafter)[0]
    if lora is not None:
        result["adapted"] = tokens(llm, lora)
    result["reloaded"] = []
    for path in reloads:
        llm.collective_rpc("reload_weights", kwargs={} if path is None else {"weights_path": path})
        llm.reset_prefix_cache()
        result["reloaded"].append(tokens(llm))
    return result


@program
def embed(model: str, load: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    llm = start(model, load, {"runner": "pooling", **options})
    return {"vectors": [output.outputs.embedding for output in llm.embed(PROMPTS, use_tqdm=False)]}


@program
def pool(
    model: str, load: dict[str, Any], options: dict[str, Any], variables: dict[str, str] | None = None
) -> dict[str, Any]:
    """The weights of a pooling model, whatever it can be asked for."""
    os.environ.update(variables or {})
    return {"weights": start(model, load, {"runner": "pooling", **options}).apply_model(digest)[0]}


@program
def pause_in_mid_load(
    model: str, load: dict[str, Any], options: dict[str, Any], after: int, patience_seconds: float
) -> dict[str, Any]:
    """As `generate`, but waits for the test when the load has yielded so many tensors."""
    deliver = Load._run

    def pausing(self: Load) -> Iterator[tuple[str, torch.Tensor]]:
        for number, item in enumerate(deliver(self)):
            if number == after:
                say("paused")
                sys.stdin.readline()
            yield item

    Load._run = pausing  # type: ignore[method-assign]
    StreamerClient.__init__.__kwdefaults__["reconnect_timeout"] = patience_seconds  # type: ignore[index]
    llm = start(model, load, options)
    return {"tokens": tokens(llm), "weights": llm.apply_model(digest)[0]}


@program
def load_as_rank(
    rank: int,
    store: str,
    model: str,
    load: dict[str, Any],
    options: dict[str, Any],
    spare_experts: int = 0,
    pause: bool = False,
) -> dict[str, Any]:
    """What one of two ranks has after it loaded a model, with vLLM's own groups, models and loader.

    With `spare_experts`, as if experts could be moved (EPLB), which vLLM refuses on a CPU. With `pause`, it
    waits for the test when there are groups.
    """
    config = _configure(model, load, options)
    parallel = config.parallel_config
    if spare_experts:
        parallel.enable_eplb = True
        parallel.eplb_config.num_redundant_experts = spare_experts
    with _ranks(config, rank, 2, store):
        if pause:
            say("paused")
            sys.stdin.readline()
        return {"weights": digest(get_model(vllm_config=config))}


@program
def time_loading(model: str, store: str, load: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Seconds in load_weights."""
    config = _configure(model, load, options)
    with _ranks(config, 0, 1, store):
        loader = get_model_loader(config.load_config)
        load_weights, seconds = loader.load_weights, 0.0

        def timed(*arguments: Any) -> None:
            nonlocal seconds
            started = time.perf_counter()
            load_weights(*arguments)
            seconds = time.perf_counter() - started

        loader.load_weights = timed
        loader.load_model(vllm_config=config, model_config=config.model_config)
    return {"seconds": seconds}


def _configure(model: str, load: dict[str, Any], options: dict[str, Any]) -> Any:
    return EngineArgs(model, enforce_eager=True, max_model_len=128, **load, **options).create_engine_config()


@contextlib.contextmanager
def _ranks(config: Any, rank: int, count: int, store: str) -> Iterator[None]:
    """vLLM's groups, as a worker makes them."""
    os.environ["VLLM_DIST_IDENT"] = Path(store).name
    parallel = config.parallel_config
    with set_current_vllm_config(config):
        init_distributed_environment(count, rank, f"file://{store}", rank, "gloo")
        initialize_model_parallel(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        yield
