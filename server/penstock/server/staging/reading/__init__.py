"""The reads that fill the slabs of an entry.

pipeline   all of it for one entry: filled, verified, copied for the tier, counted
filling    which segments are read, and where their blocks lie in the slabs
verifying  the bytes of whole files, compared with checksums
keeping    segments that are copied to the files that keep them on a disk
reader     the threads that read
schedule   which block is read next, fair between users (pure); `accounts` has the counts by which it decides,
           `job` is what it is given, `delays` are blocks that are read again later

Nothing here knows who holds the entry, or who gets memory.

May import: the ring and the slabs of staging, checkpoint, sources, config, system.
"""
