"""Plain helpers of every part: system calls, limits of the machine, shares by user, threads, counting, the
log.

Knows nothing of checkpoints, of loads or of the wire.

May import: nothing of the server but `errors`.
"""
