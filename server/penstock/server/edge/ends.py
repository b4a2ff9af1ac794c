"""The two connections of a passage, as asyncio calls them. They decide nothing: `passage.py` does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .passage import Passage


class _End(asyncio.BufferedProtocol):
    def __init__(self, passage: Passage) -> None:
        self._passage = passage


class ClientEnd(_End):
    """The client's connection."""

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._passage.client_buffer()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._passage.client_made(transport)

    def buffer_updated(self, nbytes: int) -> None:
        self._passage.client_said(nbytes)

    def pause_writing(self) -> None:
        self._passage.client_full(True)

    def resume_writing(self) -> None:
        self._passage.client_full(False)

    def connection_lost(self, error: Exception | None) -> None:
        self._passage.client_lost()


class ServerEnd(_End):
    """The connection to gRPC."""

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._passage.server_buffer()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._passage.server_made(transport)

    def buffer_updated(self, nbytes: int) -> None:
        self._passage.server_said(nbytes)

    def pause_writing(self) -> None:
        self._passage.server_full(True)

    def resume_writing(self) -> None:
        self._passage.server_full(False)

    def connection_lost(self, error: Exception | None) -> None:
        self._passage.server_lost()
