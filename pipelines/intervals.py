"""Intervals of counted shares."""

from __future__ import annotations

import math

NORMAL_95 = 1.959963984540054
"""The 97.5 % point of the normal distribution."""


def wilson(hits: int, of: int, z: float = NORMAL_95) -> tuple[float, float]:
    """Return the ends of Wilson's interval for the share ``hits / of`` (J. Am. Stat. Assoc. 22, 1927, 209); ``(0, 1)`` of nothing."""
    if not of:
        return 0.0, 1.0
    share, squared = hits / of, z * z / of
    middle = (share + squared / 2) / (1 + squared)
    half = z * math.sqrt(share * (1 - share) / of + squared / (4 * of)) / (1 + squared)
    return max(0.0, middle - half), min(1.0, middle + half)
