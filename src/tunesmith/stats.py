"""Intervals for what was measured on a few examples. Numbers only: no torch, no files, no drawing.

Every interval is a 95 % one where nothing else is said, and comes with its mean and the number of examples it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

Z95 = NormalDist().inv_cdf(0.975)
RESAMPLES = 10_000
LARGE = 2000  # from here on the mean is normal and the bootstrap gives Student's interval, only slower
AT_ONCE = 4_000_000  # numbers drawn in one go, to bound the memory of the bootstrap


@dataclass(frozen=True)
class Interval:
    """A mean, or a share, of n examples and its 95 % interval; `low` and `high` are NaN where n is too small to tell."""

    mean: float
    low: float
    high: float
    n: int

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return (
            f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"
            if self.low == self.low
            else f"{self.mean:.3f} (n = {self.n})"
        )


def bootstrap_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of independent values with its bootstrap interval.

    The quantiles of the resampled means are widened by what a t interval has over a normal one, without which the plain
    percentile interval is too short on few values (40 values: 93 to 94 % instead of 95 %).

    Returns: NaN bounds for a single value.
    Raises: ValueError if there is no value or one is not finite.
    Source: Hesterberg 2015, "What Teachers Should Know About the Bootstrap", expanded percentile interval.
    Held by tests: holds the true mean in 95 +- 2 % of simulated sets of 40 (as skewed as a gamma of shape 2; an exponential: 93.5 %).
    """
    x = np.asarray(values, np.float64)
    n = len(x)
    if not n or not np.isfinite(x).all():
        raise ValueError(f"{n} values, {np.isfinite(x).sum()} of them finite: there is no mean")
    mean = float(x.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    if n > LARGE:
        return t_interval(x.tolist(), level=level)
    rng = np.random.default_rng(seed)
    chunk = max(1, AT_ONCE // n)
    means = np.concatenate(
        [x[rng.integers(0, n, (min(chunk, RESAMPLES - done), n))].mean(1) for done in range(0, RESAMPLES, chunk)]
    )
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t_quantile(n - 1, level))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, min(float(low), mean), max(float(high), mean), n)


def ratio_interval(sums: Sequence[float], counts: Sequence[float], *, level: float = 0.95) -> Interval:
    """Sum of `sums` over sum of `counts`, as a loss per token is, with its bootstrap interval over the units counted.

    The spread of the ratio r is that of the residuals (sum - r count) / mean(count) of the units.

    Raises: ValueError if there is nothing to count.
    """
    s, c = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if not c.sum() > 0:
        raise ValueError("nothing was counted: there is no ratio")
    ratio = s.sum() / c.sum()
    return bootstrap_interval(ratio + (s - ratio * c) / c.mean(), level=level)


def t_interval(values: Sequence[float], *, level: float = 0.95, at_least: float = -math.inf) -> Interval:
    """Mean of a handful of like values (a figure over seeds) with Student's interval; NaN bounds below two values.

    at_least: what the mean cannot be below (0 for times, memory, losses). The interval ends there: what it loses holds no
    possible mean, so it covers the true one as often as before. A logarithmic scale would keep it above 0 as well, but two
    values that differ by a factor of two would then reach from a hundredth of their mean to a hundred times it.
    """
    x = np.asarray(values, np.float64)
    if not len(x):
        raise ValueError("no values: there is no mean")
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = t_quantile(len(x) - 1, level) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(mean, max(mean - half, at_least), mean + half, len(x))


