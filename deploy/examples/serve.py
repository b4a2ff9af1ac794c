"""Stands for an inference server: loads $MODEL through penstock, then says over HTTP what it has."""

from __future__ import annotations

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from penstock.client import StreamerClient


def main() -> None:
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
            # Sums read every byte, as a forward pass would.
            sums = {name: float(tensor.double().sum()) for name, tensor in state.items()}
            body = json.dumps({**loaded, "sums": sums}).encode()
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
