"""From the mapped slabs to a CUDA device.

transfer   moves tensors ahead of those that are yielded: start here
placement  where tensors lie on the device, and how they are batched (pure)
pinned     the pinned buffers of a load
device     the only file that touches torch.cuda

May import: `ring`.
"""
