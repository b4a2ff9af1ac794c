"""Draws docs/status-page.png for the README: `make screenshot`, as root, in a minute.

The daemon is real, its loads are small and made up. The files are sparse, and only their names are those of
models.
"""

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import grpc
from tests.e2e.operation.browser import Browser
from tests.e2e.support import DaemonProcess, RawLoad, wait_until

MB = 1_000_000
TARGET = Path(__file__).parents[1] / "docs" / "status-page.png"
SIZE = (1200, 1262)
# The page shows the name of its host.
WRAPPER = ("unshare", "--uts", "sh", "-c", 'hostname gpu-node-1; exec "$@"', "sh")


def write(folder: Path, name: str, size_mb: int, tensor_mb: int = 4) -> Path:
    """A checkpoint of zeros."""
    ends = range(tensor_mb * MB, size_mb * MB + 1, tensor_mb * MB)
    header = {
        f"layers.{number}.weight": {
            "dtype": "U8",
            "shape": [tensor_mb * MB],
            "data_offsets": [end - tensor_mb * MB, end],
        }
        for number, end in enumerate(ends)
    }
    text = json.dumps(header).encode()
    path = folder / f"{name}.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + ends[-1])
    return path


def stream(load: RawLoad, segments: int, pause_seconds: float) -> None:
    """Takes that many segments from a window, at a pace that is visible in the chart."""
    for _ in range(segments):
        load.release(load.next("segment_ready").index + 1)
        time.sleep(pause_seconds)


@contextlib.contextmanager
def scene(daemon: DaemonProcess, folder: Path) -> Iterator[None]:
    """Checkpoints in every state."""
    large = write(folder, "qwen2.5-0.5b", 988)
    with contextlib.ExitStack() as stack, daemon.client() as client:
        client.prefetch(write(folder, "all-minilm-l6-v2", 92), pin=True)
        time.sleep(6)
        with RawLoad(daemon, write(folder, "bge-small-en-v1.5", 132), client_name="embedder") as warm:
            warm.next("manifest")
            warm.finish()
        with contextlib.suppress(grpc.RpcError), RawLoad(daemon, folder / "llama-3.safetensors") as missing:
            missing.next("manifest")
        time.sleep(9)
        with RawLoad(daemon, large, memory_limit_bytes=240 * MB, client_name="trainer") as whole:
            whole.next("manifest")
            stream(whole, 16, 0.9)
        held = stack.enter_context(RawLoad(daemon, write(folder, "smollm2-135m", 268), client_name="vllm"))
        held.next("manifest")
        held.finish()
        time.sleep(4)
        reading = stack.enter_context(
            RawLoad(daemon, large, memory_limit_bytes=240 * MB, client_name="sglang")
        )
        reading.next("manifest")
        stream(reading, 9, 1.1)
        yield


def main() -> None:
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        raise SystemExit("chromium or chromedriver is missing; install Debian's chromium and chromium-driver")
    chromium, driver = map(str, programs)
    with tempfile.TemporaryDirectory(prefix="models-") as models, contextlib.ExitStack() as stack:
        daemon = DaemonProcess(
            Path(models) / "s", "--memory-limit", "1GB", "--http-address", "127.0.0.1:0", wrapper=WRAPPER
        )
        stack.callback(daemon.kill)
        daemon.wait_ready()
        browser = Browser(chromium, driver)
        stack.callback(browser.close)
        browser.look(width=SIZE[0], height=SIZE[1])
        with scene(daemon, Path(models)):
            browser.open(f"http://{daemon.http_address}/")
            wait_until(lambda: browser.text("#updated") != "never", "the page to have asked")
            TARGET.write_bytes(browser.screenshot())


if __name__ == "__main__":
    main()
