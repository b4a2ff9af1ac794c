"""An HTTP answer that cannot be drawn out for ever: http.client has a timeout for each read from the socket,
and begins it anew with every byte."""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any

MAX_HEADER_BYTES = 64 << 10
"""Of one answer: its status and headers, and those of interim answers (`100 Continue`) before it. Stores send
some hundred bytes; http.client alone would take 6 MB, and any number of interim answers."""


class Response(http.client.HTTPResponse):
    """One whose headers must be few and come within the connection's timeout, however slowly byte by byte."""

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self._timeout_seconds = sock.gettimeout()
        self._timed = _Timed(self.fp.detach())
        self.fp = io.BufferedReader(self._timed)
        # The stream reads ahead: what it holds of the body then does not count.
        self._timed.left_bytes = MAX_HEADER_BYTES + io.DEFAULT_BUFFER_SIZE
        self.hurry()

    def begin(self) -> None:
        super().begin()
        self._timed.until = self._timed.left_bytes = None

    def hurry(self) -> None:
        """What is read from now on must come within the timeout too."""
        if self._timeout_seconds is not None:
            self._timed.until = time.monotonic() + self._timeout_seconds

    def _read_next_chunk_size(self) -> int:
        """http.client would take a size below zero, and read all that follows at once."""
        size_bytes: int = super()._read_next_chunk_size()  # type: ignore[misc]
        if size_bytes < 0:
            raise http.client.HTTPException
        return size_bytes


class TooSlow(TimeoutError):
    """Bytes came, and not all that should have come by now."""


class _Timed(io.RawIOBase):
    """Another raw stream, read until a time, and up to a number of bytes."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.until: float | None = None
        self.left_bytes: int | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.until is not None and time.monotonic() > self.until:
            raise TooSlow
        if self.left_bytes is not None and self.left_bytes <= 0:
            raise http.client.HTTPException
        count = self._raw.readinto(buffer)
        if self.left_bytes is not None:
            self.left_bytes -= count or 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
