"""An HTTP answer with a time limit. http.client has a timeout for each read from the socket only, so a server
that sends a byte now and then could take for ever."""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any


class Response(http.client.HTTPResponse):
    """An answer whose headers must all come within the connection's timeout."""

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self._timeout_seconds = sock.gettimeout()
        self._timed = _Timed(self.fp.detach())
        self.fp = io.BufferedReader(self._timed)
        self.hurry()

    def begin(self) -> None:
        super().begin()
        self._timed.until = None

    def hurry(self) -> None:
        """From now on the bytes that are read must come within the timeout too."""
        if self._timeout_seconds is not None:
            self._timed.until = time.monotonic() + self._timeout_seconds


class TooSlow(TimeoutError):
    """Some bytes came, but too few within the time limit."""


class _Timed(io.RawIOBase):
    """A raw stream that is read through, up to a time limit."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.until: float | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.until is not None and time.monotonic() > self.until:
            raise TooSlow
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()
