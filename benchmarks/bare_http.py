"""The best rate that a Python program gets over HTTP: ranged GETs on keep-alive connections, into memory that
was written to before.

The server is the one in $AWS_ENDPOINT_URL. Requests are not signed.
"""

import http.client
import mmap
import os
import ssl
import threading
from collections.abc import Sequence
from urllib.parse import urlsplit

_BUFFER_BYTES = 10**9


def object_bytes(uri: str) -> int:
    connection = _connect()
    connection.request("HEAD", _path(uri))
    answer = connection.getresponse()
    if answer.status != 200:
        raise OSError(f"{uri}: the server says {answer.status}")
    answer.read()
    connection.close()
    return int(answer.headers["Content-Length"])


class Loop:
    """Reads whole objects. Each thread reads the next block over its own connection, into a ring of 1 GB."""

    def __init__(self, uris: Sequence[str], *, threads: int, block_bytes: int) -> None:
        self._threads = threads
        self._blocks = [
            (_path(uri), start, min(start + block_bytes, size_bytes))
            for uri in uris
            for size_bytes in [object_bytes(uri)]
            for start in range(0, size_bytes, block_bytes)
        ]
        # No two threads write to the same place in the buffer at the same time.
        self._block_bytes = block_bytes
        self._places = max(_BUFFER_BYTES // block_bytes, threads)
        self._buffer = mmap.mmap(-1, self._places * block_bytes)
        self._buffer.madvise(mmap.MADV_HUGEPAGE)
        for position in range(0, len(self._buffer), mmap.PAGESIZE):
            self._buffer[position] = 1

    def run(self) -> None:
        pending = iter(enumerate(self._blocks))
        errors: list[BaseException] = []

        def read() -> None:
            connection = _connect()
            try:
                for number, block in pending:  # one `next` at a time under the interpreter's lock
                    self._read(connection, number, *block)
            except BaseException as error:
                errors.append(error)
            finally:
                connection.close()

        threads = [threading.Thread(target=read) for _ in range(self._threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _read(
        self, connection: http.client.HTTPConnection, number: int, path: str, start: int, end: int
    ) -> None:
        connection.request("GET", path, headers={"Range": f"bytes={start}-{end - 1}"})
        answer = connection.getresponse()
        if answer.status != 206:
            raise OSError(f"{path}: the server says {answer.status}")
        place = number % self._places * self._block_bytes
        view = memoryview(self._buffer)[place : place + end - start]
        while view:
            count = answer.readinto(view)
            if not count:
                raise OSError(f"{path}: {len(view)} bytes are missing")
            view = view[count:]


def _connect() -> http.client.HTTPConnection:
    endpoint = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    if endpoint.scheme == "https":
        context = ssl.create_default_context(cafile=os.environ["AWS_CA_BUNDLE"])
        return http.client.HTTPSConnection(endpoint.hostname or "", endpoint.port, context=context)
    return http.client.HTTPConnection(endpoint.hostname or "", endpoint.port)


def _path(uri: str) -> str:
    return f"/{uri.removeprefix('s3://')}"
