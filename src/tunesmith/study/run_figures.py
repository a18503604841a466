"""Figures of single runs: losses, preferences, rewards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tunesmith.files.run import DRAWS, Run
from tunesmith.judge.measures import accuracy_interval
from tunesmith.study.look import (
    DASHES,
    MARK,
    TRAIN,
    VALIDATION,
    Plate,
    legend_above,
    new_figure,
    style,
    thousands,
    to_plate,
)
from tunesmith.study.units import loss_unit


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
            shares = [share for v in values if (share := accuracy_interval(v, pairs))] if name == "accuracy" else []
            if shares:
                low, high = [share.low for share in shares], [share.high for share in shares]
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
        axes.fill_between(
            [r["step"] for r in bounded],
            [r["low"] for r in bounded],
            [r["high"] for r in bounded],
            color=VALIDATION,
            alpha=0.15,
            linewidth=0,
            label="95 % interval over the prompts",
        )
        choice = run.status.get("choice") or {}
        if (best := choice.get("best_step")) is not None:
            axes.axvline(best, color=MARK, linestyle="--", linewidth=1, label=f"chosen checkpoint (step {best:,})")
        level = [r for r in events if r["step"] in (choice.get("not_distinguishable") or ()) and r["step"] != best]
        if level:
            axes.plot(
                *_series(level, "mean"),
                linestyle="",
                marker="o",
                markersize=10,
                markerfacecolor="none",
                markeredgecolor=MARK,
                label="not distinguishable from it",
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("reward of the answers (score)")
        thousands(axes)
        legend_above(axes, 2)
        scorers = " and ".join(sorted({str(r.get("scorer", "an unnamed model")) for r in events}))
        return to_plate(figure, f"{run.path.name}-reward", "Reward", f"Mean over the prompts, scored by {scorers}.")


def _series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one figure, where it was finite."""
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]
