"""Repeats a call at the next daemon when the daemon goes away during it, or takes no connection at first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from .. import errors

_log = logging.getLogger("penstock.client")
_FIRST_DELAY_SECONDS, _LAST_DELAY_SECONDS = 0.05, 1.0
_T = TypeVar("_T")


def persist(
    attempt: Callable[[], _T],
    *,
    timeout_seconds: float,
    sleep: Callable[[float], None],
    lost: errors.DaemonUnavailableError | None = None,
) -> _T:
    """Returns the result of `attempt`. If the daemon goes away after it accepted the attempt, repeats it, for
    up to `timeout_seconds` without a daemon each time; with `lost`, also from the beginning. So too if the
    daemon runs and takes no connection.

    Raises the errors of `attempt`; without a daemon, how the last one was lost. `sleep` may raise to end it.
    """
    deadline, delay = time.monotonic() + timeout_seconds, _FIRST_DELAY_SECONDS
    while True:
        if lost is not None:
            if time.monotonic() + delay > deadline:
                raise lost
            sleep(delay)
            delay = min(2 * delay, _LAST_DELAY_SECONDS)
        try:
            return attempt()
        except (errors.DaemonUnavailableError, errors.SessionRequiredError) as error:
            if isinstance(error, errors.DaemonUnavailableError) and error.begun:
                lost = error
                deadline, delay = time.monotonic() + timeout_seconds, _FIRST_DELAY_SECONDS
                _log.warning("%s; waiting up to %.0f s for the next one", str(error), timeout_seconds)
            elif isinstance(error, errors.DaemonUnavailableError) and error.crowded:
                if lost is None:
                    lost = error
                    if timeout_seconds > 0:
                        _log.warning("%s; trying for up to %.0f s", str(error), timeout_seconds)
            elif lost is None:
                raise
            # else it is not there yet, or was replaced between the handoff and the call
