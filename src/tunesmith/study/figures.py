"""How figures look, and those of single runs: axes with units, the same bytes every time, as SVG text and as PNG.

Lines differ in colour (Okabe and Ito's palette, told apart by the colour-blind), in dashes and in markers, so that a
grey print still tells them apart.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tunesmith.files.run import DRAWS, Run
from tunesmith.stats import wilson_interval

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9"
INK, GRID = "#1b1b1a", "#dcdcd8"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (1.4, 1.2)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    "-",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "\\\\", "xx")
TRAIN, VALIDATION, MARK = BLUE, VERMILLION, GREEN
DPI = 160
STYLE: Any = {
    "svg.hashsalt": "tunesmith", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10.5,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "grid.linewidth": 0.7, "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 1.8, "lines.markersize": 5,
    "hatch.linewidth": 0.6, "axes.formatter.useoffset": False,
}  # fmt: skip


TOKEN, PAIR = "nats per target token", "nats per pair"
PAIRWISE = ("dpo", "reward")  # commands whose loss is one of preference pairs
OTHER_LOSSES = ("ipo", "hinge")  # of DPO: a square, and a distance; neither is in nats


def loss_unit(config: dict[str, Any], command: str | None) -> str:
    """What a run's loss is counted in: TOKEN, PAIR, or `a pair (ipo)` where it is no negative log-likelihood."""
    if command not in PAIRWISE:
        return TOKEN
    name = (config.get("dpo") or {}).get("loss")
    return f"a pair ({name})" if name in OTHER_LOSSES else PAIR


@dataclass(frozen=True)
class Plate:
    """A finished figure. `notes`: what is missing from it or not comparable in it."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes
    notes: tuple[str, ...] = ()


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(rows: int = 1, columns: int = 1, height: float = 4.2) -> tuple[Any, Any]:
    """A figure and its axes: one, or an array of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def to_plate(figure: Any, name: str, title: str, caption: str, notes: Sequence[str] = ()) -> Plate:
    """Render as SVG and as PNG, without dates or random ids. Call it, as all drawing, inside `style()`."""
    text, pixels = io.StringIO(), io.BytesIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    figure.set_layout_engine("none")  # as laid out for the SVG
    figure.savefig(pixels, format="png", dpi=DPI, metadata={"Software": None})
    svg = text.getvalue()
    return Plate(name, title, caption, svg[svg.index("<svg") :], pixels.getvalue(), tuple(dict.fromkeys(notes)))


def thousands(axes: Any, which: str = "x") -> None:
    """Whole numbers with commas on the axis of the steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def legend_above(axes: Any, columns: int) -> None:
    """A legend outside, for axes that are full everywhere."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, columnspacing=1.4)


# ---- single runs -----------------------------------------------------------------------------------------------------


def loss_curve(run: Run) -> Plate:
    """Training loss of every step, estimates on fixed training and validation rows, and the best checkpoint."""
    train, estimates = run.metrics("train"), run.metrics("eval")
    by_token = "validation_perplexity" in estimates[0]
    with style():
        figure, axes = new_figure(height=4.0)
        axes.plot(*_series(train, "loss"), color=TRAIN, alpha=0.3, linewidth=1, label="each step")
        axes.plot(*_series(estimates, "train_loss"), color=TRAIN, marker="o", label="training rows")
        axes.plot(
            *_series(estimates, "validation_loss"),
            color=VALIDATION,
            linestyle=DASHES[1],
            marker="s",
            label="validation rows",
        )
        best = run.status.get("best_step")
        if best is not None and len(estimates) > 1:
            axes.axvline(best, color=MARK, linestyle="--", linewidth=1, label=f"best checkpoint (step {best:,})")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"loss, {loss_unit(run.config, 'sft' if by_token else 'dpo')}")
        thousands(axes)
        legend_above(axes, 4)
        caption = f"Estimates are means over the same rows each time; every {'token' if by_token else 'pair'} has the same weight."
        return to_plate(figure, f"{run.path.name}-loss", "Loss", caption, favoured([run]))


def favoured(runs: Iterable[Run]) -> list[str]:
    """What to say of runs of earlier versions beside their training loss."""
    names = ", ".join(run.path.name for run in runs if run.draws < DRAWS)
    why = "started by an earlier version, which estimated the training loss on the rows that it trained on first, so it is too low"
    return [f"{names}: {why}"] if names else []


def preference_curves(run: Run) -> Plate:
    """Accuracy and reward margin of a preference run: every step, and estimates with 95 % intervals of the accuracy."""
    train, estimates = run.metrics("train"), run.metrics("eval")
    pairs = next(iter(run.metrics("pairs")), {})
    panels = {"accuracy": "pairs with the chosen answer ahead", "margin": "reward margin"}
    with style():
        figure, both = new_figure(1, 2, height=3.6)
        for axes, (name, label) in zip(both, panels.items(), strict=True):
            axes.plot(*_series(train, name), color=TRAIN, alpha=0.3, linewidth=1, label="each step")
            steps, values = _series(estimates, f"validation_{name}")
            axes.plot(steps, values, color=VALIDATION, linestyle=DASHES[1], marker="s", label="validation pairs")
            if name == "accuracy" and (n := pairs.get("validation_pairs")) and values:
                low, high = zip(*(wilson_interval(v * n, n) for v in values), strict=True)
                axes.fill_between(steps, low, high, color=VALIDATION, alpha=0.15, linewidth=0, label="95 % interval")
                by_length = pairs["validation_longer_chosen"]
                axes.axhline(by_length, color=MARK, linestyle="--", linewidth=1, label="the longer answer")
                axes.set_ylim(-0.02, 1.02)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel(label)
            thousands(axes)
            axes.legend(fontsize="small")
        reward = (
            "The reward is beta times the log-ratio to the reference."
            if "dpo" in run.config
            else "The reward is the score."
        )
        caption = f"How often and how far the chosen answer is preferred. {reward}"
        return to_plate(figure, f"{run.path.name}-preferences", "Preferences", caption)


def reward_curve(run: Run) -> Plate:
    """Mean reward of the answers at every estimate with its 95 % interval over the prompts, and the chosen checkpoint."""
    events = run.metrics("reward")
    bounded = [r for r in events if r.get("low") is not None and r.get("high") is not None]
    with style():
        figure, axes = new_figure(height=3.6)
        axes.plot(*_series(events, "mean"), color=VALIDATION, marker="s", label="answers to the prompts")
        axes.fill_between([r["step"] for r in bounded], [r["low"] for r in bounded], [r["high"] for r in bounded],
                          color=VALIDATION, alpha=0.15, linewidth=0, label="95 % interval over the prompts")  # fmt: skip
        choice = run.status.get("choice") or {}
        if (best := choice.get("best_step")) is not None:
            axes.axvline(best, color=MARK, linestyle="--", linewidth=1, label=f"chosen checkpoint (step {best:,})")
        level = [r for r in events if r["step"] in (choice.get("not_distinguishable") or ()) and r["step"] != best]
        if level:
            axes.plot(*_series(level, "mean"), linestyle="", marker="o", markersize=10, markerfacecolor="none",
                      markeredgecolor=MARK, label="not distinguishable from it")  # fmt: skip
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("reward of the answers (score)")
        thousands(axes)
        legend_above(axes, 2)
        scorers = " and ".join(sorted({str(r.get("scorer", "an unnamed model")) for r in events}))
        return to_plate(figure, f"{run.path.name}-reward", "Reward", f"Mean over the prompts, scored by {scorers}.")


def _series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one figure, where it was finite."""
    found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]
