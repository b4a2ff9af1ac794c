"""Plain helpers of every part: system calls, limits of the machine, shares by user, threads, counting, the
log.

linux      system calls that Python lacks; `statx` is the status of a file, `copying` copies memory
directory  notices changes in a directory; `stdin` notices the end of standard input
lock       the lock of a socket directory; `own_files` removes files that this process made
limits     what the machine and the container allow; `headroom` is the memory that is left now
quota      how much each user may have of a bounded resource; `fair` has threads that serve users in turn
counts     the daemon's counters
log        one line for each event; `shown` cuts texts of callers, `failure` makes errors of exceptions,
           `version` is this distribution's
progress   signals of a read to those who watch its thread

Knows nothing of checkpoints, of loads or of the wire.

May import: nothing of the server but `errors`.
"""
