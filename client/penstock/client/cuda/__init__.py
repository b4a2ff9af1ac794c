"""From the mapped slabs to a CUDA device.

`device` is the only file that touches torch.cuda. Start with `transfer`.

May import: `ring`.
"""
