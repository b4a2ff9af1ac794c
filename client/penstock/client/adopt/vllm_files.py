"""Files beside the weights of a model in object storage, for vLLM.

vLLM forks processes that load after it has read the configuration, and gRPC does not survive that. So the
fetch runs in a process of its own, which this module is when it is run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .. import errors
from ..client import StreamerClient
from ..system.interpreter import start_module

_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt")


def fetch_apart(socket_dir: str | os.PathLike[str], source: str) -> Path:
    """`fetch_model` in another process. Raises the same errors."""
    with open(2, "wb", closefd=False) as stderr:
        process = start_module(
            __name__,
            [os.fspath(socket_dir), source],
            stdout=subprocess.PIPE,
            stderr=stderr,
            environment=os.environ,
        )
    try:
        output, _ = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    said: dict[str, Any] = json.loads(output) if output else {}
    if "directory" in said:
        return Path(said["directory"])
    if "error" in said:
        raise getattr(errors, said["error"], OSError)(said["message"])
    raise errors.PenstockError(
        f"{source}: the process that fetches its files ended with {process.returncode}; see what it wrote to "
        "standard error"
    )


def fetch_model(client: StreamerClient, source: str) -> Path:
    """The directory with configuration, tokenizer and code of the model. Raises as `StreamerClient.fetch`.

    Weights of the layers that sentence-transformers adds are there too: vLLM reads these from the directory,
    and leaves out those that it lacks without an error.
    """
    directory = client.fetch(source)
    layers = _dense_layers(directory / "modules.json")
    if layers:
        directory = client.fetch(source, allow=[*_BESIDE_WEIGHTS, *(f"{layer}/" for layer in layers)])
    return directory


def _dense_layers(modules: Path) -> list[str]:
    """Directories of a model of sentence-transformers that hold such weights."""
    try:
        listed = json.loads(modules.read_bytes())
    except (FileNotFoundError, ValueError):  # vLLM reports a file that cannot be parsed
        return []
    named = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    paths = [str(one.get("path", "")) for one in named if str(one.get("type", "")).endswith(".Dense")]
    return [path for path in paths if path]


def _main(socket_dir: str, source: str) -> None:
    try:
        said = {"directory": str(fetch_model(StreamerClient(socket_dir), source))}
    except (errors.PenstockError, OSError) as error:
        said = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(said))


if __name__ == "__main__":
    _main(*sys.argv[1:])
