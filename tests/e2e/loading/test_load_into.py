"""load_into() next to load_state_dict(): modules of every kind, filled through a real daemon."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from penstock.client import (
    CheckpointInvalidError,
    DuplicateTensorError,
    StreamerClient,
    UnsupportedDtypeError,
)

from ..conftest import StartDaemon
from ..support import DaemonProcess, Nursery, running_daemon

MIB = 1 << 20


@pytest.fixture(scope="module", params=["-1", "4MiB"], ids=["full", "window"])
def daemon(request: pytest.FixtureRequest) -> Iterator[DaemonProcess]:
    """A checkpoint with padding fits the first and not the second."""
    with running_daemon("--memory-limit", request.param) as daemon:
        yield daemon
        gc.collect()  # modules with hooks are cycles, and hold views


@pytest.fixture
def client(daemon: DaemonProcess) -> StreamerClient:
    return daemon.client()


class Scaled(nn.Module):
    """Every kind of name: nested, a buffer, one that is not saved, one that is no float, a scalar."""

    kept: torch.Tensor
    steps: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4, bias=False))
        self.factor = nn.Parameter(torch.rand(()), requires_grad=False)
        self.register_buffer("steps", torch.tensor(5))
        self.register_buffer("scale", torch.rand(4))
        self.register_buffer("kept", torch.arange(3.0), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(2, 3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.weighted = parametrizations.weight_norm(nn.Linear(4, 5))
        self.rnn = nn.LSTM(4, 6, num_layers=2)


class Renamed(nn.Module):
    """Takes an old name for one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Linear(3, 3)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}old" in state_dict:
            state_dict[f"{prefix}new.weight"] = state_dict.pop(f"{prefix}old")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Labelled(nn.Parameter):
    label: str


class WithSubclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = Labelled(torch.rand(4, 4))
        self.weight.label = "mine"


MODULES: list[Callable[[], nn.Module]] = [
    Scaled,
    Tied,
    Normed,
    WithSubclass,
    lambda: nn.TransformerEncoderLayer(16, 2, 32),
    lambda: spectral_norm(nn.Linear(4, 4)),
    lambda: nn.Sequential(),
    lambda: nn.BatchNorm2d(4),
]
EACH = pytest.mark.parametrize("make", MODULES, ids=lambda make: getattr(make, "__name__", "other"))


def saved(module: nn.Module, path: Path, *, drop: tuple[str, ...] = (), **more: torch.Tensor) -> Path:
    """What the module holds, each tensor on its own."""
    state = {
        name: tensor.detach().clone().contiguous()
        for name, tensor in module.state_dict().items()
        if name not in drop
    }
    save_file({**state, **more}, path)
    return path


