"""Figures of runs as SVG text: axes with units, colours that the colour-blind tell apart, the same bytes every time."""

from __future__ import annotations

import io
from typing import Any

from tunesmith.runlog import Run

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
    axes.set_ylabel("loss, nats per target token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return to_svg(figure)


def to_svg(figure: Any) -> str:
    """A figure as an `<svg>` element, without dates or random ids."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "tunesmith", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
