"""Stages a checkpoint before anybody asks for it, loads it, and shows what the daemon holds.

python examples/prefetch.py /models/llama-3-8b
"""

import sys

from penstock.client import StreamerClient

with StreamerClient() as client:
    client.prefetch(sys.argv[1], pin=True)
    with client.load(sys.argv[1]) as load:
        tensors = dict(load)
    print(f"{len(tensors)} tensors, read from storage for this load: {load.stats.read_bytes} bytes")
    for stage in client.status()["stages"]:
        print(
            f"{stage['sources']}: {stage['state']}, {stage['ready_bytes']} bytes, pinned: {stage['pinned']}"
        )
    del tensors  # they are views of the staging buffer, and hold it
    client.evict(sys.argv[1])
