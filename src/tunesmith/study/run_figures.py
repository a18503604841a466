"""Figures of single runs: losses, preferences, rewards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tunesmith.study.look as look
from tunesmith.files.run import DRAWS, Run
from tunesmith.judge.measures import accuracy_interval
from tunesmith.study.units import loss_unit

HELD_OUT: Any = {"color": look.VALIDATION, "linestyle": look.DASHES[1], "marker": "s"}
BAND: Any = {"color": look.VALIDATION, "alpha": 0.15, "linewidth": 0}


def loss_curve(run: Run) -> look.Plate:
    """Training loss of every step, estimates on fixed training and validation rows, and the best checkpoint."""
    train, estimates = run.metrics("train"), run.metrics("eval")
    by_token = "validation_perplexity" in estimates[0]
    with look.style():
        figure, axes = look.new_figure(height=4.0)
        axes.plot(*_series(train, "loss"), color=look.TRAIN, alpha=0.3, linewidth=1, label="each step")
        axes.plot(*_series(estimates, "train_loss"), color=look.TRAIN, marker="o", label="training rows")
        axes.plot(*_series(estimates, "validation_loss"), **HELD_OUT, label="validation rows")
        best = run.status.get("best_step")
        if best is not None and len(estimates) > 1:
            look.mark_chosen(axes, best, f"best checkpoint (step {best:,})")
        look.name_axes(axes, f"loss, {loss_unit(run.config, 'sft' if by_token else 'dpo')}")
        look.legend_above(axes, 4)
        caption = f"Estimates are means over the same rows each time; every {'token' if by_token else 'pair'} has the same weight."
        return look.to_plate(figure, f"{run.path.name}-loss", "Loss", caption, favoured([run]))


def favoured(runs: Iterable[Run]) -> list[str]:
    """What to say of runs of earlier versions beside their training loss."""
    names = ", ".join(run.path.name for run in runs if run.draws < DRAWS)
    why = "started by an earlier version, which estimated the training loss on the rows that it trained on first, so it is too low"
    return [f"{names}: {why}"] if names else []


def preference_curves(run: Run) -> look.Plate:
    """Accuracy and reward margin of a preference run: every step, and estimates with 95 % intervals of the accuracy."""
    train, estimates = run.metrics("train"), run.metrics("eval")
    pairs = next(iter(run.metrics("pairs")), {})
    panels = {"accuracy": "pairs with the chosen answer ahead", "margin": "reward margin"}
    with look.style():
        figure, both = look.new_figure(1, 2, height=3.6)
        for axes, (name, label) in zip(both, panels.items(), strict=True):
            axes.plot(*_series(train, name), color=look.TRAIN, alpha=0.3, linewidth=1, label="each step")
            steps, values = _series(estimates, f"validation_{name}")
            axes.plot(steps, values, **HELD_OUT, label="validation pairs")
            shares = [share for v in values if (share := accuracy_interval(v, pairs))] if name == "accuracy" else []
            if shares:
                low, high = [share.low for share in shares], [share.high for share in shares]
                axes.fill_between(steps, low, high, **BAND, label="95 % interval")
                by_length = pairs["validation_longer_chosen"]
                axes.axhline(by_length, color=look.MARK, linestyle="--", linewidth=1, label="the longer answer")
                axes.set_ylim(-0.02, 1.02)
            look.name_axes(axes, label)
            axes.legend(fontsize="small")
        reward = "beta times the log-ratio to the reference" if "dpo" in run.config else "the score"
        caption = f"How often and how far the chosen answer is preferred. The reward is {reward}."
        return look.to_plate(figure, f"{run.path.name}-preferences", "Preferences", caption)


def reward_curve(run: Run) -> look.Plate:
    """Mean reward of the answers at every estimate with its 95 % interval over the prompts, and the chosen checkpoint."""
    events = run.metrics("reward")
    bounded = [r for r in events if r.get("low") is not None and r.get("high") is not None]
    with look.style():
        figure, axes = look.new_figure(height=3.6)
        axes.plot(*_series(events, "mean"), color=look.VALIDATION, marker="s", label="answers to the prompts")
        bounds = ([r[key] for r in bounded] for key in ("step", "low", "high"))
        axes.fill_between(*bounds, **BAND, label="95 % interval over the prompts")
        choice = run.status.get("choice") or {}
        if (best := choice.get("best_step")) is not None:
            look.mark_chosen(axes, best, f"chosen checkpoint (step {best:,})")
        level = [r for r in events if r["step"] in (choice.get("not_distinguishable") or ()) and r["step"] != best]
        if level:
            look.mark_alike(axes, *_series(level, "mean"))
        look.name_axes(axes, "reward of the answers (score)")
        look.legend_above(axes, 2)
        scorers = " and ".join(sorted({str(r.get("scorer", "an unnamed model")) for r in events}))
        return look.to_plate(
            figure, f"{run.path.name}-reward", "Reward", f"Mean over the prompts, scored by {scorers}."
        )


def _series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one figure, where it was finite."""
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]
