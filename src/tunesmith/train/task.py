"""One training, whatever its method: as a command prepares it (`Prepared`), and what the method makes of that for the loop (`Task`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.data.batch import Batch
from tunesmith.device import Precision
from tunesmith.options.configs import iters_of, precision_of
from tunesmith.train.choice import Sums
from tunesmith.train.splits import Data
from tunesmith.train.trainee import Trainee

LossSum = Callable[[Batch], Tensor]
"""A batch -> its summed loss, and what is observed beside it, as `step.optimizer_step` takes it."""


Estimated = tuple[dict[str, float], Sums]
"""Metrics by their names in the log, and the validation loss batch by batch."""


Sampled = list[Any]
"""Results of forward passes over the first batches of the training sample, in order."""


@dataclass(frozen=True)
class Task:
    """One training as a command has prepared it: its data, its loss, and the words for both. `session.run_training` carries it out.

    micro_batch: number from 0 -> batch on the device; the same number always gives the same batch.
    per_epoch: micro-batches in an epoch; None where it has no end.
    loss_sum: batch -> its summed loss, as `step.optimizer_step` takes it.
    evaluate: sampled -> metrics, `validation_loss` among them, and that loss batch by batch.
    train_loss: (number of micro-batches, sampled) -> the loss on so many, drawn from all the training rows and always the same.
        sampled: what either of the two has computed of these rows with the weights as they are (`halving.within_memory`);
        the loop empties it when it launches a step.
    describe_rows: says where the rows of the given batches come from, for the message about a divergence.
    counted: what the log calls the number of examples that the loss is a mean over.
    about: the data in words, for the line that is printed before the first step.
    notes: what the user should know before the first step.
    memory: lines about the memory that the training will take.
    observed: names of what `loss_sum` gives beside the loss.
    opening: (event, values) to log at the very start of a run.
    reward_at: step -> what to log of the rewards of its answers, which then choose the best checkpoint; None: the validation
        loss chooses.
    """

    micro_batch: Callable[[int], Batch]
    per_epoch: int | None
    loss_sum: LossSum
    evaluate: Callable[[Sampled], Estimated]
    train_loss: Callable[[int, Sampled], float]
    describe_rows: Callable[[Sequence[Batch]], str]
    counted: str
    about: str
    notes: Sequence[str] = ()
    memory: Sequence[str] = ()
    observed: Sequence[str] = ()
    opening: Sequence[tuple[str, dict[str, Any]]] = ()
    reward_at: Callable[[int], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Prepared:
    """What a method makes the task of a run from. config: resolved; path: the run's directory; counted, observed: the method's."""

    config: Any
    path: Path
    trainee: Trainee
    device: torch.device
    data: Data
    counted: str
    observed: Sequence[str] = ()

    @property
    def precision(self) -> Precision:
        """The arithmetic."""
        return precision_of(self.config)

    @property
    def iters(self) -> int:
        """Batches of each split in an estimate."""
        return iters_of(self.config)

    def task(
        self,
        loss_sum: LossSum,
        evaluate: Callable[[Sampled], Estimated],
        train_loss: Callable[[int, Sampled], float],
        about: str,
        opening: Sequence[tuple[str, dict[str, Any]]] = (),
    ) -> Task:
        """The task with what all methods have alike. about: the data in words."""
        train, device = self.data.train, self.device
        return Task(
            micro_batch=lambda number: train[number].to(device),
            per_epoch=train.per_epoch,
            loss_sum=loss_sum,
            evaluate=evaluate,
            train_loss=train_loss,
            describe_rows=self.data.describe,
            counted=self.counted,
            about=about,
            notes=self.data.notes,
            observed=self.observed,
            opening=opening,
        )
