"""How lines over seeds are drawn, and what is said of seeds that are missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import tunesmith.study.look as look
from tunesmith.stats import t_interval
from tunesmith.study.records import Experiment, Line, RunRecord, Series
from tunesmith.study.select import mean_curve

RUNS_APART = 3.0  # times the highest start: above, a line leaves the figure


def draw_line(
    axes: Any, line: Line, number: int, label: str | None = None, band: Mapping[int, tuple[float, float]] | None = None
) -> None:
    """Mean over the finished seeds with a band; seeds that ended early as thin lines of their own, with a cross at the end.

    band: step -> low and high, drawn where there is one seed.
    """
    kind = number % 7
    colour, dashed = look.COLOURS[kind], {"color": look.COLOURS[kind], "linestyle": look.DASHES[kind]}
    whole = {seed: s for seed, s in line.seeds.items() if seed not in line.partial}
    early = [s for seed, s in line.seeds.items() if seed in line.partial]
    name = line.label if label is None else label
    for series in early:
        words = None if whole else f"{name} (not finished)"
        steps, values = [p.step for p in series], [p.value for p in series]
        axes.plot(steps, values, **dashed, linewidth=1, alpha=0.8, label=words)
        axes.plot(steps[-1], values[-1], marker="x", color=colour, markersize=8, markeredgewidth=2)
        name = name if whole else "_again"
    if not whole:
        return
    points = mean_curve(line)
    steps, means = [s for s, _ in points], [v for _, v in points]
    every = max(2, len(steps) // 10) if len(steps) > 6 else 1
    marks = {"marker": look.MARKERS[kind], "markevery": (number % every, every)}
    axes.plot(steps, means, **dashed, **marks, linewidth=2.6 - 0.25 * kind, label=name)
    if len(whole) > 1:
        at_step = [[p.value for s in whole.values() for p in s if p.step == step] for step in steps]
        least = -math.inf if line.signed else 0.0
        bounds = [
            (min(v), max(v)) if len(v) == 2 else ((i := t_interval(v, at_least=least)).low, i.high) for v in at_step
        ]
    else:
        bounds = [band[s] for s in steps] if band and all(s in band for s in steps) else []
    if bounds:
        axes.fill_between(steps, *zip(*bounds, strict=True), color=colour, alpha=0.14, linewidth=0)


def curves(axes: Any, lines: Sequence[Line], ylabel: str, xlabel: str = look.STEPS) -> None:
    """Lines over optimizer steps; what runs far above the others' starts leaves the figure at its top."""
    drawn = [line for line in lines if line.seeds]
    for number, line in enumerate(drawn):
        draw_line(axes, line, number)
    finish(axes, ylabel, xlabel)
    values = [p.value for line in drawn for s in line.seeds.values() for p in s]
    starts = [s[0].value for line in drawn for s in line.seeds.values()]
    if values and max(values) > RUNS_APART * max(starts) > 0:
        axes.set_ylim(top=1.2 * max(starts))


def finish(axes: Any, ylabel: str, xlabel: str = look.STEPS) -> None:
    look.name_axes(axes, ylabel, xlabel)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def count_validations(axes: Any, series: Series) -> None:
    """A second axis on top that counts validations; step 0 is none."""
    steps = [p.step for p in series]
    every = steps[1] - steps[0] if len(steps) > 2 else 0
    if every > 0 and all(b - a == every for a, b in pairwise(steps[:-1])):
        top = axes.secondary_xaxis("top", functions=(lambda x: x / every, lambda v: v * every))
        top.set_xlabel("validation")
        look.thousands(top)


def members_of(e: Experiment, labels: Sequence[str]) -> list[RunRecord]:
    """The runs with one of the labels."""
    return [m.run for m in e.members if m.label in labels]


def missing_notes(lines: Sequence[Line]) -> list[str]:
    """What is missing from any of the lines, and why."""
    return [note for line in lines for note in line.missing]


def seeds_in_words(lines: Sequence[Line]) -> str:
    """How many seeds stand behind a line, for the caption."""
    counts = [n for line in lines if (n := len(line.seeds.keys() - line.partial))]
    n = max(counts, default=0)
    few = "" if len(set(counts)) < 2 else f" ({min(counts)} where runs are missing)"
    bands = {2: " Band: the two seeds."}.get(n, " Band: 95 % interval over seeds; where only two are left, those two.")
    return f"Mean of {n} seeds{few}.{bands}" if n > 1 else "One seed."
