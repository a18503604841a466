"""The course of a training: what happens after which step (`Timetable`), and how far it has come (`TrainingState`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tunesmith.options.configs import AnyConfig, iters_of
from tunesmith.train.divergence import Watch
from tunesmith.train.optim import schedule_factor
from tunesmith.train.resolve import batches_of_step, passes_of


@dataclass(frozen=True)
class Timetable:
    """What happens when, counted in steps from 1; step 0 is the moment before the first.

    numbers: step -> the numbers of its micro-batches; steps follow each other.
    learning_rate: step -> the rate of its update.
    eval_iters: batches of each split in an estimate.
    eval_cost: forward passes of an estimate, as many micro-batches as it reads, in times of a step.
    keep: newest checkpoints that are kept; the best ones always are.
    patience: estimates without a lower validation loss after which the training is over; None: it takes all its steps.
    diverge_after: steps in the window of `divergence.Watch`; 0: nobody looks.
    """

    steps: int
    numbers: Callable[[int], range]
    learning_rate: Callable[[int], float]
    eval_every: int
    eval_at_start: bool
    eval_iters: int
    eval_cost: float
    checkpoint_every: int
    keep: int
    patience: int | None
    diverge_after: int

    @property
    def micro_batches(self) -> int:
        """Of the whole training."""
        return self.numbers(self.steps)[-1] + 1

    def estimates_after(self, step: int) -> bool:
        """Whether the losses are estimated between this step and the next; the last step's always are."""
        return step % self.eval_every == 0 or step == self.steps

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due by the step alone, whatever the estimates say."""
        return step % self.checkpoint_every == 0 or step == self.steps


def timetable_of(config: AnyConfig, per_epoch: int | None) -> Timetable:
    """When what happens in a run of this resolved configuration. per_epoch: micro-batches; None where epochs have no ends."""
    o, t, e = config.optimizer, config.train, config.eval
    steps, peak, warmup_steps = t.steps, o.lr, o.warmup_steps
    assert steps is not None and peak is not None and warmup_steps is not None  # noqa: PT018
    assert e.every is not None and config.checkpoint.every is not None  # noqa: PT018
    return Timetable(
        steps=steps,
        numbers=partial(batches_of_step, accumulate=t.accumulate, per_epoch=per_epoch),
        learning_rate=lambda step: peak * schedule_factor(o.schedule, step, steps=steps, warmup_steps=warmup_steps),
        eval_every=e.every,
        eval_at_start=e.at_start,
        eval_iters=iters_of(config),
        eval_cost=2 * iters_of(config) / passes_of(config),
        checkpoint_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        patience=e.patience,
        diverge_after=t.diverge_after,
    )


@dataclass
class TrainingState:
    """Where a training stands; stored with each checkpoint, field by field."""

    step: int = 0
    tokens: int = 0  # through the model, padding not counted
    examples: int = 0  # what the loss is a mean over: target tokens, or pairs
    judged_on: int = 0  # micro-batches whose loss a divergence is judged by (`divergence.Watch`), as the next three
    loss_before: float | None = None
    look_at: int | None = None
    recent: list[float] = field(default_factory=list)
    best_loss: float | None = None
    lowest_step: int | None = None  # where the validation loss was lowest
    since_lowest: int = 0  # estimates since then
    best_step: int | None = None  # the checkpoint to use
    split_limit: int | None = None  # tokens of the largest micro-batch that fits, where one did not
    split_setup: str = ""  # with this model, precision and device
    owes_estimate: bool = False  # of this step: not begun yet, or a stop has cut it short

    def take_estimate(self, validation_loss: float) -> None:
        """The validation loss of this step: until a reward says otherwise, the lowest chooses the checkpoint to use."""
        if self.best_loss is None or validation_loss < self.best_loss:
            self.best_loss, self.lowest_step, self.since_lowest = validation_loss, self.step, 0
        else:
            self.since_lowest += 1
        self.best_step = self.lowest_step

    def take_watch(self, watch: Watch) -> None:
        """What the watch for a divergence needs to go on from here."""
        self.recent, self.look_at = list(watch.losses), watch.look_at
