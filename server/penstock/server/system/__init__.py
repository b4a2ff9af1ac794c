"""What the machine allows, and what every part needs: system calls, limits, shares by user, threads,
counting, the log.

Knows nothing of checkpoints, of loads or of the wire.

May import: nothing of the server but `errors`.
"""
