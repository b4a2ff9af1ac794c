"""`pull_files` and `ObjectStorageModel` with the interface of runai_model_streamer 0.17, served by a penstock
daemon: they copy whole files of an object store, weights included, into a directory of the caller's.

Unlike in that library, no file is visible before all of them are complete.
"""

from __future__ import annotations

import fcntl
import fnmatch
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from .. import errors
from .ambient import S3Credentials, ambient_client
from .run_ai import OBJECT_SCHEMES, _as_value_error

SENTINEL_NAME = ".runai_complete"
"""Marks a complete directory, by the name that processes of the other library look for."""
_MAX_BYTES, _MAX_FILES = 1 << 62, 100_000
_TOKEN = re.compile(r"\[!?\]?[^\]]*\]|.", re.DOTALL)
"""One element of a pattern: a class of characters, or a character."""


def pull_files(
    model_path: str,
    dst: str,
    allow_pattern: list[str] | None = None,
    ignore_pattern: list[str] | None = None,
    s3_credentials: Any = None,
) -> None:
    """Copies the files below the prefix `model_path` of an object store into the directory `dst`, beside its
    files. Does nothing if there is nothing to copy.

    allow_pattern, ignore_pattern: match whole keys, as in a shell, but `*` matches `/` too; None takes all.
    s3_credentials: as in `SafetensorsStreamer.stream_files()`.

    Raises NotImplementedError for a path, ValueError for requests that are refused or objects that cannot be
    read, OSError if `dst` cannot be written, DaemonUnavailableError if no daemon answers.
    """
    if not model_path.startswith(OBJECT_SCHEMES):
        raise NotImplementedError(
            f"pull_files of {model_path[:200]!r}, which is no URI of an object store, is not implemented; "
            "copy the files, or call StreamerClient.fetch"
        )
    base = _base(model_path)
    allow = ["*"] if allow_pattern is None else list(_relative(allow_pattern, base))
    if not allow:
        return
    client = ambient_client(S3Credentials.for_source(model_path, s3_credentials))
    try:
        with _as_value_error():
            client.fetch_into(
                os.path.join(model_path, ""),
                dst,
                allow=allow,
                ignore=list(_relative(ignore_pattern or (), base)) or None,
                max_bytes=_MAX_BYTES,
                max_files=_MAX_FILES,
            )
    except ValueError as error:
        cause = error.__cause__
        if not isinstance(cause, errors.CheckpointNotFoundError) or "bucket" in cause.details:
            raise


class ObjectStorageModel:
    """A copy of a model's files that processes share. The first process pulls the files; the others wait and
    have nothing left to do. A context manager.

        with ObjectStorageModel(model_path=uri, dst=directory) as model:
            model.pull_files(ignore_pattern=["*.safetensors"])

    `dir` is the directory. After a block that ended without an exception it is complete and stays so. After
    any other block the next process begins anew.
    """

    SENTINEL_NAME = SENTINEL_NAME

    def __init__(self, model_path: str, dst: str, s3_credentials: Any = None) -> None:
        """Waits for processes that pull to the same `dst`, and removes the remains of one that failed."""
        if not model_path.startswith(OBJECT_SCHEMES):
            raise ValueError(
                f"model_path {model_path[:200]!r} is no URI of an object store; give one that begins with "
                f"{', '.join(OBJECT_SCHEMES)}"
            )
        self.dir = dst.rstrip("/") or "/"
        self._model_path = os.path.join(model_path, "")
        self._s3_credentials = s3_credentials
        self._sentinel = os.path.join(self.dir, SENTINEL_NAME)
        # The same lock as in the other library's processes.
        self._lock: int = os.open(f"{self.dir}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._complete = os.path.exists(self._sentinel)
            if not self._complete:
                shutil.rmtree(self.dir, ignore_errors=True)
                os.makedirs(self.dir, exist_ok=True)
            else:
                fcntl.flock(self._lock, fcntl.LOCK_SH)
        except BaseException:
            self._unlock()
            raise

    def pull_files(
        self, allow_pattern: list[str] | None = None, ignore_pattern: list[str] | None = None
    ) -> None:
        """`pull_files()` to the directory, unless it is complete already."""
        if not self._complete:
            pull_files(self._model_path, self.dir, allow_pattern, ignore_pattern, self._s3_credentials)

    def __enter__(self) -> ObjectStorageModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._complete:
                if not os.listdir(self.dir):
                    raise RuntimeError(
                        f"no files of {self._model_path} were copied to {self.dir}; check the URI "
                        "and the patterns"
                    )
                with open(self._sentinel, "w"):
                    self._complete = True
        finally:
            self._unlock()

    def __del__(self) -> None:
        self._unlock()

    def _unlock(self) -> None:
        lock, self._lock = getattr(self, "_lock", -1), -1
        if lock >= 0:
            os.close(lock)


def _base(model_path: str) -> str:
    """The beginning of all keys below: the prefix without its bucket, ending in `/` unless it is empty."""
    _, _, key = model_path.partition("://")[2].partition("/")
    return key.rstrip("/") + "/" if key.rstrip("/") else ""


def _relative(patterns: Sequence[str], base: str) -> Iterator[str]:
    """Patterns for the part of a key after `base`. Together they match exactly the parts for which the whole
    key matches one of `patterns`."""
    found: dict[str, None] = {}
    for pattern in patterns:
        tokens = _TOKEN.findall(pattern)
        for count in range(len(tokens) + 1):
            if tokens[:count][-1:] == ["*"]:
                continue  # a pattern with the star here matches all that the pattern without it would
            before, rest = "".join(tokens[:count]), tokens[count:]
            starred = rest[:1] == ["*"]
            if fnmatch.fnmatchcase(base, before + ("*" if starred else "")):
                found["".join(rest)] = None
    # A pattern that ends in a slash matches no file; to the daemon it would mean all names below.
    yield from (pattern for pattern in found if pattern and not pattern.endswith("/"))
