"""Without a daemon an engine has its weights late, or an error: never wrong ones."""

from __future__ import annotations

from pathlib import Path

from ...e2e.conftest import StartDaemon
from . import shared_memory
from .conftest import Engines, auto, done, penstock


def test_a_load_whose_daemon_is_killed_goes_on_at_the_next_one(
    engines: Engines, start_daemon: StartDaemon, models: dict[str, Path]
) -> None:
    expected = engines.run(models["qwen2"], auto())
    daemon = start_daemon("--memory-limit", "4MiB")
    more = {"after": 2, "patience_seconds": 60.0}
    engine = engines.launch("pause_in_mid_load", models["qwen2"], penstock(daemon), {}, **more)
    done(engine, "paused")
    daemon.kill()
    start_daemon("--memory-limit", "4MiB")
    engine.go()
    said = done(engine)
    assert {name: expected[name] for name in said} == said
    assert " goes on as load " in engine.errors()


def test_an_engine_whose_daemon_is_killed_in_mid_load_and_stays_away_fails_in_words(
    engines: Engines, start_daemon: StartDaemon, models: dict[str, Path]
) -> None:
    daemon = start_daemon("--memory-limit", "4MiB")
    more = {"after": 2, "patience_seconds": 0.0}
    engine = engines.launch("pause_in_mid_load", models["qwen2"], penstock(daemon), {}, **more)
    done(engine, "paused")
    daemon.kill()
    engine.go()
    said = done(engine, "failed")
    assert said["kind"] == "DaemonUnavailableError"
    assert str(daemon.socket_dir) in said["message"]


def test_a_daemon_that_is_not_there_is_told_before_any_worker_starts(
    engines: Engines, models: dict[str, Path], socket_dir: Path
) -> None:
    load = {"load_format": "penstock", "model_loader_extra_config": {"socket_dir": str(socket_dir)}}
    engine = engines.launch("generate", models["llama"], load, {})
    said = done(engine, "failed")
    assert str(socket_dir) in said["message"]
    assert "penstockd" in said["message"]
    assert "init engine" not in engine.errors()
    assert "Initializing" not in engine.errors()


def test_ranks_that_are_killed_leave_no_shared_memory_after_the_test(
    engines: Engines, models: dict[str, Path], tmp_path: Path
) -> None:
    options, more = {"tensor_parallel_size": 2}, {"store": str(tmp_path / "store"), "pause": True}
    ranks = [
        engines.launch("load_as_rank", models["qwen2"], auto(), options, rank=rank, **more)
        for rank in range(2)
    ]
    for rank in ranks:
        done(rank, "paused")
    paths = shared_memory.of_ranks(ranks[0].pid)
    assert paths
    assert paths == shared_memory.of_ranks(ranks[1].pid)
    assert all(path.exists() for path in paths)
    engines.end_all()
    assert not [path for path in paths if path.exists()]


def test_a_plugin_that_vllm_is_not_to_load_is_told_as_troubleshooting_says(
    engines: Engines, models: dict[str, Path]
) -> None:
    plain = {"load_format": "penstock"}
    engine = engines.launch("generate", models["llama"], plain, {}, variables={"VLLM_PLUGINS": "others"})
    message = done(engine, "failed")["message"]
    assert message == "Load format `penstock` is not supported"
    page = (Path(__file__).parents[3] / "docs" / "troubleshooting.md").read_text()
    assert "VLLM_PLUGINS" in page[page.index(message) :][:600]