class WithPadding(nn.Module):
    """The module to fill beside 12 MiB, which is more than the small daemon can hold at once."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.padding = nn.ParameterList(
            nn.Parameter(torch.full((MIB // 4,), float(number))) for number in range(12)
        )


def same_state(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert mine[name].device.type == tensor.device.type, name
        assert torch.equal(mine[name], tensor), name


@EACH
def test_a_module_is_filled_in_place(
    make: Callable[[], nn.Module], client: StreamerClient, tmp_path: Path
) -> None:
    origin, target = WithPadding(make()), WithPadding(make())
    path = saved(origin, tmp_path / "m.safetensors")
    before = {name: (id(value), value.data_ptr()) for name, value in target.named_parameters()}
    keys = client.load_into(target, path)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    same_state(target, origin)
    assert {name: (id(value), value.data_ptr()) for name, value in target.named_parameters()} == before


@EACH
def test_a_module_on_the_meta_device_gets_tensors(
    make: Callable[[], nn.Module], client: StreamerClient, tmp_path: Path
) -> None:
    origin = WithPadding(make())
    path = saved(origin, tmp_path / "m.safetensors")
    with torch.device("meta"):
        target = WithPadding(make())
    strict = not isinstance(target.module, Scaled)  # has a buffer that nobody saves
    client.load_into(target, path, strict=strict)
    same_state(target, origin)
    for name, value in target.named_parameters():
        assert isinstance(value, nn.Parameter)
        assert value.requires_grad == origin.get_parameter(name).requires_grad
        assert value.device.type == "cpu"


def test_what_is_replaced_stays_when_the_daemon_is_busy_with_others(
    client: StreamerClient, tmp_path: Path
) -> None:
    origins = [WithPadding(Scaled()) for _ in range(2)]
    targets = []
    for number, origin in enumerate(origins):
        with torch.device("meta"):
            target = WithPadding(Scaled())
        client.load_into(target, saved(origin, tmp_path / f"{number}.safetensors"), strict=False)
        targets.append(target)
    for origin, target in zip(origins, targets, strict=True):
        same_state(target, origin)


def test_tied_weights_are_stored_once_and_stay_tied(client: StreamerClient, tmp_path: Path) -> None:
    origin = Tied()
    for dropped in ("head.weight", "embedding.weight", None):
        path = saved(origin, tmp_path / f"{dropped}.safetensors", drop=(dropped,) if dropped else ())
        real = Tied()
        with torch.device("meta"):
            meta = Tied()
        for target in (real, meta):
            client.load_into(target, path)
            assert target.head.weight is target.embedding.weight
            same_state(target, origin)


def test_shared_memory_under_two_parameters_is_one_tensor(client: StreamerClient, tmp_path: Path) -> None:
    def make() -> nn.Module:
        module = Tied()
        module.head.weight = nn.Parameter(module.embedding.weight.detach())
        return module

    origin, target = make(), make()
    client.load_into(target, saved(origin, tmp_path / "m.safetensors", drop=("head.weight",)))
    same_state(target, origin)
    assert target.head.weight.data_ptr() == target.embedding.weight.data_ptr()  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("meta", [False, True])
def test_a_parameter_s_class_and_attributes_stay(meta: bool, client: StreamerClient, tmp_path: Path) -> None:
    path = saved(WithSubclass(), tmp_path / "m.safetensors")
    target = WithSubclass()
    if meta:
        target.weight = Labelled(target.weight.to("meta"))
        target.weight.label = "mine"
    client.load_into(target, path)
    assert type(target.weight) is Labelled
    assert target.weight.label == "mine"
    assert target.weight.requires_grad


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_for_floating_point_tensors(
    dtype: torch.dtype, meta: bool, client: StreamerClient, tmp_path: Path
) -> None:
    origin = Scaled()
    path = saved(origin, tmp_path / "m.safetensors")
    with torch.device("meta" if meta else "cpu"):
        target = Scaled()
    client.load_into(target, path, dtype=dtype, strict=not meta)
    origin.to(dtype)
    same_state(target, origin)
    assert target.steps.dtype == torch.int64


@pytest.mark.parametrize("meta", [False, True])
def test_without_one_the_module_s_dtypes_count(meta: bool, client: StreamerClient, tmp_path: Path) -> None:
    origin = Normed().half()
    path = saved(origin, tmp_path / "m.safetensors")
    with torch.device("meta" if meta else "cpu"):
        target = Normed().bfloat16()
    client.load_into(target, path)
    same_state(target, origin.bfloat16())


def outcome(fill: Callable[[], Any]) -> Any:
    try:
        missing, unexpected = fill()
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        return sorted(line for line in lines if not line.startswith("Load a checkpoint of this module"))
    return sorted(missing), sorted(unexpected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("make", "drop", "more"),
    [
        (Scaled, (), {"extra.weight": torch.ones(1), "other": torch.ones(2)}),
        (Scaled, ("block.0.bias", "factor", "scale"), {}),
        (Scaled, ("block.0.bias",), {"block.0.biass": torch.ones(32)}),
        (Scaled, ("scale", "factor"), {"scale": torch.ones(5), "factor": torch.ones(1)}),
        (Scaled, ("block.0.weight",), {"block.0.weight": torch.ones(32, 16, 1)}),
        (Normed, ("norm.num_batches_tracked",), {}),
        (Normed, ("norm.running_mean",), {"norm.other": torch.ones(1)}),
        (Renamed, ("new.weight",), {"old": torch.ones(3, 3)}),
        (Renamed, (), {"unknown": torch.ones(3, 3)}),
        (
            lambda: nn.ModuleList([nn.LazyLinear(3)]),
            (),
            {"0.weight": torch.ones(3, 7), "0.bias": torch.ones(3)},
        ),
    ],
)
def test_names_and_shapes_are_judged_as_by_load_state_dict(
    make: Callable[[], nn.Module],
    drop: tuple[str, ...],
    more: dict[str, torch.Tensor],
    strict: bool,
    client: StreamerClient,
    tmp_path: Path,
) -> None:
    origin = make()
    lazy = any(nn.parameter.is_lazy(value) for value in origin.parameters())
    drop = tuple(origin.state_dict()) if lazy else drop
    path = saved(origin, tmp_path / "m.safetensors", drop=drop, **more)
    state = {name: origin.state_dict()[name] for name in origin.state_dict() if name not in drop} | more
    mine, theirs = make(), make()
    theirs.load_state_dict(mine.state_dict())
    before = everything(mine)
    found = outcome(lambda: client.load_into(mine, path, strict=strict))
    assert found == outcome(lambda: theirs.load_state_dict(state, strict=strict))
    if isinstance(found, list):  # where load_state_dict leaves the rest loaded
        untouched(mine, before)
    else:
        same_state(mine, theirs)


Everything = dict[str, tuple[int, torch.Tensor]]


def everything(module: nn.Module) -> Everything:
    """Each tensor of a module by its name: which object it is, and its value."""
    tensors = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    return {
        name: (id(tensor), tensor if nn.parameter.is_lazy(tensor) else tensor.detach().clone())
        for name, tensor in tensors
    }


def untouched(module: nn.Module, before: Everything) -> None:
    now = everything(module)
    assert {name: which for name, (which, _) in now.items()} == {
        name: one for name, (one, _) in before.items()
    }
    for name, (_, tensor) in now.items():
        if not (tensor.is_meta or nn.parameter.is_lazy(tensor)):
            assert torch.equal(tensor, before[name][1]), name


class Halves(nn.Module):
    """A plain part before and after ones that load in ways of their own; one of them renames."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.renamed = Renamed()
        self.last = nn.Linear(3, 3)
        self.hooked = nn.Linear(3, 3)
        register: Any = self.hooked.register_load_state_dict_pre_hook
        register(rename_bias)


