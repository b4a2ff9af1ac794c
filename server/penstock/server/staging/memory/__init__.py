"""Who gets the memory of the staging buffer, how much, and who loses it.

allocator  gives entries their slabs and starts them, and takes the slabs back
waiting    which entry gets slabs next, and how many; `turns` is whose turn it is (pure)
demand     how much a checkpoint asks for (pure)
shares     who holds how much, and how much more each user may have (pure)
cache      the entries in the buffer, and which are evicted for others
upkeep     takes memory from the system, and gives it back

`pool.py` beside this room has the slabs themselves. Nothing here reads.

May import: the entries and the slabs of staging, checkpoint, sources, config, system.
"""
