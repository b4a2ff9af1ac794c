"""SGLang's own loader, plugins and models load through penstock what they load without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from ...e2e.support import DaemonProcess, running_daemon
from .test_tokens import tensor_bytes

ROOT = Path(__file__).parents[3]
PATIENCE_SECONDS = 230.0
Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def _sglang() -> None:
    try:
        version("sglang")
    except PackageNotFoundError:
        pytest.skip("SGLang is not installed: `make engines` runs these tests with one that is")


@pytest.fixture(scope="module")
def small_daemon() -> Iterator[DaemonProcess]:
    """Every model comes through a window."""
    with running_daemon("--memory-limit", "4MiB") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def incomplete(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ "llama" without its last norm."""
    directory = tmp_path_factory.mktemp("incomplete")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((models["llama"] / name).read_bytes())
    tensors = safetensors.torch.load_file(models["llama"] / "model.safetensors")
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    return directory


def run(
    daemon: DaemonProcess, model: Path, work: Path, steps: dict[str, Any], ranks: int = 1
) -> list[Answers]:
    """What each rank answers. Its `--load-format` is penstock."""
    arguments = ["--model-path", str(model), "--load-format", "penstock", "--tp-size", str(ranks)]
    answers = [work / f"answer {rank}" for rank in range(ranks)]
    processes = []
    for rank, answer in enumerate(answers):
        request = {
            "rank": rank,
            "size": ranks,
            "store": str(work / "store"),
            "answer": str(answer),
            "arguments": arguments,
            "steps": steps,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.engines.real.sglang_program", json.dumps(request)],
                cwd=ROOT,
                env={**os.environ, "PENSTOCK_SOCKET_DIR": str(daemon.socket_dir)},
            )
        )
    try:
        codes = [process.wait(PATIENCE_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * ranks
    return [json.loads(answer.read_text()) for answer in answers]


def step(path: Path, load_format: str, extra: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "load_format": load_format, "extra": extra or {}, **more}


@pytest.fixture(scope="module")
def answers(
    small_daemon: DaemonProcess,
    models: dict[str, Path],
    incomplete: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Answers:
    """One process for all of them: SGLang is imported for half a minute."""
    llama, other = models["llama"], models["other llama"]
    source = {"source": str(other)}
    steps = {
        **{
            f"{name} by auto": step(models[name], "auto")
            for name in ("llama", "other llama", "qwen2", "draft")
        },
        **{name: step(models[name], "penstock") for name in ("llama", "qwen2")},
        "updated": step(llama, "penstock", update=str(other)),
        "source": step(llama, "penstock", source),
        "draft": step(models["draft"], "penstock", source, draft=True),
        "draft of the target": step(llama, "penstock", source, draft=True),
        "incomplete": step(incomplete, "penstock"),
        "incomplete, not tracked": step(incomplete, "penstock", {"enable_weights_track": False}),
        "incomplete draft": step(incomplete, "penstock", draft=True),
        "odd option": step(llama, "penstock", {"sorce": "x"}),
    }
    (found,) = run(small_daemon, llama, tmp_path_factory.mktemp("sglang"), steps)
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_model_of_sglang_is_the_same_through_a_window(name: str, answers: Answers) -> None:
    assert answers[name] == answers[f"{name} by auto"]
    assert answers[name]["weights"] != answers["other llama by auto"]["weights"]


def test_weights_that_sglang_updates_from_disk_are_those_of_the_other_path(answers: Answers) -> None:
    assert answers["updated"]["weights"] == answers["llama by auto"]["weights"]
    assert answers["updated"]["updated"] == answers["other llama by auto"]["weights"]


def test_source_stands_for_the_model_and_not_for_its_draft(answers: Answers) -> None:
    other = answers["other llama by auto"]
    assert answers["source"] == other
    assert answers["draft"] == answers["draft by auto"]
    assert answers["draft of the target"] == other  # its weights are a part of the target's checkpoint


def test_a_weight_that_the_checkpoint_lacks_fails_the_start_of_sglang(answers: Answers) -> None:
    """SGLang's own loader leaves it as it happens to be."""
    assert "has nothing: model.norm.weight; load a complete checkpoint" in answers["incomplete"]["refused"]
    for name in ("incomplete, not tracked", "incomplete draft"):
        assert answers[name]["class"] == "LlamaForCausalLM"


def test_an_option_that_is_not_known_is_refused_by_name(answers: Answers) -> None:
    assert "does not know ['sorce']" in answers["odd option"]["refused"]


def test_ranks_of_sglang_read_once_what_is_larger_than_the_buffer(
    small_daemon: DaemonProcess, models: dict[str, Path], tmp_path: Path
) -> None:
    before = small_daemon.read_bytes()
    steps = {name: step(models["qwen2"], name) for name in ("auto", "penstock")}
    ranks = run(small_daemon, models["qwen2"], tmp_path, steps, ranks=2)
    for answer in ranks:
        assert answer["penstock"] == answer["auto"]
    assert ranks[0]["auto"] != ranks[1]["auto"]
    assert small_daemon.read_bytes() - before == tensor_bytes(models["qwen2"])
