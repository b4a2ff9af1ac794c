"""Compares each object store with a bare loop over the same server, and with Run:ai's package, in turns.

    python -m benchmarks.stores [--size-mb 512] [--rounds 5] [--runai-python PATH] [--store gcs]

The servers are those of the tests, on the loopback: fake-gcs-server, Azurite, SeaweedFS, nginx as a plain web
server, and a hub of the tests' own that leads to nginx as its storage. They share the machine with the
readers, and most are slow. So compare ratios, not rates. The bare loop has as many threads as the daemon has
connections, each with a keep-alive connection of `http.client`, and reads ranges into populated memory. It
makes no tensors and compares no bytes. Neither does the daemon when it only stages (`prefetch`) with
`--verify off`; the other daemons have `auto`. Run:ai's loader runs in a process of its own, with the Python
of an environment that has `runai-model-streamer[s3,gcs,azure]`. Its imports and the daemon's are outside the
clock.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from urllib.parse import urlsplit

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import boto3
import safetensors.torch
import torch
from azure.storage.blob import ContainerSasPermissions, generate_container_sas
from tests.server.hub_server import HubServer
from tests.server.nginx import nginx
from tests.stores import servers
from tests.stores.test_azure_store import connection_string, service_of
from tests.stores.test_gcs_store import make_bucket, upload

from penstock.client import StreamerClient

KEY = "model/model.safetensors"
CONNECTIONS, BLOCK_BYTES = 8, 8 << 20
"""Of the daemon, the bare loop and Run:ai's loader: as much as two cores bear that also run the server."""
RUNAI = """
import sys, time
from runai_model_streamer import SafetensorsStreamer
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([line.strip()], owned=False)
        for name, tensor in streamer.get_tensors():
            pass
    print(time.perf_counter() - began, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint in a store."""

    name: str
    uri: str
    url: str
    """The address for a plain GET, with the credentials that the store wants in it."""
    environment: dict[str, str]


@contextlib.contextmanager
def in_gcs(content: bytes) -> Iterator[Stored]:
    with servers.fake_gcs() as server:
        make_bucket(server)
        upload(server, KEY, content)
        environment = {
            "STORAGE_EMULATOR_HOST": server.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": server.url,
            "RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS": "1",
        }
        place = f"{servers.BUCKET}/{KEY}"
        yield Stored("GCS (fake-gcs-server)", f"gs://{place}", f"{server.url}/{place}", environment)


@contextlib.contextmanager
def in_azure(content: bytes) -> Iterator[Stored]:
    with servers.azurite() as server, service_of(server) as service:
        service.create_container(servers.BUCKET)
        service.get_blob_client(servers.BUCKET, KEY).upload_blob(content)
        sas = generate_container_sas(
            servers.ACCOUNT,
            servers.BUCKET,
            account_key=servers.ACCOUNT_KEY,
            permission=ContainerSasPermissions(read=True),
            expiry=datetime.now(timezone.utc) + timedelta(hours=1),
        )
        text = connection_string(
            server.url, f"AccountKey={servers.ACCOUNT_KEY}", "DefaultEndpointsProtocol=http"
        )
        place = f"{servers.BUCKET}/{KEY}"
        url = f"{server.url}/{servers.ACCOUNT}/{place}?{sas}"
        yield Stored("Azure (Azurite)", f"az://{place}", url, {"AZURE_STORAGE_CONNECTION_STRING": text})


@contextlib.contextmanager
def in_s3(content: bytes) -> Iterator[Stored]:
    with servers.seaweed() as server:
        keys = {"aws_access_key_id": servers.KEY_ID, "aws_secret_access_key": servers.SECRET_KEY}
        client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1", **keys)
        client.put_object(Bucket=servers.BUCKET, Key=KEY, Body=content, ChecksumAlgorithm="CRC64NVME")
        url = client.generate_presigned_url("get_object", Params={"Bucket": servers.BUCKET, "Key": KEY})
        environment = {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
            **{name.upper(): value for name, value in keys.items()},
        }
        yield Stored("S3 (SeaweedFS)", f"s3://{servers.BUCKET}/{KEY}", url, environment)


