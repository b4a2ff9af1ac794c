"""A block in which a library reads through a daemon, and the proof that it did."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from penstock.client import patch_safetensors

from ..support import DaemonProcess, running_daemon


class Library:
    """A module that is imported when something of it is first used: each process of pytest collects all
    tests, and only one runs those that need it."""

    def __init__(self, name: str) -> None:
        self._name = name
        os.environ["HF_HUB_OFFLINE"] = "1"  # read at the first import, whoever does it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest, which asks whether this is a fixture
            raise AttributeError(name)
        if self._name not in sys.modules:
            self._import()
        return getattr(sys.modules[self._name], name)

    def _import(self) -> None:
        """Whatever its dependencies are deprecated for."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(self._name)
        gc.collect()
        gc.freeze()  # accelerate collects garbage for every file: it need not go through the modules


@contextlib.contextmanager
def library_daemon(limit: str = "-1") -> Iterator[DaemonProcess]:
    """For the tests of a module; nothing is held at its end."""
    with running_daemon("--memory-limit", limit) as daemon:
        yield daemon
        gc.collect()  # models refer to themselves


@contextlib.contextmanager
def reading_through(daemon: DaemonProcess, directory: Path) -> Iterator[None]:
    """Fails unless as many bytes as the safetensors files below the directory have came from the daemon.

    A file that the library reads itself warns, which is an error."""
    files = list(directory.rglob("*.safetensors"))
    assert files
    before = delivered_bytes(daemon)
    with patch_safetensors(daemon.client()):
        yield
    headers_bytes = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    total_bytes = sum(path.stat().st_size for path in files)
    assert delivered_bytes(daemon) - before >= total_bytes - headers_bytes > 0


def delivered_bytes(daemon: DaemonProcess) -> int:
    total: int = daemon.status()["totals"]["delivered_bytes"]
    return total


def same_modules(found: Any, wanted: Any) -> None:
    """The same state, and tensors that may be written."""
    found_state, wanted_state = found.state_dict(), wanted.state_dict()
    assert list(found_state) == list(wanted_state)
    for name, tensor in wanted_state.items():
        assert found_state[name].dtype == tensor.dtype, name
        assert found_state[name].device == tensor.device, name
        assert torch.equal(found_state[name], tensor), name
