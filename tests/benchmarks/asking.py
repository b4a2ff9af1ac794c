"""Requests to the store of a fleet, as a daemon sends them."""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.fleet_store import FleetStore

OBJECT = "/bench/m/model.safetensors"
LISTING = "/bench?list-type=2&prefix=m/&delimiter=%2F"


@dataclass(frozen=True, slots=True)
class Answered:
    status: int
    etag: str
    body: bytes


def ask(store: FleetStore, method: str, target: str, proxy: str = "", node: int = 3, **more: str) -> Answered:
    """`more` are headers, with `_` for `-`. A proxy is asked for the whole URL."""
    connection = http.client.HTTPConnection(urlsplit(proxy or store.endpoint).netloc, timeout=60)
    key = store.environment(node)["AWS_ACCESS_KEY_ID"]
    headers = {"Authorization": f"AWS4-HMAC-SHA256 Credential={key}/20260101/us-east-1/s3/aws4_request"}
    headers |= {name.replace("_", "-"): value for name, value in more.items()}
    try:
        connection.request(method, f"{store.endpoint}{target}" if proxy else target, headers=headers)
        answer = connection.getresponse()
        return Answered(answer.status, answer.headers.get("ETag", ""), answer.read())
    finally:
        connection.close()
