"""Buckets with checkpoints, daemons that read them, and what tests ask of both."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch

from penstock.client import errors

from ..e2e.support import DaemonProcess, random_tensors, same
from .moto import ACCESS_KEY, REGION, SECRET_KEY, MotoServer

MIB = 1 << 20
BLOCK_BYTES = 64 << 10
RETRIES = 3

FLAGS = (
    *("--memory-limit", "64MiB", "--object-block-size", str(BLOCK_BYTES)),
    *("--object-retries", str(RETRIES)),
)
"""Small blocks, so that a small object has many, and few attempts."""

IMPATIENT = ("--object-timeout", "2")
"""Where storage stalls. Elsewhere a machine that is slow for a moment would look as if it did."""

# Of every daemon's credentials, and of signatures.
SECRETS = [ACCESS_KEY, SECRET_KEY, "X-Amz-Signature", "Signature=", "AWS4-HMAC", "SESSIONTOKEN"]

ODD_KEYS = [
    "with space.safetensors",
    "a+b.safetensors",
    "100%.safetensors",
    "%2F%20encoded.safetensors",
    "hash#fragment.safetensors",
    "question?mark.safetensors",
    "equals=and&ampersand.safetensors",
    "größe-模型-🙂.safetensors",
    "dots/./and/../more.safetensors",
    "@at:colon$dollar!bang*star.safetensors",
]
"""That have to be escaped, or must not be."""

Tensors = dict[str, torch.Tensor]


def environment(endpoint: str, **more: str) -> dict[str, str]:
    """Of a daemon that has the tests' credentials as variables."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": REGION,
        **more,
    }


class Bucket:
    """A bucket of moto's."""

    def __init__(self, moto: MotoServer, name: str, *, region: str = REGION, versioned: bool = False) -> None:
        self.name = name
        self._client = moto.client(region=region)
        location = {"CreateBucketConfiguration": {"LocationConstraint": region}}
        self._client.create_bucket(Bucket=name, **({} if region == "us-east-1" else location))
        if versioned:
            self._client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})

    def uri(self, key: str = "") -> str:
        return f"s3://{self.name}/{key}"

    def put(self, key: str, body: bytes, **options: Any) -> str:
        """Its version, or an empty text in a bucket without versions."""
        answer = self._client.put_object(Bucket=self.name, Key=key, Body=body, **options)
        return str(answer.get("VersionId", ""))

    def put_tensors(self, key: str, tensors: Tensors, **options: Any) -> str:
        return self.put(key, safetensors.torch.save(tensors), **options)

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self.name, Key=key)

    def put_random(self, key: str, *, mib: int = 1, seed: int = 0, **options: Any) -> Tensors:
        """Four tensors for a MiB: sixteen blocks of the tests' daemons."""
        tensors = random_tensors(4 * mib, MIB // 16, seed=seed)
        self.put_tensors(key, tensors, **options)
        return tensors


def load_and_compare(daemon: DaemonProcess, source: str | list[str], tensors: Tensors) -> None:
    with daemon.client() as client, client.load(source) as load:
        same(load, tensors)


def refused(
    daemon: DaemonProcess, source: str | list[str], kind: type[errors.PenstockError], *parts: str
) -> str:
    """The message with which a load fails, which has to hold all parts and no secret."""
    with daemon.client() as client, pytest.raises(kind) as caught:
        client.load_state_dict(source)
    message = str(caught.value)
    for part in parts:
        assert part.lower() in message.lower(), message
    assert_no_secret(message, str(caught.value.details))
    return message


def assert_no_secret(*texts: str, secrets: list[str] | None = None) -> None:
    for text in texts:
        for secret in [*SECRETS, *(secrets or [])]:
            assert secret not in text, text
