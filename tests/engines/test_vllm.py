from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock.client.adopt import sglang, vllm
from penstock.client.adopt.engine_ranks import agree_on_group

from ..e2e.conftest import StartDaemon
from ..e2e.support import random_tensors, run_python, same, write_checkpoint
from . import interfaces

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


class Model(torch.nn.Module):
    """Takes weights as vLLM's models do, and may ask for more than its own checkpoint."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.taken: dict[str, torch.Tensor] = {}
        for name, value in attributes.items():
            setattr(self, name, value)

    def load_weights(self, weights: Any) -> set[str]:
        for name, tensor in weights:
            assert name not in self.taken
            self.taken[name] = tensor.clone()  # as parameters are copied, so that no lease outlives the load
        return set(self.taken)


def loader(**extra: Any) -> Any:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    vllm.register()
    vllm.register()  # vLLM may do so more than once in a process
    config = LoadConfig(load_format="penstock", model_loader_extra_config=extra, use_tqdm_on_load=False)
    return get_model_loader(config)


def model_config(model: Path | str, **fields: Any) -> Any:
    return SimpleNamespace(model=str(model), revision=None, runner="generate", **fields)


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A directory with two files, an index, and a file that the index does not name."""
    directory = tmp_path / "model"
    directory.mkdir()
    tensors = random_tensors(8, MIB // 4)
    names = sorted(tensors)
    write_checkpoint(
        directory / "model-00001-of-00002.safetensors", {name: tensors[name] for name in names[:4]}
    )
    write_checkpoint(
        directory / "model-00002-of-00002.safetensors", {name: tensors[name] for name in names[4:]}
    )
    write_checkpoint(directory / "consolidated.safetensors", {"other": torch.ones(3)})
    index = {name: f"model-0000{1 + (name in names[4:])}-of-00002.safetensors" for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory, tensors


@pytest.mark.parametrize("limit", ["4MiB", "64MiB"])
def test_a_model_gets_every_tensor_of_its_directory(
    limit: str, start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    directory, tensors = checkpoint
    daemon = start_daemon("--memory-limit", limit)
    penstock = loader(socket_dir=str(daemon.socket_dir))
    model = Model()
    penstock.download_model(model_config(directory))
    penstock.load_weights(model, model_config(directory, model_weights=""))
    same(model.taken.items(), tensors)
    again = dict(penstock.get_all_weights(model_config(directory), model))  # as vLLM reloads
    same(again.items(), tensors)


@pytest.mark.parametrize("indexes", ["both", "none", "of the other layout"])
def test_of_two_layouts_in_a_directory_the_one_of_transformers_is_loaded(
    indexes: str, start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    """As Mistral's models have them."""
    directory, tensors = checkpoint
    if indexes != "none":
        index = json.dumps({"weight_map": {"other": "consolidated.safetensors"}})
        (directory / "consolidated.safetensors.index.json").write_text(index)
    if indexes != "both":
        (directory / "model.safetensors.index.json").unlink()
    daemon = start_daemon("--memory-limit", "64MiB")
    model = Model()
    loader(socket_dir=str(daemon.socket_dir)).load_weights(model, model_config(directory))
    same(model.taken.items(), tensors)


def test_a_directory_of_one_layout_is_asked_for_by_its_own_name(tmp_path: Path) -> None:
    """So that its staged checkpoint has the name that a prefetch gave it."""
    penstock = loader()
    for names in (
        ["consolidated.safetensors"],
        ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
        [],
    ):
        directory = tmp_path / f"of {len(names)} [files]"
        directory.mkdir()
        for name in names:
            (directory / name).touch()
        assert penstock._source(model_config(directory)) == str(directory)


def test_the_source_may_be_named_apart_from_the_model(
    start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    directory, tensors = checkpoint
    daemon = start_daemon("--memory-limit", "64MiB")
    penstock = loader(socket_dir=str(daemon.socket_dir), source=str(directory))
    model = Model()
    penstock.load_weights(model, model_config(tmp_path))  # only a config and a tokenizer lie there
    same(model.taken.items(), tensors)


@pytest.mark.parametrize("uri", ["s3://bucket/llama", "gs://bucket/llama", "az://container/llama"])
def test_a_model_in_object_storage_is_asked_for_by_its_uri(
    uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    penstock = loader()
    assert penstock._source(model_config(tmp_path, model_weights=uri)) == uri


def test_a_model_may_choose_files_below_its_uri(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """A directory stands for the prefix: the daemon lists both."""
    for name in ("model.safetensors", "b.safetensors", "a.safetensors", "below/a.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    penstock = loader(socket_dir=str(start_daemon("--memory-limit", "4MiB").socket_dir))
    config = model_config("/cache/of/vllm", model_weights=str(tmp_path))
    chosen = [f"{tmp_path}/{name}.safetensors" for name in "ab"]
    assert penstock._source(config, ["none*.safetensors", "[ab].safetensors"]) == chosen
    assert penstock._source(config, ["none*.safetensors"]) == str(tmp_path)


def test_a_model_s_parts_come_from_below_its_uri(
    start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory stands for the prefix. vLLM knows the directory with the configuration, without weights."""
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "cache"))
    prefix, beside = tmp_path / "prefix", tmp_path / "beside"
    (prefix / "encoder").mkdir(parents=True)
    beside.mkdir()
    write_checkpoint(prefix / "model.safetensors", {"weight": torch.arange(3.0)})
    write_checkpoint(prefix / "encoder" / "model.safetensors", {"bias": torch.arange(5.0)})
    torch.save({"weight": torch.arange(7.0)}, prefix / "head.pt")
    parts = [
        SimpleNamespace(
            model_or_path=str(beside),
            revision=None,
            subfolder=below,
            prefix=name,
            allow_patterns_overrides=files,
        )
        for below, name, files in (("encoder", "encoder.", None), (None, "head.", ["head.pt"]))
    ]
    model = Model(secondary_weights=parts)
    penstock = loader(socket_dir=str(start_daemon("--memory-limit", "64MiB").socket_dir))
    penstock.load_weights(model, model_config(beside, model_weights=str(prefix)))
    expected = {
        "weight": torch.arange(3.0),
        "encoder.bias": torch.arange(5.0),
        "head.weight": torch.arange(7.0),
    }
    same(model.taken.items(), expected)
    assert {part.model_or_path for part in parts} == {str(beside)}, "they are the model's"


def test_a_model_may_choose_files_leave_tensors_out_and_bring_parts(
    start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    directory, tensors = checkpoint
    part = tmp_path / "part" / "encoder"
    part.mkdir(parents=True)
    write_checkpoint(part / "model.safetensors", {"bias": torch.arange(5.0)})
    daemon = start_daemon("--memory-limit", "64MiB")
    model = Model(
        allow_patterns_overrides=["absent*.safetensors", "model-00002-of-00002.safetensors"],
        is_unused_checkpoint_weight=lambda name: name.startswith("layer.7"),
        secondary_weights=[
            SimpleNamespace(
                model_or_path=str(tmp_path / "part"),
                revision=None,
                subfolder="encoder",
                prefix="encoder.",
                allow_patterns_overrides=None,
            ),
            SimpleNamespace(
                model_or_path=str(tmp_path / "part"),
                revision=None,
                subfolder=None,
                prefix="head.",
                allow_patterns_overrides=["head.pt"],
            ),
        ],
    )
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "part" / "head.pt")
    loader(socket_dir=str(daemon.socket_dir)).load_weights(model, model_config(directory))
    expected = {name: tensors[name] for name in ("layer.4.weight", "layer.5.weight", "layer.6.weight")}
    parts = {"encoder.bias": torch.arange(5.0), "head.weight": torch.arange(3.0)}
    same(model.taken.items(), {**expected, **parts})


@pytest.fixture
def two_models(tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Directories with one tensor each, which tells them apart; "config" has no weights."""
    for number, name in enumerate(("target", "draft", "other", "draft source")):
        (tmp_path / name).mkdir()
        write_checkpoint(tmp_path / name / "model.safetensors", {"weight": torch.full((3,), float(number))})
    (tmp_path / "config").mkdir()
    return {
        name: {"weight": torch.full((3,), float(n))}
        for n, name in enumerate(("target", "draft", "other", "draft source"))
    }


def speculating(target: Any, target_load: Any, *, draft_load: Any = None) -> interfaces.VllmConfig:
    speculative = interfaces.SpeculativeConfig(target, draft_load)
    return interfaces.VllmConfig(target, target_load, speculative)


def draft_of(
    config: interfaces.VllmConfig,
    model: Path | str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    load: Any = None,
) -> Model:
    """A draft model, loaded as vLLM does it; `load` are the options if not those for drafts."""
    from vllm.model_executor.model_loader import get_model_loader

    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: config)
    draft = Model()
    draft_config = model_config(model)
    draft_config.runner = "draft"
    get_model_loader(load or interfaces.get_draft_load_config(config)).load_weights(draft, draft_config)
    return draft


def test_a_draft_model_gets_its_own_weights_beside_a_target_with_a_source(
    start_daemon: StartDaemon,
    two_models: dict[str, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    socket_dir = str(start_daemon("--memory-limit", "64MiB").socket_dir)
    penstock = loader(socket_dir=socket_dir, source=str(tmp_path / "target"))
    target_config = model_config(tmp_path / "config")
    target = Model()
    penstock.load_weights(target, target_config)
    same(target.taken.items(), two_models["target"])
    shared = speculating(target_config, penstock.load_config)
    same(draft_of(shared, tmp_path / "draft", monkeypatch).taken.items(), two_models["draft"])
    # One that is a part of the target's checkpoint (MTP) has the target's model as its own.
    same(draft_of(shared, tmp_path / "config", monkeypatch).taken.items(), two_models["target"])
    of_its_own = loader(socket_dir=socket_dir, source=str(tmp_path / "draft source")).load_config
    own = speculating(target_config, penstock.load_config, draft_load=of_its_own)
    same(draft_of(own, tmp_path / "draft", monkeypatch).taken.items(), two_models["draft source"])
    # vLLM 0.32 passes a draft of the method "draft_model" the target's options all the same.
    ignored = draft_of(own, tmp_path / "draft", monkeypatch, load=penstock.load_config)
    same(ignored.taken.items(), two_models["draft source"])
    plain = loader(socket_dir=socket_dir).load_config
    without = speculating(target_config, penstock.load_config, draft_load=plain)
    same(draft_of(without, tmp_path / "draft", monkeypatch).taken.items(), two_models["draft"])


def test_a_draft_model_of_which_vllm_does_not_tell_whose_options_it_has_is_refused_a_source(
    tmp_path: Path,
) -> None:
    config = model_config(tmp_path / "draft")
    config.runner = "draft"
    with pytest.raises(ValueError, match=r"draft model .*draft.* source .*: leave source out"):
        loader(source="/models/target").load_weights(Model(), config)


@pytest.mark.parametrize("named_by", ["path", "uri"])
def test_weights_are_reloaded_from_the_path_that_is_given_and_else_from_the_source(
    named_by: str, start_daemon: StartDaemon, two_models: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    from vllm.model_executor.model_loader import get_model_loader

    socket_dir = str(start_daemon("--memory-limit", "64MiB").socket_dir)
    penstock = loader(socket_dir=socket_dir, source=str(tmp_path / "target"))
    config = model_config(tmp_path / "config", model_weights="s3://bucket/x" if named_by == "uri" else "")
    vllm_config = interfaces.VllmConfig(config, penstock.load_config)
    penstock.load_weights(Model(), config)
    for path, expected in (
        (None, "target"),
        (tmp_path / "other", "other"),
        (None, "other"),
        (tmp_path / "draft", "draft"),
    ):
        model = Model()
        weights_path = None if path is None else str(path)
        interfaces.reload_weights(vllm_config, model, weights_path, get_loader=get_model_loader)
        same(model.taken.items(), two_models[expected])


def test_a_reload_with_a_source_that_no_model_was_loaded_from_is_refused_before_it_begins(
    tmp_path: Path,
) -> None:
    """As after load_format="dummy": the path may be that of the model, or another."""
    penstock = loader(source=str(tmp_path / "target"))
    with pytest.raises(ValueError, match=r"loaded no model before.*give reload_weights the path"):
        penstock.get_all_weights(model_config(tmp_path / "other"), Model())


class Layer(Model):
    """Says what it took, as most of vLLM's models do, or does not."""

    def __init__(self, *, tells: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.bias = torch.nn.Parameter(torch.zeros(3))
        self.tells = tells

    def load_weights(self, weights: Any) -> Any:
        loaded = super().load_weights(weights)
        return loaded if self.tells else None


def test_a_checkpoint_that_lacks_a_weight_is_refused_as_by_vllm_s_own_loader(
    start_daemon: StartDaemon, two_models: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    socket_dir = str(start_daemon("--memory-limit", "64MiB").socket_dir)
    penstock = loader(socket_dir=socket_dir)
    plain, quantized = (model_config(tmp_path / "target", quantization=kind) for kind in (None, "fp8"))
    with pytest.raises(ValueError, match=r"not initialized from checkpoint.*bias"):
        penstock.load_weights(Layer(), plain)
    penstock.load_weights(Layer(tells=False), plain)
    penstock.load_weights(Layer(), quantized)
    loader(socket_dir=socket_dir, enable_weights_track=False).load_weights(Layer(), plain)
    with pytest.raises(ValueError, match=r"not initialized from checkpoint.*bias"):
        loader(socket_dir=socket_dir, enable_weights_track=True).load_weights(Layer(), quantized)
    write_checkpoint(
        tmp_path / "target" / "model.safetensors", {"weight": torch.ones(3), "bias": torch.ones(3)}
    )
    penstock.load_weights(Layer(), plain)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"enable_weights_track": "yes"}, "enable_weights_track='yes'"),
        ({"sorce": "x"}, r"does not know \['sorce'\].*'source'"),
        ({"concurrency": 4}, "penstockd --concurrency"),
        ({"source": ""}, "source=''"),
        ({"source": []}, "source="),
        ({"source": [1]}, "source="),
        ({"socket_dir": 5}, "socket_dir=5"),
        ({"socket_dir": ""}, "socket_dir=''"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"distributed": "yes"}, "distributed='yes'"),
        ({"memory_limit": "much"}, "memory_limit='much'"),
        ({"memory_limit": 1.5}, "memory_limit=1.5 is no size"),
    ],
)
def test_what_makes_no_sense_in_the_extra_config_is_refused_by_name(
    extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loader(**extra)


@pytest.mark.parametrize(
    ("group", "value", "register"),
    [
        ("vllm.general_plugins", "penstock.client.adopt.vllm:register", vllm.register),
        ("sglang.srt.plugins", "penstock.client.adopt.sglang:register", sglang.register),
    ],
)
def test_the_package_names_the_plugins_to_the_engines(group: str, value: str, register: object) -> None:
    assert (
        f'[project.entry-points."{group}"]\npenstock = "{value}"\n' in (ROOT / "pyproject.toml").read_text()
    )
    assert EntryPoint("penstock", value, group).load() is register


def test_runai_s_place_is_taken_only_when_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def note(load_format: str) -> Any:
        taken.append(load_format)
        return lambda loader: loader

    monkeypatch.setattr("vllm.model_executor.model_loader.register_model_loader", note)
    monkeypatch.delenv("PENSTOCK_REPLACE_RUNAI", raising=False)
    vllm.register()
    sglang.register()
    assert taken == ["penstock"]
    assert [target.rsplit(".", 1)[1] for target in interfaces.HookRegistry.hooks] == ["_verify_load_format"]
    monkeypatch.setenv("PENSTOCK_REPLACE_RUNAI", "1")
    vllm.register()
    sglang.register()
    assert taken[1:] == ["penstock", "runai_streamer"]
    _, (target, (hook, kind)) = interfaces.HookRegistry.hooks.items()
    assert target.endswith(".runai_safetensors_weights_iterator")
    assert (hook, kind) == (sglang.weights_iterator, interfaces.HookType.REPLACE)
    interfaces.HookRegistry.hooks.clear()
    monkeypatch.setenv("PENSTOCK_REPLACE_RUNAI", "yes")
    with pytest.raises(ValueError, match="PENSTOCK_REPLACE_RUNAI='yes'"):
        vllm.register()


def test_sglang_s_formats_are_extended_by_one_and_checked_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_REPLACE_RUNAI", raising=False)
    sglang.register()
    sglang.register()
    assert interfaces.LOAD_FORMAT_CHOICES.count("penstock") == 1
    (hook, kind) = interfaces.HookRegistry.hooks.popitem()[1]
    assert kind is interfaces.HookType.AROUND
    checked: list[Any] = []
    config = SimpleNamespace(load_format="safetensors")
    hook(checked.append, config)
    assert (checked, config.load_format) == ([config], "safetensors")


def test_sglang_s_function_yields_the_files_tensors(
    start_daemon: StartDaemon,
    checkpoint: tuple[Path, dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory, tensors = checkpoint
    daemon = start_daemon("--memory-limit", "64MiB")
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(daemon.socket_dir))
    files = [str(directory / f"model-0000{number}-of-00002.safetensors") for number in (1, 2)]
    same(sglang.weights_iterator(files, False, "cuda:0"), tensors)


def test_importing_the_plugins_imports_neither_engine_nor_torch() -> None:
    script = (
        "import sys, penstock.client.adopt.vllm, penstock.client.adopt.sglang\n"
        "assert not {'vllm', 'sglang', 'torch'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_rank_that_is_alone_asks_nobody(tmp_path: Path) -> None:
    assert agree_on_group(tmp_path, "model", [interfaces.Coordinator(1)]) is None


RANK = """
import json, sys
import torch
import torch.distributed as dist
rank, (store, socket_dir, directory) = int(sys.argv[1]), sys.argv[2:]
from tests.engines import interfaces
interfaces.install()
dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=4)
# Two stages of two ranks: 0 1 | 2 3.
tp = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
pp = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
interfaces.tp_group.__init__(2, tp)
interfaces.pp_group.__init__(2, pp)
import vllm.distributed
vllm.distributed.get_tp_group = lambda: interfaces.tp_group
vllm.distributed.get_pp_group = lambda: interfaces.pp_group
from penstock.client.client import StreamerClient
groups = []
load = StreamerClient.load
def note(self, *args, group=None, **more):
    groups.append(group)
    return load(self, *args, group=group, **more)
StreamerClient.load = note
from tests.engines.test_vllm import Model, loader, model_config
penstock = loader(socket_dir=socket_dir)
model = Model()
of_stage = lambda n: torch.nn.Identity() if n // 4 == rank // 2 else interfaces.PPMissingLayer()
model.layer = torch.nn.ModuleList([of_stage(n) for n in range(8)])
penstock.load_weights(model, model_config(directory))
sums = {name: tensor.double().sum().item() for name, tensor in model.taken.items()}
del model
if rank >= 2:  # the last stage has a draft model
    config = model_config(directory)
    config.runner = "draft"
    penstock.load_weights(Model(), config)
print(json.dumps([groups, sums]))
"""


def test_ranks_of_an_engine_read_once_what_does_not_fit_and_each_gets_what_its_stage_needs(
    start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    directory, tensors = checkpoint
    daemon = start_daemon("--memory-limit", "4MiB")

    def run(rank: int) -> Any:
        done = run_python("-c", RANK, str(rank), tmp_path / "store", daemon.socket_dir, directory)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(4) as ranks:
        said = list(ranks.map(run, range(4)))
    for rank, (_, found) in enumerate(said):
        own = [f"layer.{n}." for n in range(8) if n // 4 == rank // 2]
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith(tuple(own))}
        assert found == {name: tensor.double().sum().item() for name, tensor in mine.items()}
    main = {tuple(groups[0]) for groups, _ in said}
    draft = {tuple(groups[1]) for groups, _ in said[2:]}
    assert [size for _, size in main] == [4]
    assert [size for _, size in draft] == [2]
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert daemon.status()["totals"]["read_bytes"] == 2 * total_bytes
