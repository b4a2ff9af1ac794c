"""Loads a checkpoint through the daemon in $PENSTOCK_SOCKET_DIR (or /run/penstock), and says what is in it.

python examples/load.py /models/llama-3-8b
"""

import sys

from penstock.client import StreamerClient

with StreamerClient() as client, client.load(sys.argv[1], progress=sys.stderr.isatty()) as load:
    for name, tensor in load:
        print(f"{name}: {tensor.dtype} {tuple(tensor.shape)}")
print(f"{load.stats.tensors} tensors, {load.stats.bytes} bytes, {load.stats.seconds:.2f} s")
