"""Builds a module without memory of its own and fills it through the daemon.

python examples/load_into.py linear.safetensors     # with the tensors `weight` and `bias`
"""

import sys

import torch

from penstock.client import StreamerClient

client = StreamerClient()
names = {}
with client.load(sys.argv[1]) as load:
    for name, tensor in load:
        names[name] = tensor.shape
outputs, inputs = names["weight"]

with torch.device("meta"):
    module = torch.nn.Linear(inputs, outputs)
client.load_into(module, sys.argv[1], dtype=torch.float32)
print(module, module.weight.device, float(module.weight.detach().sum()))
