"""The staging buffer: who gets memory, who shares a checkpoint, and the reads that fill it.

buffer     a load joins an entry, or waits with a new one; `sharing` finds the one that serves it
memory/    who gets memory next, how much, and who is evicted
entry      one checkpoint in the buffer: its slabs, its ring, who holds it
phase      the states of an entry's life; `contents` is what it holds, `members` who shares it,
           `retention` what keeps it warm (all pure)
ring       where its segments lie, what state each is in, who still needs it (pure)
reading/   the reads that fill the ring: threads, fair between users, and what is done with the bytes
pool       the slabs that exist; `slab` is one of them
unmounted  gives up warm checkpoints whose files are gone

All of it runs on the event loop. Reading and making slabs run on threads. Imports run in this order, which
`make lint` checks.

May import: checkpoint, sources, config, system.
"""
