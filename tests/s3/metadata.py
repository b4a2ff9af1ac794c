"""What hands out credentials where a daemon runs: of a container, of an instance, of single sign-on."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SSO_TOKEN = "penstock-sso-access-token"
CONTAINER_TOKEN = "penstock-container-token"


@dataclass(frozen=True, slots=True)
class Keys:
    access_key: str
    secret: str
    token: str


class MetadataServer:
    """Listens on the loopback until `close`. Its answers are valid for a minute, so that botocore, which
    renews what ends within ten, asks again for every request that it signs."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        """What it hands out; tests set it anew."""
        self.asked: list[str] = []
        """Paths, in order."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                answer = outer._answer(self.path, dict(self.headers))
                self.send_response(404 if answer is None else 200)
                body = (answer or "").encode()
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_PUT = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, path: str, headers: dict[str, str]) -> str | None:
        keys, ends = self.keys, datetime.now(timezone.utc) + timedelta(minutes=1)
        found = {
            "AccessKeyId": keys.access_key,
            "SecretAccessKey": keys.secret,
            "Token": keys.token,
            "Expiration": ends.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        if path == "/container" and headers.get("Authorization") == CONTAINER_TOKEN:
            return json.dumps(found)
        role = "/latest/meta-data/iam/security-credentials/"
        if path == "/latest/api/token":
            return "imds-token"
        if path == role:
            return "node-role"
        if path == f"{role}node-role":
            return json.dumps({**found, "Code": "Success", "Type": "AWS-HMAC"})
        if path.startswith("/federation/credentials?") and headers.get("x-amz-sso_bearer_token") == SSO_TOKEN:
            role_keys = {
                "accessKeyId": keys.access_key,
                "secretAccessKey": keys.secret,
                "sessionToken": keys.token,
                "expiration": int(ends.timestamp() * 1000),
            }
            return json.dumps({"roleCredentials": role_keys})
        return None
