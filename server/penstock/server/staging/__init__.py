"""The staging buffer: who gets memory, who shares a checkpoint, and the reads that fill it.

buffer    which checkpoints are staged, who shares them, what is evicted for others
waiting   who gets memory next
entry     one checkpoint in the buffer: its slabs, its ring, who holds it
phase     the states of an entry's life; `contents` is what it holds, `members` who shares it (pure)
shares    who holds how much of the buffer, and how much more each user may have (pure)
ring      where its segments lie, what state each is in, who still needs it (pure)
keeping   segments that are copied to the files that keep them on a disk
filling   the reads that fill the ring; `reader` has the threads, fair between users
pool      the slabs that exist; `slab` is one of them; `headroom` is how many the system has memory for

All of it runs on the event loop. Reading and making slabs run on threads.

May import: checkpoint, sources, config, system.
"""
