"""What the daemon counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Totals:
    """Since the start. Changed only on the event loop."""

    loads_ok: int = 0
    loads_failed: int = 0
    read_bytes: int = 0
    delivered_bytes: int = 0
    stage_hits: int = 0
    stage_misses: int = 0
    evictions: int = 0
