"""Which checkpoint of a run to use, which ones cannot be told from it, and whether the run overfits. No torch.

Everything is paired: two checkpoints answered the same prompts with the same luck, and were estimated on the same rows,
so what is compared is the difference example by example and not two means with the spread of the examples in both.
The best is picked after looking at all of them. Each of the others is therefore held against it at the level
1 - 0.05 / (checkpoints - 1) (Bonferroni), so that with 95 % the truly best one is among those that are not ruled out.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tunesmith.files.answers import read_answers, rewards
from tunesmith.files.run import Run, step_name
from tunesmith.stats import Interval, paired_difference, ratio_interval

Sums = Sequence[tuple[float, int]]
"""A loss estimate batch by batch: (summed loss, how many it is a sum of)."""


@dataclass(frozen=True)
class Estimate:
    """A loss estimate at a step. parts: the validation loss batch by batch, empty where nobody kept it."""

    step: int
    train_loss: float | None
    validation_loss: float
    parts: Sums = ()


@dataclass(frozen=True)
class Choice:
    """What `choose` found. not_distinguishable: the other steps whose difference from the best may be chance."""

    best_step: int
    by: Literal["reward", "validation_loss"]
    not_distinguishable: tuple[int, ...]
    overfitting_since: int | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "not_distinguishable": list(self.not_distinguishable)}


def loss_difference(a: Sums, b: Sums, *, level: float = 0.95) -> Interval:
    """Loss of a minus loss of b, estimated on the same batches, with its bootstrap interval over the batches.

    Raises: ValueError if the batches differ.
    """
    counts = [n for _, n in a]
    if not counts or counts != [n for _, n in b]:
        raise ValueError("losses on different batches cannot be compared")
    return ratio_interval([x - y for (x, _), (y, _) in zip(a, b, strict=True)], counts, level=level)


def choose(
    estimates: Sequence[Estimate], by_prompt: Mapping[int, Sequence[float]], available: Collection[int] | None = None
) -> Choice | None:
    """The checkpoint to use; None where nothing was estimated.

    With rewards: of the steps that cannot be told from the one with the highest mean reward, the one with the lowest
    validation loss; the highest of forty noisy means is mostly luck. Without: the one with the lowest validation loss.

    Args:
        by_prompt: step -> rewards of the same prompts in the same order.
        available: steps that can be chosen, those with a checkpoint; None: all.
    """
    loss = {e.step: e.validation_loss for e in estimates}
    since = overfitting_since(estimates)
    if by_prompt:
        top = max(by_prompt, key=lambda s: (np.mean(by_prompt[s]), -s))
        level = 1 - 0.05 / max(1, len(by_prompt) - 1)
        alike = [
            s for s, r in by_prompt.items() if s == top or not apart(paired_difference(by_prompt[top], r, level=level))
        ]
        there = [s for s in alike if available is None or s in available]
        there = there or [s for s in by_prompt if available is not None and s in available] or [top]
        best = min(there, key=lambda s: (loss.get(s, np.inf), s))
        return Choice(best, "reward", tuple(sorted(set(alike) - {best})), since)
    if not estimates:
        return None
    lowest = min(estimates, key=lambda e: (e.validation_loss, e.step))
    others = [e for e in estimates if e is not lowest and comparable(e, lowest)]
    level = 1 - 0.05 / max(1, len(others))
    alike = [e.step for e in others if not apart(loss_difference(e.parts, lowest.parts, level=level))]
    return Choice(lowest.step, "validation_loss", tuple(sorted(alike)), since)


def comparable(a: Estimate, b: Estimate) -> bool:
    """Whether both kept their batches, the same ones, and enough of them to have a spread."""
    return len(a.parts) > 1 and [n for _, n in a.parts] == [n for _, n in b.parts]


def apart(difference: Interval) -> bool:
    """Whether a difference is surely not 0."""
    return difference.low > 0 or difference.high < 0


def overfitting_since(estimates: Sequence[Estimate]) -> int | None:
    """The step of the lowest validation loss, if after it validation loss rose while training loss fell.

    Asked for: at least two estimates after the lowest, the last of them surely higher on the same rows (where the
    batches were kept, else by 1 %), and a lower training loss than at the lowest. None otherwise.
    """
    if not estimates:
        return None
    lowest = min(estimates, key=lambda e: (e.validation_loss, e.step))
    after = [e for e in estimates if e.step > lowest.step]
    if len(after) < 2 or lowest.train_loss is None:
        return None
    last = max(after, key=lambda e: e.step)
    if comparable(last, lowest):
        rose = loss_difference(last.parts, lowest.parts).low > 0
    else:
        rose = last.validation_loss > 1.01 * lowest.validation_loss
    return lowest.step if rose and last.train_loss is not None and last.train_loss < lowest.train_loss else None


# ---- from a run's directory ------------------------------------------------------------------------------------------


def read_estimates(run: Run) -> list[Estimate]:
    """The loss estimates of a run that were finite, in order."""
    return [
        Estimate(e["step"], e.get("train_loss"), e["validation_loss"], run.losses(e["step"]))
        for e in run.metrics("eval")
        if e["validation_loss"] is not None
    ]


def read_rewards(run: Run) -> dict[int, list[float]]:
    """Step -> the reward of every prompt, of the steps whose answers were scored during the training."""
    by_step = {}
    for event in run.metrics("reward"):
        answers = read_answers(run.path / "answers" / f"{step_name(event['step'])}.jsonl")
        by_step[int(event["step"])] = list(rewards(answers).values())
    return by_step


def choose_checkpoint(run: Run, available: Collection[int], *, among: Collection[int] | None = None) -> Choice | None:
    """`choose` on what a run has logged; with `among`, on what it has logged of these steps, and none but these."""
    estimates, by_prompt = read_estimates(run), read_rewards(run)
    if among is not None:
        estimates = [e for e in estimates if e.step in among]
        by_prompt = {step: values for step, values in by_prompt.items() if step in among}
    return choose(estimates, by_prompt, available)


def choice_lines(choice: Choice, estimates: Sequence[Estimate], run: Run | None = None) -> list[str]:
    """The choice in words; with the checkpoint's directory where the `run` is given of which it is."""
    reasons = ["by reward, then validation loss" if choice.by == "reward" else "by validation loss"]
    if run and (directory := dict(run.checkpoints()).get(choice.best_step)):
        reasons += [shlex.quote(str(directory)), f"MODEL {shlex.quote(str(run.path))} selects it"]
    line = f"best checkpoint: step {choice.best_step:,} ({'; '.join(reasons)})"
    if choice.not_distinguishable:
        line += f"; not distinguishable from it: {', '.join(f'{s:,}' for s in choice.not_distinguishable)}"
    lines = [line]
    if choice.best_step == 0:
        lines.append("note: step 0 is the model before training: no later estimate is better than its own")
    if choice.overfitting_since is None:
        return lines
    first = next(e for e in estimates if e.step == choice.overfitting_since)
    last = max(estimates, key=lambda e: e.step)
    return [
        *lines,
        f"overfitting since step {first.step:,}: validation loss rose from {first.validation_loss:.3f} to "
        f"{last.validation_loss:.3f} while training loss fell from {first.train_loss:.3f} to {last.train_loss:.3f}; "
        "--eval.patience 3 would stop there",
    ]
