"""Any exception as an error of the tree.

If threads, descriptors or memory run out, Python raises RuntimeError, OSError or MemoryError, which do not
say what to do. Any other unexpected exception becomes INTERNAL, and its traceback goes to the log.
"""

from __future__ import annotations

import errno
import logging

from ..errors import PenstockError, StagingExhaustedError, TooManyLoadsError

logger = logging.getLogger(__name__)

_NO_MEMORY = (errno.ENOMEM, errno.ENOSPC)
"""ENOSPC: the kernel's limit of shared memory."""
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)


class NoThreadError(RuntimeError):
    """No thread could be started, and no other thread could serve the call later."""


def explain(error: BaseException, doing: str) -> PenstockError:
    """The error for a client if `error` ended something that penstockd was `doing`, such as "making 4
    slabs"."""
    if isinstance(error, PenstockError):
        return error
    code = error.errno if isinstance(error, OSError) else None
    text = str(error)[:200] or type(error).__name__
    if isinstance(error, MemoryError) or code in _NO_MEMORY:
        return StagingExhaustedError(
            f"{doing} failed: the system has no memory for it ({text}); raise the limit of memory of "
            "penstockd's container or its limit of address space (ulimit -v), or lower --memory-limit"
        )
    if code in _NO_DESCRIPTOR:
        return TooManyLoadsError(
            f"{doing} failed: penstockd has no descriptor left ({text}); try again later, or raise its limit "
            "of open files (ulimit -n, LimitNOFILE)"
        )
    if isinstance(error, NoThreadError) or code == errno.EAGAIN:
        return TooManyLoadsError(
            f"{doing} failed: penstockd can start no thread or process ({text}); try again later, or raise "
            "its limit of processes (pids.max, ulimit -u) or of address space (ulimit -v)"
        )
    logger.error("%s failed unexpectedly", doing, exc_info=error)
    return PenstockError(
        f"{doing} failed by a fault of penstockd ({type(error).__name__}); its log has the traceback; please "
        "report it"
    )
