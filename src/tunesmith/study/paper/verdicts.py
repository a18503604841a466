"""Claims judged: numbers in, a verdict with the sentence that says why out. Pure functions; no files, no torch.

Three verdicts. A claim *holds* or *does not hold* only where a 95 % interval says so; everything else is *undecided*,
and the sentence says what is missing. What one training shows of a method is one draw: such claims need two seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tunesmith.judge.measures import accuracy_interval
from tunesmith.stats import Interval, paired_difference, t_interval
from tunesmith.study.tables import interval_words

HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
SEEDS = 2  # below, nothing is known of how much another seed would change
FEWEST = 8  # validations, below which a curve's own noise cannot be seen
WINDOW = 3  # validations whose mean stands for the end of a curve, or for its lowest place
STRICT = 3.5  # standard errors; more than 1.96, because the lowest of many validations was picked


@dataclass(frozen=True)
class Verdict:
    """HOLDS, FAILS or OPEN, and the numbers that say so in words."""

    verdict: str
    evidence: str


def over_seeds(values: Sequence[float], resolution: float = 0.0, level: float = 0.95) -> Interval:
    """Mean of a figure over seeds, its t interval widened by what the meter cannot resolve.

    With a resolution, one value has an interval too (value +- resolution): what is measured is then no sample.
    """
    interval = t_interval(values, level=level)
    if not resolution:
        return interval
    low, high = (interval.mean, interval.mean) if interval.n == 1 else (interval.low, interval.high)
    return Interval(interval.mean, low - resolution, high + resolution, interval.n)


def all_greater(differences: Mapping[str, Sequence[float]], *, resolution: float = 0.0, unit: str = "") -> Verdict:
    """Is every difference above zero? differences: name -> one value a seed.

    Holds: every interval lies above 0; all must, so that no correction for their number is needed. Does not hold: one
    lies below; any of k may, so these are intervals at the level 1 - 0.05 / k (Bonferroni).
    """
    if not differences or not all(differences.values()):
        empty = ", ".join(name for name, values in differences.items() if not values)
        return Verdict(OPEN, f"no value to compare{': ' + empty if empty else ''}")
    intervals, evidence = _over_seeds(differences, resolution, unit)
    if few := _too_few(intervals):
        return Verdict(OPEN, evidence + few)
    if any(over_seeds(values, resolution, 1 - 0.05 / len(intervals)).high < 0 for values in differences.values()):
        return Verdict(FAILS, evidence)
    if all(x.low > 0 for x in intervals):
        return Verdict(HOLDS, evidence)
    return Verdict(OPEN, evidence + "; not all differences are clearly of one sign")


def alike(
    differences: Mapping[str, Sequence[float]], margin: float, *, resolution: float = 0.0, unit: str = ""
) -> Verdict:
    """Is every difference within +-margin? Not finding a difference is no proof: its whole interval must lie inside."""
    if not differences or not all(differences.values()):
        return Verdict(OPEN, "no value to compare")
    intervals, evidence = _over_seeds(differences, resolution, unit)
    evidence += f"; alike means within ±{margin:.3f}{' ' + unit if unit else ''}"
    if few := _too_few(intervals):
        return Verdict(OPEN, evidence + few)
    if any(x.low > margin or x.high < -margin for x in intervals):
        return Verdict(FAILS, evidence)
    if all(-margin <= x.low and x.high <= margin for x in intervals):
        return Verdict(HOLDS, evidence)
    return Verdict(OPEN, evidence + "; an interval crosses that limit")


def _over_seeds(differences: Mapping[str, Sequence[float]], resolution: float, unit: str) -> tuple[list[Interval], str]:
    """The interval of each difference, and all of them in words."""
    intervals = [over_seeds(values, resolution) for values in differences.values()]
    words = (f"{name}: {interval_words(x, unit=unit)}" for name, x in zip(differences, intervals, strict=True))
    n = min(x.n for x in intervals)
    return intervals, f"{'; '.join(words)} ({n} seed{'s' * (n > 1)})"


def _too_few(intervals: Sequence[Interval]) -> str:
    missing = any(math.isnan(x.low) for x in intervals)
    return f"; one seed says nothing about the next, and the claim needs {SEEDS}" if missing else ""


# ---- curves ----------------------------------------------------------------------------------------------------------


def noise_of(values: Sequence[float]) -> float:
    """Standard deviation of the noise around a smooth curve, from second differences (a trend falls out of them)."""
    seconds = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return math.sqrt(fmean(d * d for d in seconds) / 6) if seconds else math.nan


Stretch = tuple[float, float]
"""From and to, as shares of a training."""


def overfits(
    steps: Sequence[float],
    validation: Sequence[float],
    train: Sequence[float],
    *,
    between: Stretch | None = None,
    difference: Callable[[int, int], Interval | None] | None = None,
) -> Verdict:
    """Does the validation loss rise after its lowest place while the training loss goes on falling?

    Args:
        steps, validation, train: a curve of estimates, the mean over seeds where there are several.
        between: where the lowest place is said to be; None asks only whether it overfits.
        difference: two places of the curve -> loss of the first minus the second on the same batches, its interval made
            for as many comparisons as the curve has places; None where the batches were not kept. Without, the noise of
            the curve itself is the yardstick.
    """
    n = len(validation)
    if n < FEWEST:
        return Verdict(OPEN, f"{n} validations; {FEWEST} are needed to tell a rise from noise")
    smooth = [fmean(validation[max(0, i - 1) : i + 2]) for i in range(n)]
    low = min(range(n), key=smooth.__getitem__)
    margin = STRICT * noise_of(validation) * math.sqrt(2 / WINDOW)
    rise = fmean(validation[-WINDOW:]) - smooth[low]

    def apart(i: int) -> Interval:
        paired = difference(i, low) if difference else None
        gap = rise if i == n - 1 else smooth[i] - smooth[low]
        return paired or Interval(gap, gap - margin, gap + margin, n)

    end = apart(n - 1)
    base = steps[0] == 0  # the estimate before the training is no validation of it
    same = ", paired over the same batches" if difference and difference(n - 1, low) else ""
    lowest = f"lowest at validation {low + (not base)} of {n - base} (step {steps[low]:,.0f})"
    evidence = f"{lowest}, {interval_words(end)} above that at the end{same}"
    if n - 1 - low < WINDOW:
        before = fmean(validation[-2 * WINDOW : -WINDOW]) - fmean(validation[-WINDOW:])
        if before > margin:
            return Verdict(FAILS, f"still falling at the end, by {before:.3f} over the last {WINDOW} validations")
        return Verdict(OPEN, f"{evidence}: flat at the end, training was too short to tell")
    if end.low <= 0:
        return Verdict(OPEN, f"{evidence}: the rise may be chance")
    if fmean(train[-WINDOW:]) >= train[low]:
        return Verdict(FAILS, f"{evidence}, but the training loss rose too: unstable, not overfitting")
    close = [i for i in range(n) if i == low or apart(i).low <= 0]
    return _placed(between, close[0] / (n - 1), close[-1] / (n - 1), evidence)


def _placed(between: Stretch | None, first: float, last: float, evidence: str) -> Verdict:
    """HOLDS if a place that cannot be told from the turning point (`first` to `last`) lies where it is said to be."""
    if between is None or (first <= between[1] and between[0] <= last):
        return Verdict(HOLDS, evidence)
    span = f"{first:.0%} to {last:.0%}" if last > first else f"{first:.0%}"
    said = f"{max(0.0, between[0]):.0%} to {between[1]:.0%}"
    return Verdict(FAILS, f"{evidence}; the turn is at {span} of training, not within {said}")


def falls_after_best(rewards: Mapping[int, Sequence[float]], *, between: Stretch | None = None) -> Verdict:
    """Does the reward fall after the best checkpoint? rewards: step -> one value a prompt, the same prompts each time.

    The best step is picked on one half of the prompts and judged on the other, and the other way round: picked and
    judged on the same prompts, the best of many equal checkpoints always seems to fall afterwards.
    """
    steps = sorted(rewards)
    n = min((len(r) for r in rewards.values()), default=0)
    if len(steps) < 3 or n < 4:
        return Verdict(
            OPEN, f"{len(steps)} checkpoints with {n} prompts each; at least 3 checkpoints with 4 prompts are needed"
        )
    last, falls, best = steps[-1], [], []
    for half in (0, 1):
        chosen = max(steps, key=lambda s: fmean(rewards[s][half:n:2]))
        best.append(chosen)
        falls += [rewards[chosen][i] - rewards[last][i] for i in range(1 - half, n, 2)]
    top = max(steps, key=lambda s: fmean(rewards[s]))
    if best == [last, last]:
        return Verdict(FAILS, f"the last of {len(steps)} checkpoints (step {last:,}) has the best reward")
    interval = paired_difference(falls, [0.0] * len(falls))
    evidence = f"best at step {top:,} of {last:,}; from there to the end it falls by {interval_words(interval)} ({n} prompts, paired)"
    if interval.low <= 0:
        return Verdict(FAILS if interval.high < 0 else OPEN, evidence)
    level = [s for s in steps if paired_difference(rewards[top], rewards[s]).low <= 0]
    share = [(steps.index(s)) / (len(steps) - 1) for s in (level[0], level[-1])]
    return _placed(between, share[0], share[1], evidence)


def never_learns(starts: Mapping[str, Sequence[float]], ends: Mapping[str, Sequence[float | None]]) -> Verdict:
    """Does no run of any setting end below its start? A diverged run has None for its end."""
    if not ends or not all(ends.values()):
        return Verdict(OPEN, "no finished or diverged run")
    learned, ends_of = [], []
    for name, values in ends.items():
        below = [v is not None and v < s for s, v in zip(starts[name], values, strict=True)]
        learned += below
        ways = [f"{s:.3f} → {v:.3f}" for s, v in zip(starts[name], values, strict=True) if v is not None]
        gone = values.count(None)
        parts = [f"{gone} of {len(values)} diverged"] * bool(gone) + [f"validation loss {', '.join(ways)}"] * bool(ways)
        ends_of.append(f"{name}: {'; '.join(parts)}")
    text = "; ".join(ends_of)
    if not any(learned):
        return Verdict(HOLDS, text)
    if all(learned):
        return Verdict(FAILS, f"{text}; every run ends below its start")
    return Verdict(OPEN, f"{text}; some runs learn, some do not")


# ---- single figures --------------------------------------------------------------------------------------------------


def above_chance(accuracies: Sequence[float], margins: Sequence[float], pairs: Mapping[str, Any]) -> Verdict:
    """Is the chosen answer ahead in more than half of the pairs, by a margin above 0? One value a seed, the same pairs.

    pairs: the runs' event of that name.
    """
    share = accuracy_interval(fmean(accuracies), pairs) if accuracies and margins else None
    if share is None:
        return Verdict(OPEN, "no estimate on validation pairs")
    margin = fmean(margins)
    evidence = f"accuracy {interval_words(share)} of {share.n} pairs, mean margin {margin:.3f}"
    if share.low > 0.5 and margin > 0:
        return Verdict(HOLDS, evidence)
    if share.high < 0.5 or (share.low > 0.5 and margin < 0):
        return Verdict(FAILS, evidence)
    return Verdict(OPEN, evidence + "; the interval includes one half")


def better_paired(a: Sequence[float], b: Sequence[float], name: str) -> Verdict:
    """Is a above b on the same prompts?"""
    if len(a) != len(b) or len(a) < 2:
        return Verdict(OPEN, f"{min(len(a), len(b))} prompts with a reward from both; 2 are needed")
    interval = paired_difference(a, b)
    evidence = f"{name} {interval_words(interval)} ({len(a)} prompts, paired)"
    if interval.low > 0:
        return Verdict(HOLDS, evidence)
    return Verdict(FAILS, evidence) if interval.high < 0 else Verdict(OPEN, evidence + "; the interval includes 0")


def alike_paired(a: Sequence[float], b: Sequence[float], name: str) -> Verdict:
    """Is a about as good as b on the same prompts: within half a standard deviation of b over the prompts?"""
    if len(a) != len(b) or len(a) < 4:
        return Verdict(OPEN, f"{min(len(a), len(b))} prompts with a reward from both; 4 are needed")
    mean = fmean(b)
    margin = math.sqrt(fmean((x - mean) ** 2 for x in b)) / 2
    interval = paired_difference(a, b)
    evidence = f"{name} {interval_words(interval)} ({len(a)} prompts, paired); equally good means within ±{margin:.3f}"
    if -margin <= interval.low and interval.high <= margin:
        return Verdict(HOLDS, evidence)
    if interval.low > margin or interval.high < -margin:
        return Verdict(FAILS, evidence)
    return Verdict(OPEN, evidence + "; the interval crosses that limit")


def same_steps(a: Mapping[int, float], b: Mapping[int, float], tolerance: float) -> Verdict:
    """Are two runs' losses the same step by step, up to `tolerance` as a share of the loss?"""
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return Verdict(OPEN, "no step was logged by both")
    worst = max(shared, key=lambda s: abs(a[s] - b[s]) / max(abs(a[s]), 1e-12))
    gap = abs(a[worst] - b[worst]) / max(abs(a[worst]), 1e-12)
    evidence = f"largest relative difference of the loss {gap:.1e}, at step {worst:,} of {len(shared):,} compared"
    return Verdict(HOLDS if gap <= tolerance else FAILS, f"{evidence}; the same means at most {tolerance:.0e}")
