"""Whether a training has made its model worse: judged on the same rows before the first step and later, where losses raise a suspicion.

The losses of single steps are too noisy to judge by: rows differ, and dropout lifts them. So they only give cause to look.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch.amp import GradScaler

from tunesmith.files.run import Run
from tunesmith.train.checkpoint import stored_state
from tunesmith.train.choice import Estimate
from tunesmith.train.step import StepStats

SMALLEST_SCALE = 2.0**-20  # fp16 gradients may overflow and are then scaled anew; below this they are simply infinite
DIVERGED_BY = 1.05  # a loss above that of step 0 by so much, both in the mean of the window and on the rows of step 0
ENDED_BY = 1.5  # what an unsuspected run may end above it: a few steps at a high rate overshoot before they learn
MOST_BATCHES = 32  # micro-batches that are looked at


def batches_to_judge_by(micro_batches: int) -> int:
    """Micro-batches over which a training of so many is judged: a forward pass is a third of a step, so that is little beside it."""
    return min(MOST_BATCHES, max(4, micro_batches // 4))


def batches_judged_by(path: Path, resume: bool, micro_batches: int) -> int:
    """As `batches_to_judge_by`; of a run that is resumed the number that it began with, when it may have been shorter."""
    judged_on = None
    if resume and (saved := Run(path).checkpoints()):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # `load_state` tells what is wrong with it
            judged_on = stored_state(saved[-1][1])["progress"].get("judged_on")
    return judged_on or batches_to_judge_by(micro_batches)


def above(loss: float, before: float, by: float) -> bool:
    """Whether a loss is above another one `by` times that, or no number."""
    return not loss <= before + (by - 1) * abs(before)


def sound_steps(estimates: Iterable[Estimate], loss_before: float | None, diverged_at: int) -> set[int]:
    """The estimated steps from before a divergence: those at which the training loss had not risen itself.

    Args:
        loss_before: on the rows to judge by, before the first step; the yardstick where step 0 was not estimated. It is of
            other rows than the estimates, so a step that is hardly better than the start may be taken for a worse one.
        diverged_at: the step that showed the divergence. It is not sound whatever its estimate says.
    """
    losses = {e.step: e.train_loss for e in estimates if e.step < diverged_at}
    start = losses.get(0, loss_before)
    return {
        step for step, loss in losses.items() if loss is None or start is None or not above(loss, start, DIVERGED_BY)
    }


def broken(stats: StepStats, scaler: GradScaler | None) -> str:
    """What is wrong with a step by itself, or nothing."""
    rescaling = scaler is not None and math.isfinite(stats.loss) and scaler.get_scale() > SMALLEST_SCALE
    if stats.updated or rescaling:
        return ""
    return f"loss {stats.loss:g} or gradient norm {stats.grad_norm:g} is not finite"


@dataclass
class Watch:
    """Looks out for a divergence.

    window: steps whose mean loss is looked at; 0: never.
    before: the loss on the rows to judge by, before the first step.
    look_at: the step after which that loss is to be taken again: the one after the suspicion, which is where a run whose
        steps are read late has none outstanding too.
    """

    window: int
    before: float | None = None
    look_at: int | None = None
    recent: Iterable[float] = ()
    losses: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        self.losses = deque(self.recent, maxlen=self.window or 1)
        if not self.window:  # of a run that had one before
            self.look_at = None

    @property
    def mean(self) -> float:
        """Of the losses in the window."""
        return sum(self.losses) / len(self.losses)

    def take(self, step: int, loss: float) -> None:
        """Take the loss of a step."""
        self.losses.append(loss)
        if not self.window or self.before is None or self.look_at is not None or len(self.losses) < self.window:
            return
        if above(self.mean, self.before, DIVERGED_BY):
            self.look_at = step + 1

    def judge(self, now: float) -> str:
        """What is wrong with the training, or nothing: then the window begins anew. now: the loss on the rows to judge by."""
        assert self.before is not None
        if above(now, self.before, DIVERGED_BY):
            return (
                f"mean loss of the last {len(self.losses)} {'step' if self.window == 1 else 'steps'} {self.mean:.3f} lies above that of "
                f"step 0, {self.before:.3f}, and on the same rows it is {now:.3f} now,"
            )
        self.look_at = None
        self.losses.clear()
        return ""

    def judge_end(self, now: float) -> str:
        """What is wrong with the end of a run, or nothing: also of one that was shorter than the window.

        A loss of pairs begins at that of a coin toss, log 2, and a reward model that a high rate has wrecked comes back to
        nearly that: its scores are all alike then. What gives it away are the steps, whose losses were many times as high.
        Where even the loss on the rows is back at log 2 the run is not worse than it began, and has not diverged.
        """
        assert self.before is not None
        suspected = self.look_at is not None or (len(self.losses) > 0 and above(self.mean, self.before, ENDED_BY))
        if above(now, self.before, DIVERGED_BY if suspected else ENDED_BY):
            return f"the loss was {self.before:.3f} before the first step and is, on the same rows, {now:.3f}"
        return ""
