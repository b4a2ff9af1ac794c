"""`vllm serve`, as users start it: a command, an HTTP port, a restart."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ...e2e.support import DaemonProcess
from ...ports import free_port
from .agreed import ENVIRONMENT, PROMPTS, TOKENS
from .conftest import PATIENCE_SECONDS, Engines, auto

START_SECONDS = 500.0
"""For three interpreters, one after the other, that import vLLM on a busy machine."""


class Server:
    """`vllm serve` with a model; ends with its `with` block."""

    def __init__(self, log: Path, model: Path | str, *flags: str, **variables: str) -> None:
        self._log = log
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), *flags]
        self._command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--enforce-eager",
            "--max-model-len=128",
        ]
        self._command += ["--max-num-seqs=4", "--kv-cache-memory-bytes=33554432"]
        self._variables = variables

    def __enter__(self) -> Server:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment = {**inherited, **ENVIRONMENT, **self._variables}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE_SECONDS)
        finally:
            self.process.kill()
            self.process.wait()

    def log(self) -> str:
        return self._log.read_text()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{self._url}/health"):
                return
            time.sleep(0.1)
        raise AssertionError(self.log())

    def complete(self, prompt: str, **more: str) -> list[int]:
        """The tokens with which it goes on."""
        asked = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **more}
        body = json.dumps({**asked, "return_token_ids": True}).encode()
        request = urllib.request.Request(
            f"{self._url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            found: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return found


@pytest.fixture
def plugin_flags(daemon: DaemonProcess) -> list[str]:
    extra = json.dumps({"socket_dir": str(daemon.socket_dir)})
    return ["--load-format=penstock", f"--model-loader-extra-config={extra}"]


@pytest.mark.timeout(600)  # four interpreters, each of which imports vLLM
def test_a_server_answers_and_after_a_restart_nothing_is_read(
    engines: Engines,
    daemon: DaemonProcess,
    models: dict[str, Path],
    plugin_flags: list[str],
    tmp_path: Path,
) -> None:
    expected = engines.run(models["qwen2"], auto())["tokens"]
    read_bytes = []
    for start in ("first", "second"):
        with Server(tmp_path / start, models["qwen2"], *plugin_flags) as server:
            server.wait_ready()
            assert [server.complete(prompt) for prompt in PROMPTS] == expected
        assert "Loading weights took " in server.log()
        daemon.wait_idle()
        read_bytes.append(daemon.read_bytes())
    assert read_bytes[0] == read_bytes[1]
