"""The states of an entry of the staging buffer. Pure.

    QUEUED --granted--> STARTING --slabs made--> STARTED
       |                   |                        |
       +---- waited too long, no slabs, a read failed ----> FAILED
       |                   |                        |         |
       +---- the last holder left, and it is not kept warm; evicted ----> CLOSED
                                                    |         |              ^
                                  reads still write +---------+--> DRAINING -+

A FAILED entry is closed when its last holder has left. DRAINING and CLOSED entries are no longer in the
buffer. A DRAINING entry keeps the slabs that reads write into until these reads end.
"""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    QUEUED = enum.auto()
    """It waits for slabs."""
    STARTING = enum.auto()
    """Its slabs are being made, and where its segments lie is planned."""
    STARTED = enum.auto()
    """It has its slabs: it is read, or has been."""
    FAILED = enum.auto()
    """It failed: all who wait for it, now or later, get the error."""
    DRAINING = enum.auto()
    """It was evicted while reads wrote into some of its slabs."""
    CLOSED = enum.auto()


_TRANSITIONS = {
    (Phase.QUEUED, Phase.STARTING),
    (Phase.QUEUED, Phase.FAILED),
    (Phase.QUEUED, Phase.CLOSED),
    (Phase.STARTING, Phase.STARTED),
    (Phase.STARTING, Phase.FAILED),
    (Phase.STARTING, Phase.CLOSED),
    (Phase.STARTED, Phase.FAILED),
    (Phase.STARTED, Phase.DRAINING),
    (Phase.STARTED, Phase.CLOSED),
    (Phase.FAILED, Phase.DRAINING),
    (Phase.FAILED, Phase.CLOSED),
    (Phase.DRAINING, Phase.CLOSED),
}


def moved(now: Phase, to: Phase) -> Phase:
    """Returns `to`. Raises AssertionError for a transition that does not exist."""
    if (now, to) not in _TRANSITIONS:
        raise AssertionError(f"an entry that is {now.name} cannot become {to.name}")
    return to
