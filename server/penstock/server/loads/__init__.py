"""The stories: a load, a prefetch, and the way into the staging buffer that they share.

A story is told in events, which the edge puts on the wire. Here is no protobuf, no socket and no thread of
its own; who the caller is comes in by a protocol (`request.Caller`).

Start with `load`, which reads from top to bottom; `request` is what it is given, `admission` resolves,
chooses and admits; `control` decides who may and how many at once, and counts what came of it.

May import: staging, checkpoint, sources, config, system.
"""
