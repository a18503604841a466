"""Intervals for what was measured on a few examples. Numbers only."""

from __future__ import annotations

import math
from statistics import NormalDist

Z95 = NormalDist().inv_cdf(0.975)


def wilson_interval(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Interval for a share, 95 % by default (Wilson 1927): inside [0, 1] and sound for few examples and extreme shares.

    >>> [round(x, 3) for x in wilson_interval(39, 40)]
    [0.871, 0.996]

    Raises: ValueError if n is below 1 or the successes are not between 0 and n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no share")
    share, spread = successes / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
