"""Figures of runs as SVG text: axes with units, colours that the colour-blind tell apart, the same bytes every time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from tunesmith.runlog import Run
from tunesmith.study.stats import wilson_interval

TRAIN, VALIDATION, MARK = "#0072B2", "#D55E00", "#009E73"  # Okabe & Ito's palette


def loss_curve(run: Run) -> str:
    """Training loss of every step, estimates on fixed training and validation rows, and the best checkpoint."""
    from matplotlib.figure import Figure

    train, estimates = run.metrics("train"), run.metrics("eval")
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [r["step"] for r in train], [r["loss"] for r in train], color=TRAIN, alpha=0.25, linewidth=1, label="each step"
    )
    steps = [r["step"] for r in estimates]
    axes.plot(steps, [r["train_loss"] for r in estimates], color=TRAIN, marker="o", markersize=4, label="training rows")
    axes.plot(
        steps,
        [r["validation_loss"] for r in estimates],
        color=VALIDATION,
        marker="s",
        markersize=4,
        label="validation rows",
    )
    best = run.status.get("best_step")
    if best is not None and len(estimates) > 1:
        axes.axvline(best, color=MARK, linestyle="--", linewidth=1, label=f"best checkpoint (step {best:,})")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per target token" if "validation_perplexity" in estimates[0] else "loss, nats a pair")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return to_svg(figure)


def preference_curves(run: Run) -> str:
    """Accuracy and reward margin of a preference run: every step, and estimates with 95 % intervals of the accuracy."""
    from matplotlib.figure import Figure

    train, estimates = run.metrics("train"), run.metrics("eval")
    pairs = next(iter(run.metrics("pairs")), {})
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    panels = {"accuracy": "pairs with the chosen answer ahead", "margin": "reward margin"}
    for axes, (name, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        steps, values = _series(train, name)
        axes.plot(steps, values, color=TRAIN, alpha=0.25, linewidth=1, label="each step")
        steps, values = _series(estimates, f"validation_{name}")
        axes.plot(steps, values, color=VALIDATION, marker="s", markersize=4, label="validation pairs")
        if name == "accuracy" and (n := pairs.get("validation_pairs")):
            low, high = zip(*(wilson_interval(v * n, n) for v in values), strict=True)
            axes.fill_between(steps, low, high, color=VALIDATION, alpha=0.15, linewidth=0, label="95 % interval")
            by_length = pairs["validation_longer_chosen"]
            axes.axhline(by_length, color=MARK, linestyle="--", linewidth=1, label="the longer answer")
            axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    return to_svg(figure)


def _series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one figure, where it was finite."""
    found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def to_svg(figure: Any) -> str:
    """A figure as an `<svg>` element, without dates or random ids."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "tunesmith", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
