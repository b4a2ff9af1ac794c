"""An HTTP answer with a time limit, and whose headers cost little.

http.client has a timeout for each read from the socket only, so a server that sends a byte now and then could
take for ever. It parses headers as those of an e-mail, which takes more processor time than all else that is
done in Python for a block.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import Iterable
from typing import Any

MAX_HEADER_BYTES = 64 << 10
"""Of one answer: its status and headers, and those of interim answers (`100 Continue`) before it. Stores send
some hundred bytes; http.client alone would take 6 MB, and any number of interim answers."""

_MAX_DIGITS = 19
"""Of the length of a body; Python refuses to read a number of thousands."""


class Response(http.client.HTTPResponse):
    """An answer whose headers must be few, and must all come within the connection's timeout."""

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self._timeout_seconds = sock.gettimeout()
        self._timed = _Timed(self.fp.detach())
        self.fp = io.BufferedReader(self._timed)
        # The stream reads ahead: what it holds of the body then does not count.
        self._timed.left_bytes = MAX_HEADER_BYTES + io.DEFAULT_BUFFER_SIZE
        self.hurry()

    def begin(self) -> None:
        """Reads status and headers (RFC 9112). Raises http.client.HTTPException."""
        status = http.client.CONTINUE
        while status == http.client.CONTINUE:
            version, status, reason = self._read_status()  # type: ignore[attr-defined]
            self.fields = Fields(http.client._read_headers(self.fp))  # type: ignore[attr-defined]
        if not version.startswith(("HTTP/1.", "HTTP/0.9")):
            raise http.client.UnknownProtocol(version)
        self.code = self.status = status
        self.reason = reason.strip()
        self.version = 11 if version.startswith("HTTP/1.") and version != "HTTP/1.0" else 10
        self.headers = self.msg = self.fields  # type: ignore[assignment]
        self.chunked = self.fields.get("transfer-encoding", "").lower() == "chunked"
        self.chunk_left = None
        self.length = None if self.chunked else self.fields.length()
        without_body = status < 200 or status in (http.client.NO_CONTENT, http.client.NOT_MODIFIED)
        if without_body or self._method == "HEAD":  # type: ignore[attr-defined]
            self.length = 0
        ends = self._check_close()  # type: ignore[attr-defined]
        self.will_close = ends or (self.length is None and not self.chunked)
        self._timed.until = self._timed.left_bytes = None

    def hurry(self) -> None:
        """From now on the bytes that are read must come within the timeout too."""
        if self._timeout_seconds is not None:
            self._timed.until = time.monotonic() + self._timeout_seconds

    def _read_next_chunk_size(self) -> int:
        """http.client would take a size below zero, and read all that follows at once."""
        size_bytes: int = super()._read_next_chunk_size()  # type: ignore[misc]
        if size_bytes < 0:
            raise http.client.HTTPException
        return size_bytes


class Fields(dict[str, str]):
    """Header fields by their names in lower case. One that came several times has one list of its values
    (RFC 9110, 5.3)."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        """`lines` as they came, the empty one at the end included. Raises http.client.HTTPException."""
        super().__init__()
        name = ""
        for line in lines:
            if not line.endswith(b"\n"):  # cut off: of a number there could be more digits
                raise http.client.HTTPException("the headers end early")
            text = line.decode("iso-8859-1").rstrip("\r\n")
            if not text:
                break
            if text[0] in " \t" and name:  # goes on with the last one, as was allowed once
                self[name] += f" {text.strip()}"
                continue
            name, colon, value = text.partition(":")
            if not colon or not name or name != name.strip():
                raise http.client.HTTPException("a header line is no header")
            name, value = name.lower(), value.strip()
            self[name] = f"{self[name]}, {value}" if name in self else value

    def length(self) -> int | None:
        """Of the body, if they say. Raises http.client.HTTPException for what is no number, and for two that
        differ."""
        said = (
            {text.strip() for text in self["content-length"].split(",")}
            if "content-length" in self
            else set()
        )
        if not said:
            return None
        if (
            len(said) > 1
            or not (text := said.pop()).isascii()
            or not text.isdigit()
            or len(text) > _MAX_DIGITS
        ):
            raise http.client.HTTPException("the length of the body is no number")
        return int(text)


class TooSlow(TimeoutError):
    """Some bytes came, but too few within the time limit."""


class _Timed(io.RawIOBase):
    """A raw stream that is read through, up to a time limit and a number of bytes."""

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
