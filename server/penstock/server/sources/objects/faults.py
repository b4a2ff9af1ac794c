"""Failures that may pass, and the delay after them. Pure.

transient  timeout, connection, throttled, server_error, short_body, bad_response: the request is repeated,
from
           the byte reached, after a random part of a delay that doubles (full jitter)

The store decides which answers are transient, and what the others mean.
"""

from __future__ import annotations

import email.utils
import random
import time

from ...system.counts import RETRY_REASONS

FIRST_DELAY_SECONDS = 0.1
LONGEST_DELAY_SECONDS = 10.0
LONGEST_RETRY_AFTER_SECONDS = 30.0
"""Longest delay that an answer may ask for, unless the store has another limit. An answer that asks for an
hour would hang the load."""


class Transient(Exception):
    """A request failed, and may succeed if it is repeated."""

    def __init__(self, reason: str, text: str, *, retry_after_seconds: float = 0.0) -> None:
        assert reason in RETRY_REASONS
        super().__init__(text)
        self.reason = reason
        self.text = text
        self.retry_after_seconds = retry_after_seconds


def delay_seconds(failures: int, retry_after_seconds: float) -> float:
    """The delay after so many failures in a row: the delay that the answer asked for, and a random time up to
    a bound that doubles, so that many readers do not come back at once."""
    doubled: float = FIRST_DELAY_SECONDS * 2 ** min(max(failures - 1, 0), 16)
    bound = min(LONGEST_DELAY_SECONDS, doubled)
    return retry_after_seconds + random.uniform(0, bound)


def retry_after(text: str, *, longest_seconds: float = LONGEST_RETRY_AFTER_SECONDS) -> float:
    """The delay of a Retry-After header, which has seconds or a date, within bounds. 0 if it has neither."""
    text = text.strip()
    if text.isdecimal():
        seconds = float(text[:10])
    else:
        parsed = email.utils.parsedate_tz(text) if text else None
        try:
            seconds = email.utils.mktime_tz(parsed) - time.time() if parsed else 0.0
        except (ValueError, OverflowError):  # a year that no calendar has
            seconds = 0.0
    return min(max(seconds, 0.0), longest_seconds)
