"""moto's S3, STS and IAM as a process, and what tests put there.

What moto verifies. By default nothing: any credentials do, and anonymous requests get objects that are
public. With `verified()` it recomputes the signature of every request that carries an Authorization header,
knows the keys of IAM users and of assumed roles with their session tokens, and applies their policies; it
does not know presigned URLs then, and never looks at expiry or at the clock. `signatures.py` checks what it
does not.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import boto3
from botocore.config import Config

from ..e2e.support import DEADLINE_SECONDS, wait_until

ACCESS_KEY, SECRET_KEY = "AKIAPENSTOCKTESTS000", "penstock-tests-secret/with+signs"
REGION = "eu-central-1"


class MotoServer:
    """Listens on a free port of the loopback until `close`."""

    def __init__(self) -> None:
        self._clients: dict[tuple[str, str], Any] = {}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.s3.moto_program"],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self.port = int(wait_until(self._listening_port, "moto to listen"))
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def client(self, service: str = "s3", region: str = REGION) -> Any:
        """A boto3 client with the tests' own credentials; always the same, as to make one takes long."""
        if (service, region) not in self._clients:
            self._clients[service, region] = boto3.client(
                service,
                endpoint_url=self.endpoint,
                region_name=region,
                aws_access_key_id=ACCESS_KEY,
                aws_secret_access_key=SECRET_KEY,
                config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
            )
        return self._clients[service, region]

    @contextlib.contextmanager
    def verified(self) -> Iterator[None]:
        """Signatures and policies are verified meanwhile."""
        self._count_unverified("0")
        try:
            yield
        finally:
            self._count_unverified("inf")

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        self._process.terminate()
        self._process.wait(DEADLINE_SECONDS)
        self._log.close()

    def _count_unverified(self, count: str) -> None:
        headers = {"Content-Type": "text/plain"}
        url = f"{self.endpoint}/moto-api/reset-auth"
        request = urllib.request.Request(url, data=count.encode(), headers=headers)
        with urllib.request.urlopen(request) as answer:
            answer.read()

    def _listening_port(self) -> str | None:
        if self._process.poll() is not None:
            raise AssertionError(f"moto ended:\n{self._said()}")
        found = re.search(r"^port (\d+)$", self._said(), re.MULTILINE)
        return found[1] if found else None

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")
