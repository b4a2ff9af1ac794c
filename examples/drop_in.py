"""What is written for the Run:ai Model Streamer, with its import changed.

python examples/drop_in.py /models/llama-3-8b
"""

import sys

from penstock.client import SafetensorsStreamer, list_safetensors

paths = list_safetensors(sys.argv[1])
with SafetensorsStreamer() as streamer:
    streamer.stream_files(paths)
    for name, tensor in streamer.get_tensors():
        print(f"{name}: {tensor.dtype} {tuple(tensor.shape)}")
