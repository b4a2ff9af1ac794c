"""Which socket directory a client uses, and the paths in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.client import StreamerClient
from penstock.client.ring.socket_dir import socket_path


def test_the_socket_directory_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_SOCKET_DIR", raising=False)
    assert "/run/penstock" in repr(StreamerClient())
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", "/elsewhere")
    assert StreamerClient().socket_dir == Path("/elsewhere")
    assert StreamerClient("/here").socket_dir == Path("/here")
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", "")
    assert StreamerClient().socket_dir == Path("/run/penstock")


def test_an_empty_socket_directory_is_not_the_working_directory() -> None:
    with pytest.raises(ValueError, match="--socket-dir"):
        StreamerClient("")


def test_a_socket_path_that_linux_refuses_is_named(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 100)
    with pytest.raises(ValueError, match="107"):
        socket_path(directory, "handoff.sock")
