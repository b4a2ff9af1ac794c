"""A stand-in for Microsoft Entra ID, which gives tokens for Azure."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .objects import Asked, ObjectServer

TENANT, CLIENT = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"


class Entra:
    """On these servers: the authority, and the node's own address for managed identities."""

    def __init__(
        self,
        *servers: ObjectServer,
        mint: Callable[[int, int], str] = lambda number, _: f"eyJ.secret-{number}",
    ) -> None:
        """`mint` makes a token of its number and of the second in which it ends."""
        self.mint = mint
        self.url = servers[-1].url
        """Of the authority: the last server."""
        self.issued: list[str] = []
        self.expires_in = 3600
        self.asked: list[tuple[Asked, str]] = []
        """With the bodies."""
        self.refusal: tuple[int, dict[str, Any]] | None = None
        for server in servers:
            server.hooks.append(self._answer)

    def _answer(self, asked: Asked) -> bool:
        if "token" not in asked.target:
            return False
        body = asked.handler.rfile.read(int(asked.headers.get("content-length", "0"))).decode()
        self.asked.append((asked, body))
        if self.refusal is not None:
            status, answer = self.refusal
        else:
            ends = int(time.time()) + self.expires_in
            self.issued.append(self.mint(len(self.issued), ends))
            status, answer = (
                200,
                {
                    "access_token": self.issued[-1],
                    "expires_in": self.expires_in,
                    "expires_on": str(ends),
                    "token_type": "Bearer",
                    "resource": "https://storage.azure.com",
                },
            )
        asked.answer(status, json.dumps(answer).encode(), Content_Type="application/json")
        return True


def of_workload_identity(directory: Path) -> dict[str, str]:
    """The variables that AKS' webhook sets, and the file that it mounts."""
    (directory / "projected").write_text("a.token.of.kubernetes")
    return {
        "AZURE_FEDERATED_TOKEN_FILE": str(directory / "projected"),
        "AZURE_TENANT_ID": TENANT,
        "AZURE_CLIENT_ID": CLIENT,
    }


def json_web_token(number: int, ends: int, *, audience: str = "https://storage.azure.com") -> str:
    """A token as Entra makes them, but with a signature that is none."""
    claims = {
        "aud": audience,
        "iss": f"https://sts.windows.net/{TENANT}/",
        "iat": ends - 7200,
        "nbf": ends - 7200,
        "exp": ends,
        "uti": str(number),
    }
    parts = [json.dumps(part).encode() for part in ({"alg": "RS256", "typ": "JWT"}, claims)]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (*parts, b"no signature"))