@contextlib.contextmanager
def web_server() -> Iterator[tuple[str, Path]]:
    """nginx: its address, and the directory that it serves."""
    program = shutil.which("nginx")
    if program is None:
        raise RuntimeError("this scenario needs nginx (Debian's nginx-light)")
    with (
        tempfile.TemporaryDirectory() as files,
        tempfile.TemporaryDirectory() as state,
        nginx(program, Path(files), Path(state)) as port,
    ):
        yield f"http://127.0.0.1:{port}", Path(files)


@contextlib.contextmanager
def on_the_web(content: bytes) -> Iterator[Stored]:
    with web_server() as (url, files):
        path = files / KEY
        path.parent.mkdir()
        path.write_bytes(content)
        yield Stored("HTTP (nginx)", f"{url}/{KEY}", f"{url}/{KEY}", {"NETRC": os.devnull})


@contextlib.contextmanager
def on_the_hub(content: bytes) -> Iterator[Stored]:
    """The commit, the tree and the address of the file come from the hub, in this process; the bytes come
    from nginx, as the real Hub's come from another host. Both loops read these: the address is asked for
    once."""
    digest = hashlib.sha256(content).hexdigest()
    with (
        web_server() as (url, files),
        contextlib.closing(HubServer()) as hub,
        tempfile.TemporaryDirectory() as home,
    ):
        (files / "blobs").mkdir()
        (files / "blobs" / digest).write_bytes(content)
        hub.storage_url = url
        hub.commit("org/model", {"model.safetensors": content})
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_OFFLINE": "0"}
        uri = "hf://org/model/model.safetensors"
        yield Stored("Hub (its bytes from nginx)", uri, f"{url}/blobs/{digest}", environment)


STORES = {"gcs": in_gcs, "azure": in_azure, "s3": in_s3, "web": on_the_web, "hub": on_the_hub}


class Bare:
    """Reads the whole object. Each thread reads the next block, into memory that was written to before."""

    def __init__(self, url: str, size_bytes: int) -> None:
        self._parts = urlsplit(url)
        self._size_bytes = size_bytes
        self._buffer = bytearray(size_bytes)

    def seconds(self) -> float:
        blocks = iter(range(0, self._size_bytes, BLOCK_BYTES))
        failures: list[BaseException] = []

        def read() -> None:
            try:
                connection = http.client.HTTPConnection(self._parts.hostname or "", self._parts.port)
                with contextlib.closing(connection):
                    for start in blocks:  # one `next` at a time under the interpreter's lock
                        self._read(connection, start)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read) for _ in range(CONNECTIONS)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return time.perf_counter() - began

    def _read(self, connection: http.client.HTTPConnection, start: int) -> None:
        end = min(start + BLOCK_BYTES, self._size_bytes)
        target = f"{self._parts.path}?{self._parts.query}"
        connection.request("GET", target, headers={"Range": f"bytes={start}-{end - 1}"})
        answer = connection.getresponse()
        if answer.status != 206:
            raise OSError(f"the server says {answer.status}")
        view = memoryview(self._buffer)[start:end]
        while view:
            count = answer.readinto(view)
            if not count:
                raise OSError(f"{len(view)} bytes are missing")
            view = view[count:]


class NotRunningError(Exception):
    """Run:ai's loader does not read from this server. (Its package for Azure accepts no connection string
    and only Azure's own endpoint. So it cannot read from Azurite. It knows neither the Hub nor plain web
    servers.)"""


