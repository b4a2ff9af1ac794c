"""Models and adapters in an object store, for engines without credentials and without a library for it."""

from __future__ import annotations

import os
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ...e2e.support import DaemonProcess, running_daemon
from ...s3.moto import MotoServer
from ...s3.support import Bucket, assert_no_secret, environment
from .agreed import LIBRARIES_OF_STORES, PROMPTS
from .conftest import Engines, auto, done, penstock
from .test_features import speculating
from .test_serve import Server

LORA: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def no_credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        yield


@pytest.fixture(scope="module")
def moto(no_credentials: None) -> Iterator[MotoServer]:
    server = MotoServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def bucket(moto: MotoServer, models: dict[str, Path]) -> Bucket:
    """Models in `models/`, and an adapter of "llama" as `adapters/one`."""
    bucket = Bucket(moto, "penstock-models")
    places = {"models/llama": "llama", "models/qwen2": "qwen2", "models/draft": "draft"}
    for place, name in {**places, "adapters/one": "adapter"}.items():
        for path in models[name].iterdir():
            bucket.put(f"{place}/{path.name}", path.read_bytes())
    return bucket


@pytest.fixture(scope="module")
def module_daemon(moto: MotoServer) -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "128MiB", environment=environment(moto.endpoint)) as daemon:
        yield daemon


@pytest.fixture
def daemon(module_daemon: DaemonProcess) -> Iterator[DaemonProcess]:
    """The only one that has credentials."""
    yield module_daemon
    module_daemon.wait_idle()
    assert_no_secret(module_daemon.log())


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    return {"PENSTOCK_CACHE_DIR": str(tmp_path / "cache")}


def test_a_model_and_its_draft_in_a_bucket_are_the_same_as_local_ones(
    engines: Engines, daemon: DaemonProcess, bucket: Bucket, models: dict[str, Path], cache: dict[str, str]
) -> None:
    expected = engines.run(models["llama"], auto(), options=speculating(models["draft"]))
    options = speculating(models["draft"], model=bucket.uri("models/draft/"))
    found = engines.run(bucket.uri("models/llama"), penstock(daemon), options=options, variables=cache)
    assert found == expected
    assert daemon.status()["totals"]["read_bytes"] > 0


def test_a_model_that_is_not_in_the_bucket_is_told_before_any_worker_starts(
    engines: Engines, daemon: DaemonProcess, bucket: Bucket, cache: dict[str, str]
) -> None:
    engine = engines.launch("generate", bucket.uri("models/none"), penstock(daemon), {}, variables=cache)
    said = done(engine, "failed")
    assert said["kind"] == "CheckpointNotFoundError"
    assert bucket.uri("models/none") in said["message"]
    assert "Initializing" not in engine.errors()


@pytest.mark.timeout(900)  # three interpreters, each of which imports vLLM
def test_a_server_without_credentials_serves_a_bucket_s_model_and_its_adapters_by_name(
    engines: Engines,
    daemon: DaemonProcess,
    bucket: Bucket,
    models: dict[str, Path],
    cache: dict[str, str],
    tmp_path: Path,
) -> None:
    expected = engines.run(models["llama"], auto(), options=LORA, lora=str(models["adapter"]))
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in (name for name in LIBRARIES_OF_STORES if "." not in name):
        (blocked / f"{name}.py").write_text("raise ImportError('blocked by the test')\n")
    variables = {
        **cache,
        "PYTHONPATH": str(blocked),
        "PENSTOCK_SOCKET_DIR": str(daemon.socket_dir),
        "PENSTOCK_LORA_BASE": bucket.uri("adapters/"),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    flags = ("--load-format=penstock", "--enable-lora", "--max-lora-rank=8")
    with Server(tmp_path / "log", bucket.uri("models/llama"), *flags, **variables) as server:
        server.wait_ready()
        named = bucket.uri("models/llama")  # the model's name for clients is the one that it was started with
        assert [server.complete(prompt, model=named) for prompt in PROMPTS] == expected["tokens"]
        assert [server.complete(prompt, model="one") for prompt in PROMPTS] == expected["adapted"]
        for name in ("none", "../adapters/one", "one/", "..", "./one"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                server.complete(PROMPTS[0], model=name)
            assert caught.value.code == 404, name
            caught.value.close()
    assert "'../adapters/one' is not looked for" in server.log()
    assert expected["adapted"] != expected["tokens"]
    kept = sorted(path.name for path in Path(cache["PENSTOCK_CACHE_DIR"], "files").iterdir())
    assert [name.rpartition("-")[0] for name in kept] == ["llama", "one"]
