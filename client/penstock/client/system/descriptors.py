"""The limit on open files, checked before gRPC meets it: without a descriptor it ends the whole process."""

from __future__ import annotations

import os
import resource

from .. import errors

SPARE = 16
"""Descriptors that a call needs to be free, for the connection to the daemon and gRPC's sockets and events: 6
for the first load (measured with gRPC 1.85), 2 for each other one, and some to be safe."""


def require() -> None:
    """Raises PenstockError unless a call may still open what it needs."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    try:
        used = len(os.listdir("/proc/self/fd"))  # with the one of this listing
    except FileNotFoundError:  # no /proc in this container: gRPC will say so in its own way
        return
    except OSError:  # not even one is left
        used = limit + 1
    if used - 1 + SPARE > limit:
        raise too_few(SPARE)


def too_few(missing: int) -> errors.PenstockError:
    """Says by how much to raise the limit for `missing` more descriptors, where all others may be in use."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = limit + missing + SPARE
    return errors.PenstockError(
        f"too many open files: this process may have {limit} at a time, and a load needs {missing} more for "
        f"a moment. Raise its limit to {enough}: `ulimit -n {enough}`, LimitNOFILE={enough} of a systemd "
        f"unit, or `--ulimit nofile={enough}` of a container"
    )
