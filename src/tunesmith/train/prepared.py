"""A run before its first step, as every method gets it: options resolved, model on its device, data in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.batch import Batch
from tunesmith.data.cutting import block_size_of
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.texts import TextRows
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.device import Precision
from tunesmith.options.training import DPOConfig
from tunesmith.train.resolve import iters_of, precision_of
from tunesmith.train.splits import Splits, describe_pairs, load_splits, pair_batches, text_batches
from tunesmith.train.task import Estimated, LossSum, Sampled, Task
from tunesmith.train.trainee import AnyConfig, Trainee


@dataclass(frozen=True)
class Data:
    """What a run learns from and is estimated on.

    notes: what was skipped or cut. watched: texts on which a run of pairs is estimated too.
    """

    splits: Splits
    train: Batches[Any]
    validation: Batches[Any]
    notes: Sequence[str]
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


def watched_texts(name: str, config: DPOConfig, tokenizer: Tokenizer) -> tuple[Batches[TextRows], list[str]]:
    """Validation rows of a data set on whose texts a run of pairs is estimated too, and what was skipped or cut of them."""
    data = dataclasses.replace(config.data, name=name, columns=None, config=None, batching="packed", truncation="auto")
    splits = load_splits(data, tokenizer)
    layout = BatchLayout(
        batching="packed",
        block_size=block_size_of(data),
        batch_size=config.train.batch_size,
        loss_on=data.loss_on,
        seed=data.rows_seed,
    )
    rows = TextRows(splits.validation, splits.validation_rows, layout)
    cut = [f"validation: {line}" for line in rows.cut_lines()]
    return Batches(rows), [f"{data.name}: {line}" for line in (*splits.notes, *cut)]


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

    def pairs_event(self) -> tuple[str, dict[str, Any]]:
        """With what the log of a run of pairs opens."""
        return "pairs", describe_pairs(self.data.train.rows, self.data.validation.rows, self.iters)

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
