"""Models in Google Cloud Storage, in Azure and on the Hub, for engines that know no credentials, no library
and no address of a store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ...e2e.support import DaemonProcess, running_daemon
from ...server.hub_server import HubServer
from ...stores.servers import ACCOUNT_KEY, BUCKET, azurite, fake_gcs
from ...stores.test_azure_store import connection_string, service_of
from ...stores.test_gcs_store import make_bucket, upload
from .conftest import Engines, Expected, auto, penstock
from .test_tokens import tensor_bytes

TOKEN = "hf_TOKENOFTHEENGINES"
REPOSITORY = "org/private"
BGE_M3 = f"gs://{BUCKET}/models/bge-m3"
"""Has weights in files that are no safetensors."""
PLACES = {
    f"gs://{BUCKET}/models/qwen2": "qwen2",
    f"az://{BUCKET}/models/llama": "llama",
    f"hf://{REPOSITORY}": "float32 tied",
}
"""A URI in each store, and the model that is there."""


@dataclass(frozen=True, slots=True)
class Store:
    put: Callable[[str, bytes], object]
    environment: dict[str, str]
    """With which a daemon may read it."""


@contextlib.contextmanager
def gcs() -> Iterator[Store]:
    with fake_gcs() as server:
        make_bucket(server)
        variables = {"STORAGE_EMULATOR_HOST": server.url.removeprefix("http://")}
        yield Store(lambda key, content: upload(server, key, content), variables)


@contextlib.contextmanager
def azure() -> Iterator[Store]:
    with azurite() as server, service_of(server) as service:
        service.create_container(BUCKET)
        account = connection_string(server.url, f"AccountKey={ACCOUNT_KEY}")
        yield Store(
            lambda key, content: service.get_blob_client(BUCKET, key).upload_blob(content),
            {"AZURE_STORAGE_CONNECTION_STRING": account},
        )


@contextlib.contextmanager
def hub(home: Path) -> Iterator[Store]:
    with contextlib.closing(HubServer()) as server:
        server.tokens.add(TOKEN)
        server.commit(REPOSITORY, {})
        server.repositories[REPOSITORY].private = True
        variables = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
        }
        yield Store(lambda key, content: server.commit(REPOSITORY, {key: content}), variables)


@pytest.fixture(scope="module")
def module_daemon(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonProcess]:
    """The only one that has credentials."""
    with contextlib.ExitStack() as stack:
        opened = gcs(), azure(), hub(tmp_path_factory.mktemp("hub"))
        stores = [stack.enter_context(store) for store in opened]
        environment = {"NO_PROXY": "127.0.0.1,127.0.0.2", "NETRC": os.devnull}
        for store, (uri, name) in zip(
            (*stores, stores[0]), {**PLACES, BGE_M3: "bge-m3"}.items(), strict=True
        ):
            environment |= store.environment
            prefix = "" if uri.startswith("hf:") else f"models/{name}/"
            for path in models[name].iterdir():
                store.put(prefix + path.name, path.read_bytes())
        yield stack.enter_context(running_daemon("--memory-limit", "128MiB", environment=environment))


@pytest.fixture
def daemon(module_daemon: DaemonProcess) -> Iterator[DaemonProcess]:
    yield module_daemon
    module_daemon.wait_idle()
    for secret in (TOKEN, ACCOUNT_KEY, "Signature="):
        assert secret not in module_daemon.log() + str(module_daemon.status())


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    return {"PENSTOCK_CACHE_DIR": str(tmp_path / "cache")}


@pytest.mark.parametrize("uri", PLACES)
def test_a_model_in_a_cloud_or_on_the_hub_is_the_same_as_a_local_one(
    uri: str,
    engines: Engines,
    daemon: DaemonProcess,
    models: dict[str, Path],
    by_vllm: Expected,
    cache: dict[str, str],
) -> None:
    before = daemon.read_bytes()
    found = engines.run(uri, penstock(daemon), variables=cache)
    assert found == by_vllm(PLACES[uri])
    assert daemon.read_bytes() - before == tensor_bytes(models[PLACES[uri]])
    (directory,) = Path(cache["PENSTOCK_CACHE_DIR"], "files").glob("*/*")
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(os.listdir(directory))
    assert not list(directory.glob("*.safetensors"))


def test_weights_that_are_no_safetensors_come_from_the_store_too(
    engines: Engines, daemon: DaemonProcess, models: dict[str, Path], cache: dict[str, str]
) -> None:
    expected = engines.run(models["bge-m3"], auto(), program="pool")
    assert engines.run(BGE_M3, penstock(daemon), program="pool", variables=cache) == expected
