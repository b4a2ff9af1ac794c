"""A checkpoint into an nn.Module, one tensor at a time.

fit         names, shapes and dtypes are compared with the checkpoint's before a byte is used: a module that
            does not fit stays as it is
place       a tensor with the right device and dtype is written in place; any other, also one on the
            meta device, is replaced: by the loaded tensor, which on the CPU may be a view of the staging
            buffer, or by a converted copy
tied        names of one tensor: loaded once, by any of the names that the checkpoint has
special     modules with loading methods or hooks of their own: their tensors are collected, and given to
            their `load_state_dict`
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import Module
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from penstock.v1 import streamer_pb2 as pb

from . import errors
from .load import Load
from .rehearsal import Rehearsal
from .ring.stream import Choose
from .ring.tensors import without_bytes
from .targets import Targets, converts, is_old_scalar

_OWN_WAYS = ("load_state_dict", "_load_from_state_dict", "get_extra_state", "set_extra_state")


@dataclass(slots=True)
class _Slot:
    """One name of a parameter or buffer, where its module keeps it."""

    module: Module
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        found: torch.Tensor = getattr(self.module, self.name)
        return found


class OpenLoad(Protocol):
    """`StreamerClient._open_load` with the arguments that the module does not decide."""

    def __call__(
        self, choose: Callable[[pb.OpenLoad], Choose], *, device: torch.device, owned: bool
    ) -> Load: ...


@torch.no_grad()
def fill(
    module: Module,
    open_load: OpenLoad,
    *,
    device: torch.device | None,
    dtype: torch.dtype | None,
    strict: bool,
) -> _IncompatibleKeys:
    """See `StreamerClient.load_into`."""
    loader = ModuleLoader(module, device, dtype)

    def choose(request: pb.OpenLoad) -> Choose:
        request.list_tensors = True
        return lambda listed: loader.choose(listed, strict)

    with open_load(choose, device=loader.source_device, owned=loader.keeps_tensors) as load:
        for name, tensor in load:
            loader.take(name, tensor)
            del tensor
    return loader.finish(strict)


class ModuleLoader:
    """Fills one module; see `StreamerClient.load_into`."""

    def __init__(self, module: Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self._module = module
        self._targets = Targets(device, dtype)
        self._slots: dict[str, _Slot] = {}
        self._special: dict[str, Module] = {}  # by prefix
        self._walk(module, "")
        self._ties = self._find_ties()
        self._ignored: set[str] = set()
        self._loaded: set[str] = set()
        self._collected: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        self._missing: list[str] = []
        self._unexpected: list[str] = []
        self._problems: list[str] = []

    @property
    def source_device(self) -> torch.device:
        """The best device to deliver tensors to."""
        targets = {self._targets.device_of(slot.tensor) for slot in self._slots.values()}
        return targets.pop() if len(targets) == 1 else self._targets.device or torch.device("cpu")

    @property
    def keeps_tensors(self) -> bool:
        """Whether a delivered tensor may become the module's own."""
        return bool(self._special) or not all(
            self._targets.in_place(slot.tensor) for slot in self._slots.values()
        )

    def wants(self, name: str) -> bool:
        return name in self._slots or self._prefix_of(name) is not None

    def choose(self, listed: Sequence[pb.Tensor], strict: bool) -> list[str]:
        """The names to load, of a checkpoint with these tensors.

        Raises RuntimeError, DuplicateTensorError, UnsupportedDtypeError or CheckpointInvalidError for what
        the module cannot take. Nothing has changed then.
        """
        given: dict[str, torch.Tensor] = {}
        for entry in listed:
            if self.wants(entry.name):
                if entry.name in given:
                    raise _duplicate(entry.name)
                given[entry.name] = without_bytes(entry)
        found = set(given)
        for tied in self._ties:
            present = [name for name in tied if name in given]
            # If they differ, the last one wins, as it does for load_state_dict.
            self._ignored.update(present[:-1])
            if present:
                found.update(tied)
        self._missing = [name for name in self._slots if name not in found]
        self._unexpected = list(dict.fromkeys(one.name for one in listed if one.name not in given))
        problems = [problem for name, tensor in given.items() for problem in self._misfit(name, tensor)]
        missing, unexpected = list(self._missing), list(self._unexpected)
        states: dict[str | None, dict[str, torch.Tensor]] = defaultdict(dict)
        for name in given.keys() - self._slots.keys():
            prefix = self._prefix_of(name)
            states[prefix][name[len(prefix or "") :]] = given[name]
        rehearsal = Rehearsal(self._module)
        for prefix, special in self._special.items():
            outcome = rehearsal.of(special, prefix, states[prefix])
            missing += outcome.missing
            unexpected += outcome.unexpected
            problems += outcome.problems
        if strict:
            problems = _name_problems(missing, unexpected) + problems + self._unfillable()
        self._raise(problems)
        return list(given)

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Puts a tensor where it belongs. The caller drops it before it asks for the next."""
        self._loaded.add(name)
        if name in self._ignored:
            return
        slot = self._slots.get(name)
        if slot is None:
            prefix = self._prefix_of(name)
            if prefix is not None:
                self._collected[prefix][name[len(prefix) :]] = tensor
            return
        own = slot.tensor
        if is_old_scalar(own, tensor):
            tensor = tensor[0]
        if self._targets.in_place(own):
            own.copy_(tensor)
        else:
            setattr(slot.module, slot.name, self._targets.replacement(own, tensor))

    def finish(self, strict: bool) -> _IncompatibleKeys:
        """Loads the collected tensors and ties names again. Raises RuntimeError with everything that did not
        fit."""
        for prefix, special in self._special.items():
            self._load_special(prefix, special)
        if strict:  # only those of special modules can be left
            self._problems = _name_problems(self._missing, self._unexpected) + self._problems
        self._tie()
        keys = _IncompatibleKeys(self._missing, self._unexpected)
        for module in self._plain_modules(self._module):
            for hook in module._load_state_dict_post_hooks.values():
                hook(module, keys)
        self._raise(self._problems)
        return keys

    def _walk(self, module: Module, prefix: str) -> None:
        if not _is_plain(module):
            self._special[prefix] = module
            return
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self._slots[prefix + name] = _Slot(module, name)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                self._slots[prefix + name] = _Slot(module, name)
        for name, child in module._modules.items():
            if child is not None:
                self._walk(child, f"{prefix}{name}.")

    def _plain_modules(self, module: Module) -> Iterator[Module]:
        if module in self._special.values():
            return
        for child in module.children():
            yield from self._plain_modules(child)
        yield module

    def _prefix_of(self, name: str) -> str | None:
        return next((prefix for prefix in self._special if name.startswith(prefix)), None)

    def _find_ties(self) -> list[list[str]]:
        """Names that stand for the same memory."""
        names: dict[object, list[str]] = defaultdict(list)
        for name, slot in self._slots.items():
            names[_identity(slot.tensor)].append(name)
        return [tied for tied in names.values() if len(tied) > 1]

    def _load_special(self, prefix: str, special: Module) -> None:
        state = self._collected.pop(prefix, {})
        assign = False
        for name, own in special.state_dict().items():
            if not isinstance(own, torch.Tensor) or is_lazy(own):
                continue
            assign = assign or not self._targets.in_place(own)
            if name in state:
                state[name] = state[name].to(self._targets.dtype_of(own))
        try:
            keys = special.load_state_dict(state, strict=False, assign=assign)
        except RuntimeError as error:
            self._problems.append(str(error))
            return
        if self._targets.device is not None:
            special.to(self._targets.device)
        self._missing += [prefix + name for name in keys.missing_keys]
        self._unexpected += [prefix + name for name in keys.unexpected_keys]

    def _tie(self) -> None:
        for tied in self._ties:
            loaded = [name for name in tied if name in self._loaded and name not in self._ignored]
            for slot in (self._slots[name] for name in tied):
                if loaded and not self._targets.in_place(slot.tensor):
                    setattr(slot.module, slot.name, self._slots[loaded[0]].tensor)

    def _unfillable(self) -> list[str]:
        names = [
            f"{prefix}{'.' if prefix else ''}{name}"
            for prefix, module in self._module.named_modules()
            for name in sorted(module._non_persistent_buffers_set)
            if (buffer := module._buffers.get(name)) is not None and buffer.is_meta
        ]
        if not names:
            return []
        return [
            f"Buffers on the meta device that no checkpoint holds: {_quoted(names)}. Build the module with "
            "its buffers on a real device, or pass strict=False and fill them."
        ]

    def _misfit(self, name: str, tensor: torch.Tensor) -> Iterator[str]:
        """The reasons why a tensor of this shape and dtype does not fit its place. None for tensors of
        special modules: only these know what they take."""
        slot = self._slots.get(name)
        if slot is None:
            return
        own = slot.tensor
        if own.shape != tensor.shape and not is_old_scalar(own, tensor):
            yield (
                f"size mismatch for {name}: copying a param with shape {tensor.shape} from checkpoint, "
                f"the shape in current model is {own.shape}."
            )
        elif not converts(tensor.dtype, self._targets.dtype_of(own)):
            yield (
                f"dtype mismatch for {name}: torch cannot convert {tensor.dtype} of the checkpoint to "
                f"{self._targets.dtype_of(own)}."
            )

    def _raise(self, problems: Sequence[str]) -> None:
        if problems:
            listed = "\n\t".join(problems)
            raise RuntimeError(
                f"Error(s) in loading state_dict for {type(self._module).__name__}:\n\t{listed}\n"
                "Load a checkpoint of this module, or pass strict=False for names that only one of them has."
            )


def _is_plain(module: Module) -> bool:
    """Whether loading the module only fills its own parameters and buffers, without hooks or other
    methods."""
    kind = type(module)
    return not module._load_state_dict_pre_hooks and all(
        getattr(kind, name) is getattr(Module, name) for name in _OWN_WAYS
    )


def _duplicate(name: str) -> errors.DuplicateTensorError:
    return errors.DuplicateTensorError(
        f"two files of the checkpoint hold a tensor {name!r}, of which a module can take one: load the files "
        "that belong together, or remove the superseded one"
    )


def _identity(tensor: torch.Tensor) -> object:
    if tensor.is_meta or not tensor.numel() or is_traceable_wrapper_subclass(tensor):
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _name_problems(missing: list[str], unexpected: list[str]) -> list[str]:
    problems = []
    if unexpected:
        problems.append(f"Unexpected key(s) in state_dict: {_quoted(unexpected)}.")
    if missing:
        problems.append(f"Missing key(s) in state_dict: {_quoted(missing)}.")
    return problems


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
