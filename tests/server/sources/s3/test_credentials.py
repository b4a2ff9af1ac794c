"""Credentials: how they are renewed, what is said without them, and that none is told."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from penstock.server.errors import (
    AccessDeniedError,
    SourceUnavailableError,
)
from penstock.server.sources.s3 import account

from ....ports import free_port
from ...objects import Asked, ObjectServer
from ...support import ROOT
from ..hooks import (
    CONTENT,
    KEY_ID,
    SECRET,
    Sources,
    always,
    lists,
    read,
)


@pytest.mark.parametrize("way", ["object", "prefix"])
def test_credentials_that_expired_and_were_written_anew_are_read_again(
    way: str, server: ObjectServer, sources: Sources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared = tmp_path / "credentials"
    text = f"[default]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET}\n"
    shared.write_text(text)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(shared))
    monkeypatch.setattr(account, "RENEW_SECONDS", 0.0)
    server.put("models/k", CONTENT)
    source = sources()
    expired = False

    def serve(asked: Asked) -> bool:
        if expired and f"={KEY_ID}/" in asked.headers["authorization"]:
            asked.fail(400, "ExpiredToken")
            return True
        return lists("models/", "models/k")(asked)

    def ask() -> None:
        if way == "object":
            assert read(source.open("s3://bucket/models/k", ROOT), 0, 9) == CONTENT[:9]
        else:
            assert source.list("s3://bucket/models/", ROOT) == ["k"]

    server.hooks.append(serve)
    ask()
    expired = True
    with pytest.raises(AccessDeniedError, match=r"s3://bucket/models/.*ExpiredToken.*REQ1.*refresh them"):
        ask()
    shared.write_text(text.replace(KEY_ID, "AKIDRENEWED"))
    ask()
    asked = len(server.asked)
    ask()
    assert all("=AKIDRENEWED/" in later.headers["authorization"] for later in server.asked[asked:])


@pytest.mark.parametrize("way", ["object", "prefix"])
def test_a_store_that_calls_every_new_token_expired_is_not_asked_for_ever(
    way: str, server: ObjectServer, sources: Sources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with a clock that is far off, and credentials that are made anew whenever they are read."""
    shared = tmp_path / "credentials"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(shared))
    monkeypatch.setattr(account, "RENEW_SECONDS", 0.0)

    def write() -> None:
        key_id = f"AKID{len(server.asked)}"
        shared.write_text(f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = {SECRET}\n")

    def expire(asked: Asked) -> None:
        if len(server.asked) > 20:
            asked.fail(403, "AccessDenied")
            return
        write()
        asked.fail(400, "ExpiredToken")

    write()
    server.hooks.append(always(expire))
    source = sources()
    ask = source.open if way == "object" else source.list
    with pytest.raises(AccessDeniedError, match=r"s3://bucket/models/.*ExpiredToken.*REQ1.*refresh them"):
        ask("s3://bucket/models/", ROOT)
    assert len(server.asked) == 3


def test_without_credentials_the_error_says_how_to_do_without(
    server: ObjectServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDeniedError, match="--s3-unsigned"):
        sources().open("s3://bucket/k", ROOT)
    assert not server.asked


def test_a_password_in_the_endpoint_is_told_to_nobody(
    server: ObjectServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def know_no_name(host: str, *more: Any, **named: Any) -> Any:
        """A resolver may know them, or take long to say that it does not."""
        if host != "127.0.0.1":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", know_no_name)
    closed = f"127.0.0.1:{free_port()}"
    for endpoint, said in {
        f"http://user:secretword@{closed}": closed,
        "http://user:secretword@not a host": "not a host",
        "http://user:/secretword@host": "host",
        "http://user:secretword@host:port": "host:port",
    }.items():
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        source = sources()
        for ask in (source.open, source.list):
            with pytest.raises(SourceUnavailableError, match=said) as caught:
                ask("s3://bucket/k", ROOT)
            assert "secretword" not in str(caught.value)
    server.put("k", CONTENT)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url.replace("//", "//user:secretword@"))
    sources().open("s3://bucket/k", ROOT)
    assert "secretword" not in str(server.asked[0].headers)
