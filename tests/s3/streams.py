"""What comes out of a streamer, in words that compare: of penstock's in this process, of Run:ai's in another.

Run:ai's client of S3 takes endpoint and credentials from the environment, of which the tests' own process has
none. Run as a program, this file is that other process: it answers each line of JSON with one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..e2e.programs import digest
from ..e2e.support import DEADLINE_SECONDS

ROOT = Path(__file__).parents[2]
IN_ORDER = {"RUNAI_STREAMER_CONCURRENCY": "1", "RUNAI_STREAMER_RING_BUFFERS": "1"}
"""Run:ai yields what was read first, which is in order if it reads one thing at a time."""


@dataclass(frozen=True)
class Outcome:
    found: tuple[Any, ...] = ()
    """Names and digests of tensors in the order in which they came, or what was listed."""
    raised: tuple[str, ...] = ()
    """The exception's class and its bases; empty where nothing was raised."""
    message: str = ""


@dataclass(frozen=True)
class Streamers:
    """A package that has `SafetensorsStreamer`, `list_safetensors` and a class of credentials."""

    package: str
    credentials: str

    def stream(self, paths: Any, **options: Any) -> Outcome:
        return self._outcome(self._stream, paths, options)

    def listing(self, path: str, **options: Any) -> Outcome:
        return self._outcome(self._listing, path, options)

    def _stream(self, paths: Any, options: Mapping[str, Any]) -> list[Any]:
        with importlib.import_module(self.package).SafetensorsStreamer() as streamer:
            stream = streamer.stream_file if isinstance(paths, str) else streamer.stream_files
            stream(paths, **options)
            return [(name, digest(tensor)) for name, tensor in streamer.get_tensors()]

    def _listing(self, path: str, options: Mapping[str, Any]) -> list[Any]:
        return list(importlib.import_module(self.package).list_safetensors(path, **options))

    def _outcome(
        self, call: Callable[[Any, Mapping[str, Any]], list[Any]], what: Any, options: Any
    ) -> Outcome:
        given = dict(options)
        if "s3_credentials" in given:
            module, _, name = self.credentials.rpartition(".")
            given["s3_credentials"] = getattr(importlib.import_module(module), name)(
                **given["s3_credentials"]
            )
        try:
            return Outcome(found=tuple(call(what, given)))
        except Exception as error:
            classes = tuple(base.__name__ for base in type(error).__mro__)
            return Outcome(raised=classes, message=str(error))


PENSTOCK = Streamers("penstock.client", "penstock.client.S3Credentials")
RUNAI = Streamers("runai_model_streamer", "runai_model_streamer.s3_utils.s3_utils.S3Credentials")


class RunaiProcess:
    """Run:ai's streamer with an environment of its own, until `close`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.s3.streams"],
            cwd=ROOT,
            env={**os.environ, **IN_ORDER, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def stream(self, paths: Any, **options: Any) -> Outcome:
        return self._ask("stream", paths, options)

    def listing(self, path: str, **options: Any) -> Outcome:
        return self._ask("listing", path, options)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            assert self._process.wait(DEADLINE_SECONDS) == 0
        finally:
            self._process.kill()
            self._process.stdout.close()

    def _ask(self, call: str, what: Any, options: Mapping[str, Any]) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([call, what, options]), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        found = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in answer["found"])
        return Outcome(found, tuple(answer["raised"]), answer["message"])


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # only answers go there
        for line in sys.stdin:
            call, what, options = json.loads(line)
            outcome: Outcome = getattr(RUNAI, call)(what, **options)
            print(json.dumps(asdict(outcome)), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
