"""A run before its first step, as every method gets it: options resolved, model on its device, data in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.batch import Batch
from tunesmith.data.epochs import Batches
from tunesmith.device import Precision
from tunesmith.train.choice import Sums
from tunesmith.train.resolve import iters_of, precision_of
from tunesmith.train.splits import Splits, load_splits, pair_batches, text_batches
from tunesmith.train.task import LossSum, Task
from tunesmith.train.trainee import AnyConfig, Trainee


@dataclass(frozen=True)
class Data:
    """What a run learns from and is estimated on.

    notes: what was skipped or cut. inputs: what the run is made from besides, by content (`resuming.rows_of`).
    watched: texts on which a run of pairs is estimated too.
    """

    splits: Splits
    train: Batches[Any]
    validation: Batches[Any]
    notes: Sequence[str]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    watched: Batches[Any] | None = None

    def describe(self, batches: Sequence[Batch]) -> str:
        """Where the rows of some training batches come from, the first of each."""
        place = self.train.rows.store.place
        return ", ".join(place(row) for batch in batches for row in batch.sources[:3]) or "random windows"


def load_data(config: AnyConfig, trainee: Trainee, *, pairs: bool = False) -> Data:
    """The rows of `data.name` in batches: pairs, or dialogues and texts.

    Raises: UserError for unusable data, or with `data.strict` for any bad or cut row.
    """
    return in_batches(load_splits(config.data, trainee.tokenizer, pairs=pairs), config, pairs=pairs)


def in_batches(splits: Splits, config: Any, *, pairs: bool) -> Data:
    """Rows that are read, as batches. Raises: UserError with `data.strict` if any had to be cut."""
    train, validation, cut = pair_batches(splits, config) if pairs else text_batches(splits, config)
    return Data(splits, train, validation, [*splits.notes, *cut])


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
        evaluate: Callable[[], tuple[dict[str, float], Sums]],
        train_loss: Callable[[int], float],
        about: str,
        opening: Sequence[tuple[str, dict[str, Any]]] = (),
    ) -> Task[Batch]:
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
