"""Failures that may pass, and after how long they are asked again. Pure.

transient  timeout, connection, throttled, server_error, short_body, bad_response: asked again, from the
           byte reached, after a random part of a delay that doubles (full jitter)

Which answers are transient, and what the others mean, is for the store to say.
"""

from __future__ import annotations

import email.utils
import random
import time

from ...system.counts import RETRY_REASONS

FIRST_DELAY_SECONDS = 0.1
LONGEST_DELAY_SECONDS = 10.0
LONGEST_RETRY_AFTER_SECONDS = 30.0
"""What an answer may ask for at most, where a store has no other limit: one that says an hour would hang the
load."""


class Transient(Exception):
    """A request that failed and may succeed when it is made again."""

    def __init__(self, reason: str, text: str, *, retry_after_seconds: float = 0.0) -> None:
        assert reason in RETRY_REASONS
        super().__init__(text)
        self.reason = reason
        self.text = text
        self.retry_after_seconds = retry_after_seconds


def delay_seconds(failures: int, retry_after_seconds: float) -> float:
    """Before the attempt after so many that failed in a row: anything up to a bound that doubles, so that
    many readers do not come back at once; and not before what the answer asked for."""
    doubled: float = FIRST_DELAY_SECONDS * 2 ** min(max(failures - 1, 0), 16)
    bound = min(LONGEST_DELAY_SECONDS, doubled)
    return retry_after_seconds + random.uniform(0, bound)


def retry_after(text: str, *, longest_seconds: float = LONGEST_RETRY_AFTER_SECONDS) -> float:
    """What a Retry-After header asks for, in seconds or as a date, within bounds; 0 where it says nothing."""
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
