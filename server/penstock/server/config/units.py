"""Sizes as people write them: `4000000000`, `4GB`, `4GiB`."""

from __future__ import annotations

import re
from fractions import Fraction

_FACTORS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _FACTORS[_letter] = _FACTORS[f"{_letter}b"] = 1000**_power
    _FACTORS[f"{_letter}i"] = _FACTORS[f"{_letter}ib"] = 1024**_power
_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes. `4G` and `4Gi` mean what they mean in Kubernetes: 10^9 and 2^30 times 4.

    Raises ValueError with a sentence for people.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write bytes, or a number with a unit such as 4GB or 4GiB")
    return int(Fraction(match[1]) * factor)


def show_size(size_bytes: int) -> str:
    """`4.0 GB`, `1.2 MB`: decimal, for people."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.95:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
