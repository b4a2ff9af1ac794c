"""The tier: blocks of object stores, and of files of network file systems, that are kept on a local disk, and
read from there the next time.

source     wraps a Source: its files read from the disk what is there, and the rest from the store
files      which local files are kept
replies    what stores said to whole loads, for when they cannot be asked
opening    the tier of a daemon, or why it has none
tier       what is kept, for those who read and write
hold       a hold on one version, for an open file and for who has its bytes
versions   the versions that are kept, the limit, and which of them goes first
version    one version of one object: which of its bytes are kept, and their reading and writing
threads    the threads that read from the disk, and giving up on a disk that hangs
writing    the threads that write to the disk
records    what is written beside the bytes, so that nothing else is believed (pure)
pieces     which bytes of a file are where (pure)
directory  the directory and its files: whose they are, the lock, system calls

A block is a run of an object's bytes, appended to the version's `.blocks` file. Its record says which bytes
these are, where they lie, and the CRC of each chunk; it is appended to the version's `.records` file after
the block was synced. So a crash loses blocks that have no whole record, and nothing else.

May import: sources, config, system.
"""