class Runai:
    """Run:ai's loader, in another process."""

    def __init__(self, python: Path, stored: Stored) -> None:
        settings = {"RUNAI_STREAMER_CONCURRENCY": str(CONNECTIONS), "NO_PROXY": "127.0.0.1"}
        self._process = subprocess.Popen(
            [str(python), "-c", RUNAI],
            env={**os.environ, **settings, **stored.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._uri = stored.uri
        assert self._process.stdout is not None
        self._answers = self._process.stdout
        if self._answers.readline() != "ready\n":
            raise RuntimeError(
                f"{python} cannot import runai_model_streamer; install runai-model-streamer[s3,gcs,azure] "
                "for it"
            )

    def seconds(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._uri}\n")
        self._process.stdin.flush()
        answer = self._answers.readline()
        if not answer:
            raise NotRunningError("its process ended")
        return float(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Penstock:
    """A daemon that has loaded before: its memory was written to, and its connections are open."""

    def __init__(self, stored: Stored, size_bytes: int, *, verify: str = "auto") -> None:
        self._uri = stored.uri
        self._client = StreamerClient.embedded(
            size_bytes * 5 // 4 + (256 << 20),
            environment={**stored.environment, "NO_PROXY": "127.0.0.1"},
            object_concurrency=CONNECTIONS,
            object_block_size=BLOCK_BYTES,
            verify=verify,
        )

    def staged_seconds(self) -> float:
        self._client.evict(self._uri)
        began = time.perf_counter()
        self._client.prefetch(self._uri)
        return time.perf_counter() - began

    def loaded_seconds(self) -> float:
        self._client.evict(self._uri)
        began = time.perf_counter()
        with self._client.load(self._uri, owned=False) as load:
            for _ in load:
                pass
        return time.perf_counter() - began

    def close(self) -> None:
        self._client.close()


def measured(stored: Stored, size_bytes: int, rounds: int, runai_python: Path | None) -> list[str]:
    """A row of the table: medians in GB/s, and the ratios within rounds."""
    with contextlib.ExitStack() as stack:
        # One daemon for each: slabs that a client has held are replaced by fresh ones.
        unverified, stages, loads = (
            stack.enter_context(contextlib.closing(Penstock(stored, size_bytes, verify=verify)))
            for verify in ("off", "auto", "auto")
        )
        runs: dict[str, Callable[[], float]] = {
            "bare": Bare(stored.url, size_bytes).seconds,
            "unverified": unverified.staged_seconds,
            "staged": stages.staged_seconds,
            "loaded": loads.loaded_seconds,
        }
        if runai_python is not None:
            runs["runai"] = stack.enter_context(contextlib.closing(Runai(runai_python, stored))).seconds
        for name, run in list(runs.items()):  # warm-up
            try:
                run()
            except NotRunningError:
                del runs[name]
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds):
            for name, run in list(runs.items())[:: -1 if number % 2 else 1]:
                seconds[name].append(run())
    row = [stored.name]
    row += [f"{size_bytes / statistics.median(each) / 1e9:.2f}" for each in seconds.values()]
    if "runai" not in seconds:
        row.append("" if runai_python is None else "does not run")
    row.append(_ratio(seconds["bare"], seconds["unverified"]))
    row.append(_ratio(seconds["bare"], seconds["staged"]))
    row.append(_ratio(seconds["runai"], seconds["loaded"]) if "runai" in seconds else "")
    return row


def _ratio(others: Sequence[float], ours: Sequence[float]) -> str:
    each = [other / our for other, our in zip(others, ours, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compares each object store with a bare loop and with Run:ai's loader."
    )
    parser.add_argument("--size-mb", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runai-python", type=Path, help="Python of an environment with Run:ai's packages")
    parser.add_argument("--store", choices=STORES, action="append", help="only this one; repeatable")
    options = parser.parse_args()
    tensors = {f"t{number}": torch.rand(1 << 20) for number in range(max(1, options.size_mb // 4))}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        safetensors.torch.save_file(tensors, path)
        content = path.read_bytes()
    head = ["store", "bare loop", "daemon, off", "daemon, auto", "load", "Run:ai"]
    head += ["off / bare loop", "auto / bare loop", "load / Run:ai"]
    print(
        f"{len(content) / 1e6:.0f} MB, {options.rounds} rounds; medians in GB/s, ratios of rounds (range)\n"
    )
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name in options.store or STORES:
        with STORES[name](content) as stored:
            print(
                f"| {' | '.join(measured(stored, len(content), options.rounds, options.runai_python))} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
