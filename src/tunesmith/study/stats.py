"""Intervals for what was measured on a few examples: shares, means, paired differences, win rates. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

Z95 = NormalDist().inv_cdf(0.975)
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; n: examples it rests on."""

    mean: float
    low: float
    high: float
    n: int

    def holds(self, value: float) -> bool:
        """Whether the interval contains `value`."""
        return self.low <= value <= self.high


def wilson_interval(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Interval for a share, 95 % by default (Wilson 1927): inside [0, 1] and sound for few examples and extreme shares.

    >>> [round(x, 3) for x in wilson_interval(39, 40)]
    [0.871, 0.996]

    Raises: ValueError if n is not above 0 or the successes are not between 0 and n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no share")
    share, spread = successes / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def share_interval(successes: float, n: int) -> Interval:
    """A share as an Interval (Wilson)."""
    return Interval(successes / n, *wilson_interval(successes, n), n)


def t_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t (Hill 1970's expansion; off by less than 0.01 from 4 degrees of freedom on, for p up to 0.99).

    >>> round(t_quantile(0.975, 39), 3)
    2.023
    """
    z = NormalDist().inv_cdf(p)
    f = float(freedom)
    return (
        z
        + (z**3 + z) / (4 * f)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * f**3)
    )


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of a few values with its 95 % bootstrap interval; the same values and seed give the same interval.

    Percentiles of resampled means, taken a little further out so that the interval is as wide as Student's for normal
    data: plain percentiles are too narrow for 40 values (Hesterberg 2015, arXiv 1411.5279, "expanded percentile").

    Raises: ValueError without values. A single value has no interval: low and high are infinite.
    """
    data = np.asarray(values, dtype=np.float64)
    n = len(data)
    if n == 0:
        raise ValueError("no values")
    mean = float(data.mean())
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    rng = np.random.default_rng(seed)
    means = np.concatenate([data[rng.integers(n, size=(part, n))].mean(1) for part in _parts(resamples, n)])
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t_quantile(0.975, n - 1)) if n > 4 else 0.0
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), n)


def _parts(resamples: int, n: int) -> list[int]:
    """Resamples in parts of about a million draws, to bound the memory."""
    size = max(1, 1_000_000 // n)
    return [min(size, resamples - start) for start in range(0, resamples, size)]


@dataclass(frozen=True)
class Wins:
    """Outcomes of paired comparisons from A's side. rate: wins plus half the ties, with its 95 % interval."""

    wins: int
    ties: int
    losses: int
    rate: Interval

    @property
    def mirrored(self) -> Wins:
        """The same from B's side."""
        r = self.rate
        return Wins(self.losses, self.ties, self.wins, Interval(1 - r.mean, 1 - r.high, 1 - r.low, r.n))


def win_rate(a: Sequence[float], b: Sequence[float], *, tie: float = 0.0) -> Wins:
    """How often A is above B on the same examples; differences up to `tie` are ties.

    The interval is Wilson's for the number of examples that would give a win or a loss the spread found: ties narrow it.
    Raises: ValueError if the two differ in length or are empty.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    wins, losses = int((difference > tie).sum()), int((difference < -tie).sum())
    return count_wins(wins, len(difference) - wins - losses, losses)


def count_wins(wins: int, ties: int, losses: int) -> Wins:
    """Wins, ties and losses as a win rate with its interval. Raises: ValueError if there is none of them."""
    n = wins + ties + losses
    if n == 0:
        raise ValueError("nothing was compared")
    rate = (wins + ties / 2) / n
    spread = (wins + ties / 4) / n - rate * rate  # variance of an outcome 1, 1/2 or 0
    worth = n * rate * (1 - rate) / spread if spread > 0 else float(n)
    return Wins(wins, ties, losses, Interval(rate, *wilson_interval(rate * worth, worth), n))


def paired_difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean of a - b over the same examples with its 95 % bootstrap interval. Raises: ValueError if they differ in length."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: pairs need the same examples")
    return bootstrap_interval((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).tolist(), seed=seed)


def as_dict(interval: Interval) -> dict[str, Any]:
    """`{"mean", "low", "high", "n"}`, as the logs hold it."""
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n}