def paired_difference(a: Sequence[float], b: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean of a - b where both were measured on the same examples, with its bootstrap interval.

    Raises: ValueError if there are not as many a as b.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: every pair needs both")
    return bootstrap_interval([x - y for x, y in zip(a, b, strict=True)], level=level)


@dataclass(frozen=True)
class Wins:
    """How often the first of two was better, neither, and the second."""

    wins: int
    ties: int
    losses: int

    @property
    def n(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def mirrored(self) -> Wins:
        """The same comparison told from the other side."""
        return Wins(self.losses, self.ties, self.wins)


def count_wins(a: Sequence[float], b: Sequence[float], tie: float = 0.0) -> Wins:
    """Wins of a over b, pair by pair; a difference of at most `tie` is a tie."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: every pair needs both")
    signs = [0 if abs(x - y) <= tie else (1 if x > y else -1) for x, y in zip(a, b, strict=True)]
    return Wins(signs.count(1), signs.count(0), signs.count(-1))


def win_rate(wins: Wins) -> Interval:
    """Share of wins, a tie counting one half, with Wilson's interval for the number of examples that the ties are worth.

    A tie is known to be one half, so it carries less spread than a win or a loss: with variance v per example and rate p
    the shares behave like those of n p (1 - p) / v examples. Only ties: no spread was seen, the interval is that of n
    decided pairs. Mirrored wins give the mirrored interval.

    Raises: ValueError if nothing was compared.
    """
    n = wins.n
    if not n:
        raise ValueError("nothing was compared")
    rate = (wins.wins + wins.ties / 2) / n
    variance = (wins.wins * (1 - rate) ** 2 + wins.ties * (0.5 - rate) ** 2 + wins.losses * rate**2) / n
    worth = n * rate * (1 - rate) / variance if variance > 0 else n
    low, high = _wilson(rate, worth, Z95)
    return Interval(rate, low, high, n)


def share_interval(successes: float, n: int) -> Interval:
    """A share with its Wilson interval, as `wilson_interval`."""
    return Interval(successes / n if n else math.nan, *wilson_interval(successes, n), n)


def clustered_share(successes: Sequence[float], counts: Sequence[float]) -> Interval:
    """A share of examples that come in clusters, as pairs of one prompt do, with Wilson's interval for what they are worth.

    With a share p the clusters' residuals (successes - p count) vary as those of p (1 - p) / v independent examples, v being
    their variance per example. With one example a cluster this is `share_interval`. No spread at all (all right, all wrong):
    each cluster is worth one example.

    Args: of every cluster its successes, and its examples (more than 0).
    Returns: n counts the examples.
    Raises: ValueError if there is nothing to count.
    Held by tests: holds the true share in at least 93 % of simulated sets of 40 clusters, where Wilson's over examples fails.
    """
    s, c = np.asarray(successes, np.float64), np.asarray(counts, np.float64)
    n, clusters = float(c.sum()), len(c)
    if not n > 0:
        raise ValueError("nothing was counted: there is no share")
    share = float(s.sum()) / n
    spread = float(((s - share * c) ** 2).sum()) / n
    worth = float(clusters)
    if clusters > 1 and spread > 0 and n > clusters:
        worth = n * share * (1 - share) / spread * (clusters - 1) / clusters * n / (n - 1)
    low, high = _wilson(share, min(n, max(1.0, worth)), Z95)
    return Interval(share, low, high, int(n))


def wilson_interval(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Interval for a share, 95 % by default (Wilson 1927): inside [0, 1] and sound for few examples and extreme shares.

    >>> [round(x, 3) for x in wilson_interval(39, 40)]
    [0.871, 0.996]

    Raises: ValueError if n is below 1 or the successes are not between 0 and n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a share")
    return _wilson(successes / n, n, z)


def _wilson(share: float, n: float, z: float) -> tuple[float, float]:
    spread = z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


@cache
def t_quantile(df: int, level: float = 0.95) -> float:
    """How many standard errors a two-sided Student interval of that level reaches, with `df` >= 1 degrees of freedom.

    >>> [round(t_quantile(df), 3) for df in (1, 2, 4, 39)]
    [12.706, 4.303, 2.776, 2.023]
    """
    if df > 1000:
        z = NormalDist().inv_cdf((1 + level) / 2)
        return z + (z**3 + z) / (4 * df)  # Cornish-Fisher's first term, good to 1e-5 here
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)

    def mass(angle: float) -> float:  # of (-x, x), by x = sqrt(df) tan(angle): a smooth integrand on a bounded range
        steps = np.linspace(0, angle, 513)
        y = np.cos(steps) ** (df - 1)
        simpson = y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum()
        return float(2 * scale * simpson * steps[1] / 3)

    low, high = 0.0, math.pi / 2
    while high - low > 1e-13:
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < level else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)
