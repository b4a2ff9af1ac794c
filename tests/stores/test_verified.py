"""One bit that is flipped on its way from a real server of each store is found, and nothing that may hold it
is yielded from then on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from penstock.client import errors

from ..e2e.support import DaemonProcess, random_tensors, running_daemon, same, wait_until
from ..s3 import faults
from ..s3.proxy import Exchange, FaultProxy
from ..server.hub_server import Call, HubServer
from ..server.nginx import nginx
from .servers import (
    ACCOUNT_KEY,
    BUCKET,
    azurite,
    conditional,
    fake_gcs,
    s3_client,
    s3_environment,
    seaweed,
)
from .test_azure_store import connection_string, service_of
from .test_gcs_store import make_bucket, upload

MIB = 1 << 20
FLAGS = ("--memory-limit", "64MiB", "--object-block-size", str(64 << 10), "--object-retries", "2")
Tensors = dict[str, torch.Tensor]
LARGE = random_tensors(16, MIB // 16)
"""4 MiB: twice what the smallest window has."""
MANY = random_tensors(4200, 16)
"""More than a segment holds, so that there are two of them in memory that has room for all."""
BODIES = {"large": safetensors.torch.save(LARGE), "many": safetensors.torch.save(MANY)}
STORES = ("gcs", "seaweed", "hub", "azure", "web")


@dataclass
class Damage:
    """The last byte of a file is another in each answer that has it. Such answers wait for `go`."""

    name: str
    met: threading.Event = field(default_factory=threading.Event)
    """One is asked for."""
    go: threading.Event = field(default_factory=threading.Event)

    @property
    def at(self) -> int:
        return len(BODIES[self.name]) - 1

    def holds(self, asked: tuple[int, int] | None) -> bool:
        return asked is not None and asked[0] <= self.at <= asked[1]

    def wait(self) -> None:
        self.met.set()
        assert self.go.wait(60)


@dataclass(frozen=True)
class Stored:
    """Checkpoints in a store: the tensors `LARGE` and `MANY`."""

    top: str
    algorithm: str
    damaging: Callable[[Damage], contextlib.AbstractContextManager[object]]
    digests: bool = False
    """The store has no checksums, and digests are given."""
    verify: str | None = None
    """What it takes to have them compared."""

    def uri(self, name: str) -> str:
        return f"{self.top}/{name}.safetensors"

    def options(self, name: str) -> dict[str, Any]:
        digest = hashlib.sha256(BODIES[name]).hexdigest()
        return {"verify": self.verify, **({"digests": {self.uri(name): digest}} if self.digests else {})}

    @contextlib.contextmanager
    def damaged(self, name: str, *, held: bool = False) -> Iterator[Damage]:
        damage = Damage(name)
        if not held:
            damage.go.set()
        with self.damaging(damage):
            try:
                yield damage
            finally:
                damage.go.set()


def by_proxy(proxy: FaultProxy) -> Callable[[Damage], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def damaging(damage: Damage) -> Iterator[None]:
        def fault(exchange: Exchange) -> None:
            damage.wait()
            faults.flipped(damage.at)(exchange)

        proxy.on(
            lambda request: f"{damage.name}.safetensors" in request.path and damage.holds(request.range),
            fault,
            times=None,
        )
        try:
            yield
        finally:
            proxy.reset()

    return damaging


def by_hub(hub: HubServer) -> Callable[[Damage], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def damaging(damage: Damage) -> Iterator[None]:
        body = BODIES[damage.name]
        digest = hashlib.sha256(body).hexdigest()

        def hook(call: Call) -> bool:
            start, _, last = call.headers.get("range", "").removeprefix("bytes=").partition("-")
            if digest in call.path and last and damage.holds((int(start), int(last))):
                damage.wait()
            return False

        hub._blobs[digest] = body[:-1] + bytes([body[-1] ^ 1])
        hub.storage_hooks.append(hook)
        try:
            yield
        finally:
            hub.storage_hooks.remove(hook)
            hub._blobs[digest] = body

    return damaging


@pytest.fixture(scope="module")
def module(
    tmp_path_factory: pytest.TempPathFactory, require_tool: Callable[[str], str]
) -> Iterator[tuple[dict[str, Stored], DaemonProcess]]:
    with contextlib.ExitStack() as stack:
        gcs_proxy = stack.enter_context(contextlib.closing(FaultProxy(0)))
        gcs = stack.enter_context(fake_gcs(asked_at=gcs_proxy.port))
        gcs_proxy.upstream_port = stack.enter_context(conditional(gcs)).port
        make_bucket(gcs)
        weed = stack.enter_context(seaweed())
        weed_proxy = stack.enter_context(contextlib.closing(FaultProxy(weed.port)))
        client = s3_client(weed)
        blobs = stack.enter_context(azurite())
        blob_proxy = stack.enter_context(contextlib.closing(FaultProxy(blobs.port)))
        service = stack.enter_context(service_of(blobs))
        service.create_container(BUCKET)
        files, state = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("state")
        site = stack.enter_context(nginx(require_tool("nginx"), files, state))
        site_proxy = stack.enter_context(contextlib.closing(FaultProxy(site)))
        hub = stack.enter_context(contextlib.closing(HubServer()))
        for name, body in BODIES.items():
            key = f"{name}.safetensors"
            upload(gcs, key, body)
            client.put_object(Bucket=BUCKET, Key=key, Body=body, ChecksumAlgorithm="CRC64NVME")
            service.get_blob_client(BUCKET, key).upload_blob(body)
            (files / key).write_bytes(body)
            hub.commit("org/model", {key: body})
        write_sums(files)
        environment = {
            "HF_HUB_OFFLINE": "0",
            "STORAGE_EMULATOR_HOST": gcs_proxy.endpoint.removeprefix("http://"),
            "AZURE_STORAGE_CONNECTION_STRING": connection_string(
                blob_proxy.endpoint, f"AccountKey={ACCOUNT_KEY}"
            ),
            **s3_environment(weed_proxy.endpoint),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
            "NETRC": os.devnull,
            "NO_PROXY": "127.0.0.1",
        }
        daemon = stack.enter_context(running_daemon(*FLAGS, environment=environment))
        yield (
            {
                "gcs": Stored(f"gs://{BUCKET}", "CRC32C", by_proxy(gcs_proxy)),
                "seaweed": Stored(f"s3://{BUCKET}", "CRC64NVME", by_proxy(weed_proxy)),
                "hub": Stored("hf://org/model", "SHA-256", by_hub(hub), verify="require"),
                "azure": Stored(f"az://{BUCKET}", "SHA-256", by_proxy(blob_proxy), digests=True),
                "web": Stored(site_proxy.endpoint, "SHA-256", by_proxy(site_proxy), verify="require"),
            },
            daemon,
        )


def write_sums(directory: Path) -> None:
    """As `sha256sum *.safetensors >SHA256SUMS` does."""
    lines = [f"{hashlib.sha256(body).hexdigest()}  {name}.safetensors\n" for name, body in BODIES.items()]
    (directory / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture(params=STORES)
def stored(request: pytest.FixtureRequest, module: tuple[dict[str, Stored], DaemonProcess]) -> Stored:
    return module[0][request.param]


@pytest.fixture
def daemon(module: tuple[dict[str, Stored], DaemonProcess]) -> Iterator[DaemonProcess]:
    with module[1].client() as client:
        client.evict()
    yield module[1]
    module[1].wait_idle()


def test_what_arrives_as_it_was_stored_is_verified(daemon: DaemonProcess, stored: Stored) -> None:
    with daemon.client() as client:
        load = client.load(stored.uri("large"), **stored.options("large"))
        same(load, LARGE)
        assert load.stats.verified_bytes == 4 * MIB
        assert [file.verified_by for file in load.files] == [stored.algorithm]


@pytest.mark.parametrize("memory_limit", [-1, 0])
def test_a_flipped_bit_ends_the_load_before_the_file_s_last_segment(
    daemon: DaemonProcess, stored: Stored, memory_limit: int
) -> None:
    names: list[str] = []
    options = stored.options("large")
    with daemon.client() as client, stored.damaged("large"):
        load = client.load(stored.uri("large"), **options, memory_limit=memory_limit)
        with pytest.raises(errors.CheckpointCorruptError) as caught:
            names.extend(name for name, _ in load)
    assert len(names) < len(LARGE)
    assert caught.value.details["algorithm"] == stored.algorithm
    with daemon.client() as client:
        load = client.load(stored.uri("large"), **options)
        same(load, LARGE)
        assert load.stats.verified_bytes == 4 * MIB


@pytest.mark.parametrize(
    ("window", "owned", "members"),
    [(False, True, 1), (False, False, 2), (True, True, 2), (True, False, 1)],
    ids=["full-owned", "full-borrowed-shared", "window-owned-shared", "window-borrowed"],
)
def test_once_a_file_is_found_wrong_nothing_more_of_it_is_yielded(
    window: bool, owned: bool, members: int, daemon: DaemonProcess, stored: Stored
) -> None:
    """Though segments of it were announced, and the client was in the middle of one."""
    name, tensors = ("large", LARGE) if window else ("many", MANY)
    options = {**stored.options(name), "owned": owned, "memory_limit": 0 if window else None}
    if members > 1:
        options["group"] = (f"ranks-{owned}-{window}", members)
    found = daemon.log().count("result=CHECKPOINT_CORRUPT")
    with contextlib.ExitStack() as stack:
        damage = stack.enter_context(stored.damaged(name, held=True))
        client = stack.enter_context(daemon.client())
        loads = [stack.enter_context(client.load(stored.uri(name), **options)) for _ in range(members)]
        iterators = [iter(load) for load in loads]
        yielded = pull_until(damage.met, iterators, daemon)
        yielded_bytes = yielded * next(iter(tensors.values())).nbytes
        wait_until(
            lambda: all(load["delivered_bytes"] > yielded_bytes for load in daemon.status()["loads"]),
            "more to be announced than was yielded",
        )
        damage.go.set()
        wait_until(
            lambda: daemon.log().count("result=CHECKPOINT_CORRUPT") == found + members, "it to be found"
        )
        for load, iterator in zip(loads, iterators, strict=True):
            with pytest.raises(errors.CheckpointCorruptError) as caught:
                next(iterator)
            assert caught.value.details["file"] == stored.uri(name)
            assert load.stats.tensors == yielded < len(tensors)
    wait_until(lambda: stored.uri(name) not in str(daemon.status()["stages"]), "the stage to be given up")


def pull_until(met: threading.Event, iterators: Sequence[Iterator[object]], daemon: DaemonProcess) -> int:
    """Takes at least one tensor of each load, and as many as it takes to have the daemon ask for the last
    segment. Returns how many of each."""

    def waits_for_room() -> bool:
        return any("release" in load["waits_for"] for load in daemon.status()["loads"])

    count = 0
    while True:
        for iterator in iterators:
            next(iterator)
        count += 1
        wait_until(lambda: met.is_set() or waits_for_room(), "the last segment to be asked for, or no room")
        if met.is_set():
            return count


def test_the_hub_s_digests_are_not_computed_unless_they_are_asked_for(
    daemon: DaemonProcess, module: tuple[dict[str, Stored], DaemonProcess]
) -> None:
    with daemon.client() as client:
        load = client.load(module[0]["hub"].uri("large"))
        same(load, LARGE)
        assert load.stats.verified_bytes == 0