def rename_bias(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    if f"{prefix}shift" in state_dict:
        state_dict[f"{prefix}bias"] = state_dict.pop(f"{prefix}shift")


# Four bits a value: torch has them two in a byte, and converts them to nothing.
F4 = ("F4", [3, 6], 9)
ODD_F4 = ("F4", [2, 3], 3)
OLD = {"renamed.old": torch.ones(3, 3), "hooked.shift": torch.ones(3)}
RENAMED = ("renamed.new.weight", "hooked.bias")


@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lax"])
@pytest.mark.parametrize(
    ("make", "drop", "more", "raw", "complaint"),
    [
        (Scaled, ("scale",), {}, {}, r'Missing key.* "scale"'),
        (Scaled, (), {"more": torch.ones(1)}, {}, r'Unexpected key.* "more"'),
        (Scaled, ("scale",), {"scale": torch.ones(5)}, {}, "size mismatch for scale"),
        (Halves, ("last.weight",), {}, {"last.weight": F4}, "dtype mismatch for last.weight"),
        (Halves, ("last.weight",), {}, {"last.weight": ODD_F4}, "'last.weight' has dtype F4"),
        (
            Tied,
            ("embedding.weight",),
            {"embedding.weight": torch.ones(50, 9)},
            {},
            "mismatch for embedding.weight",
        ),
        (Tied, ("head.weight",), {"head.weight": torch.ones(51, 8)}, {}, "mismatch for head.weight"),
        (Tied, ("head.weight", "embedding.weight"), {}, {}, r'Missing key.* "embedding.weight"'),
        (Halves, ("norm.weight",), {}, {}, r'Missing key.* "norm.weight"'),
        (Halves, (), {"norm.more": torch.ones(1)}, {}, r'Unexpected key.* "norm.more"'),
        (Halves, ("norm.bias",), {"norm.bias": torch.ones(4)}, {}, "size mismatch for norm.bias"),
        (
            Halves,
            RENAMED,
            {**OLD, "renamed.old": torch.ones(3, 4)},
            {},
            "size mismatch for renamed.new.weight",
        ),
        (Halves, RENAMED, {**OLD, "hooked.shift": torch.ones(4)}, {}, "size mismatch for hooked.bias"),
        (Halves, RENAMED, {**OLD, "hooked.other": torch.ones(4)}, {}, r'Unexpected key.* "hooked.other"'),
        (Halves, RENAMED, {"renamed.old": torch.ones(3, 3)}, {}, r'Missing key.* "hooked.bias"'),
    ],
)
def test_a_module_that_does_not_fit_stays_as_it_is(
    make: Callable[[], nn.Module],
    drop: tuple[str, ...],
    more: dict[str, torch.Tensor],
    raw: dict[str, tuple[str, list[int], int]],
    complaint: str,
    strict: bool,
    meta: bool,
    client: StreamerClient,
    tmp_path: Path,
) -> None:
    paths = [saved(make(), tmp_path / "m.safetensors", drop=drop, **more)]
    if raw:
        paths.append(write_raw(tmp_path / "raw.safetensors", raw))
    with torch.device("meta" if meta else "cpu"):
        target = make()
    before = everything(target)
    names_alone = complaint.startswith(("Missing", "Unexpected"))
    if names_alone and not strict:
        client.load_into(target, paths, strict=False)
        return
    with pytest.raises((RuntimeError, UnsupportedDtypeError), match=complaint):
        client.load_into(target, paths, strict=strict)
    untouched(target, before)


def test_what_hooks_rename_is_loaded(client: StreamerClient, tmp_path: Path) -> None:
    path = saved(Halves(), tmp_path / "m.safetensors", drop=RENAMED, **OLD)
    target = Halves()
    client.load_into(target, path)
    assert torch.equal(target.renamed.new.weight, torch.ones(3, 3))
    assert torch.equal(target.hooked.bias, torch.ones(3))


class Judge(nn.Linear):
    """Looks at values, of which a rehearsal has none."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        assert state_dict[f"{prefix}weight"].sum().item() > 0
        state_dict.pop(f"{prefix}more", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_a_module_that_looks_at_values_is_given_them(client: StreamerClient, tmp_path: Path) -> None:
    weight = torch.full((2, 2), 3.0)
    save_file({"weight": weight, "bias": torch.ones(2), "more": torch.ones(1)}, tmp_path / "m.safetensors")
    target = Judge(2, 2)
    client.load_into(target, tmp_path / "m.safetensors")
    assert torch.equal(target.weight, weight)


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> Path:
    """Zeros of any dtype, by name: dtype, shape, bytes."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, size_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size_bytes]}
        end += size_bytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return path


def test_buffers_that_nobody_can_fill_are_named(client: StreamerClient, tmp_path: Path) -> None:
    path = saved(Scaled(), tmp_path / "m.safetensors")
    with torch.device("meta"):
        target = nn.Sequential(Scaled())
    with pytest.raises(RuntimeError, match=r'meta device.*"0.kept"'):
        client.load_into(target, path, strict=True)


def test_a_name_in_two_files_is_refused(client: StreamerClient, tmp_path: Path) -> None:
    paths = [saved(nn.Linear(2, 2), tmp_path / f"{name}.safetensors") for name in "ab"]
    target = nn.Linear(2, 2)
    before = everything(target)
    with pytest.raises(CheckpointInvalidError, match=r"a\.safetensors and .*b\.safetensors both hold tensor"):
        client.load_into(target, paths)
    untouched(target, before)


def test_a_file_that_is_named_twice_is_refused(client: StreamerClient, tmp_path: Path) -> None:
    path = saved(nn.Linear(2, 2), tmp_path / "a.safetensors")
    with pytest.raises(DuplicateTensorError, match="two files"):
        client.load_into(nn.Linear(2, 2), [path, path])


def test_hooks_after_loading_see_the_result(client: StreamerClient, tmp_path: Path) -> None:
    path = saved(nn.Sequential(nn.Linear(2, 2)), tmp_path / "m.safetensors", more=torch.ones(1))
    target = nn.Sequential(nn.Linear(2, 2))
    seen = []
    register: Any = nn.Module.register_load_state_dict_post_hook
    register(target[0], lambda module, keys: seen.append((module, keys.unexpected_keys)))
    register(target, lambda module, keys: keys.unexpected_keys.clear())
    keys = client.load_into(target, path, strict=False)
    assert seen == [(target[0], keys.unexpected_keys)]
    assert keys.unexpected_keys == []


def test_other_devices_get_what_is_loaded(client: StreamerClient, tmp_path: Path) -> None:
    origin = Tied()
    target = Tied()
    client.load_into(target, saved(origin, tmp_path / "m.safetensors"), device="meta")
    assert {value.device.type for value in target.state_dict().values()} == {"meta"}
    assert target.head.weight is target.embedding.weight


@pytest.mark.parametrize("meta", [False, True])
def test_filling_takes_no_more_than_a_window_beyond_the_module(
    meta: bool, start_daemon: StartDaemon, nursery: Nursery, tmp_path: Path
) -> None:
    """256 MiB through a window of 16 MiB, which a client maps twice."""
    tensors = {f"{number}.weight": torch.full((1024, 1024), float(number)) for number in range(64)}
    save_file(tensors, tmp_path / "m.safetensors")
    daemon = start_daemon("--memory-limit", "16MiB")
    client = nursery.start(
        "fill_module", socket_dir=daemon.socket_dir, source=tmp_path / "m.safetensors", layers=64, meta=meta
    )
    said = client.hear("filled")
    assert client.wait() == 0, client.errors()
    assert said["sum"] == sum(range(64)) * MIB
    own_bytes = 256 * MIB if meta else 0
    assert said["grown_bytes"] <= own_bytes + 2 * 16 * MIB + 8 * MIB
    assert daemon.status()["staging"]["peak_bytes"] <= 16 * MIB


def test_load_state_dict_from_a_full_stage_copies_nothing(start_daemon: StartDaemon, tmp_path: Path) -> None:
    save_file({f"t{number}": torch.rand(1000) for number in range(20)}, tmp_path / "m.safetensors")
    state = start_daemon().client().load_state_dict(tmp_path / "m.safetensors")
    assert all(mapped_from(tensor.data_ptr()).startswith("/memfd:") for tensor in state.values())


def test_load_into_a_meta_module_from_a_full_stage_copies_nothing(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    path = saved(nn.Linear(64, 64), tmp_path / "m.safetensors")
    with torch.device("meta"):
        target = nn.Linear(64, 64)
    start_daemon().client().load_into(target, path)
    assert mapped_from(target.weight.data_ptr()).startswith("/memfd:")


def mapped_from(address: int) -> str:
    """The file whose mapping holds an address of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else ""
    raise AssertionError(f"{address:#x} is not mapped")
