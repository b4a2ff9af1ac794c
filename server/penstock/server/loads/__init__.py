"""Loads and prefetches, from the request to the end, and their common way into the staging buffer.

They report by events, which the edge puts on the wire. There is no protobuf, no socket and no thread here.
The caller comes in by a protocol (`request.Caller`).

control    who may load, pin and evict, and how many loads run at once; counts their results. `running` is
           what it needs of a load
load       one load from top to bottom: start here
prefetch   reads a checkpoint before anybody asks; `at_start` does what `--prefetch` names
fetch      the files beside the weights; `choice` says which (pure), `readahead` reads them
request    what a load is asked for, and what it uses
admission  resolves, chooses and admits
selecting  which tensors a load selects; `names` has their names, packed
warm/      keeps what an operator's file names warm

May import: staging, checkpoint, sources, config, system.
"""
