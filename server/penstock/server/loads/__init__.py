"""Loads and prefetches, from the request to the end, and their common way into the staging buffer.

They report by events, which the edge puts on the wire. There is no protobuf, no socket and no thread here.
The caller comes in by a protocol (`request.Caller`).

Start with `load`, which reads from top to bottom. `request` is its input,
`admission` resolves, chooses and admits. `control` decides
who may load, pin and evict, and how many loads run at once, and counts their results. `warm/` keeps what
an operator's file names warm.

May import: staging, checkpoint, sources, config, system.
"""
