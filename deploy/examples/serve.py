"""Stands for an inference server: loads $MODEL through penstock, then says over HTTP what it has.

`/healthz`, for probes, answers once everything is loaded; `/` reads every byte first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from penstock.client import StreamerClient


def main() -> None:
    # The first process of a container ignores SIGTERM without a handler, and is killed after its grace.
    # It leaves without a farewell because nothing needs one, and a thread may be in the middle of a sum.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    import torch  # takes seconds, in which the signal may come

    source = os.environ["MODEL"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.monotonic()
    state = StreamerClient().load_state_dict(source, device=device)
    loaded = {
        "source": source,
        "device": device,
        "tensors": len(state),
        "bytes": sum(tensor.nbytes for tensor in state.values()),
        "seconds": round(time.monotonic() - began, 3),
    }
    print(json.dumps(loaded), file=sys.stderr, flush=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/healthz":
                self.answer(loaded)
            elif self.path == "/":
                # Sums read every byte, as a forward pass would.
                sums = {name: float(tensor.double().sum()) for name, tensor in state.items()}
                self.answer({**loaded, "sums": sums})
            else:
                self.send_error(404)

        def answer(self, said: dict[str, Any]) -> None:
            body = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Probes are not worth a line each."""

    ThreadingHTTPServer(("", 8000), Handler).serve_forever()


if __name__ == "__main__":
    main()
