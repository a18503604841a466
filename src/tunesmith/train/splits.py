"""Training and validation rows of a data set, and as batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data.cutting import block_size_of
from tunesmith.data.datasets import holdout_rows, open_dataset
from tunesmith.data.pairs import PairBatches
from tunesmith.data.pairstore import PairStore
from tunesmith.data.texts import Batches
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import Form, TokenStore, tokenise
from tunesmith.errors import UserError
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.training import (
    DataOptions,
    DPOConfig,
    RewardConfig,
    SFTConfig,
)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Splits:
    """Training and validation rows, by number: (rows,) int64. When a data set has no test split, both are parts of one store."""

    train: TokenStore
    train_rows: Array
    validation: TokenStore
    validation_rows: Array
    notes: list[str]


def load_splits(data: DataOptions, tokenizer: Tokenizer, *, pairs: bool = False, prose: bool = False) -> Splits:
    """Tokenised rows of a data set; with `pairs` the row numbers are those of preference pairs, with `prose` every row is text.

    Raises: UserError for unusable data, or with `data.strict` for any bad row.
    """
    source = open_dataset(data)
    form: Form = "pairs" if pairs else "prose" if prose else "texts" if data.batching == "windows" else "dialogues"
    size = 3 if pairs else 1  # stored rows a row
    train = tokenise(source, "train", tokenizer, form=form)
    notes = [*source.notes, *train.report.notes, *(f"train: {line}" for line in train.report.lines())]
    bad = dict(train.report.bad)
    if "test" in source.files:
        validation = tokenise(source, "test", tokenizer, form=form)
        notes += [*validation.report.notes, *(f"test: {line}" for line in validation.report.lines())]
        bad |= validation.report.bad
        train_rows, validation_rows = np.arange(len(train) // size), np.arange(len(validation) // size)
    else:
        validation = train
        train_rows, validation_rows = holdout_rows(len(train) // size, data.holdout, data.rows_seed)
        notes.append(
            f"no test split: {len(validation_rows):,} of {len(train) // size:,} rows are held out for validation (--data.holdout)"
        )
    if data.strict and bad:
        raise UserError(f"--data.strict: {'; '.join(n for n in notes if 'skipped' in n)}")
    return Splits(train, train_rows, validation, validation_rows, notes)


def text_batches(splits: Splits, config: SFTConfig | PretrainConfig) -> tuple[Batches, Batches, list[str]]:
    """Training and validation rows as batches, and what had to be cut. Raises: UserError with `data.strict` if anything was."""
    data = config.data
    shared: dict[str, Any] = {
        "batching": data.batching, "block_size": block_size_of(data), "batch_size": config.train.batch_size,
        "loss_on": data.loss_on, "truncation": data.truncation,
        "fill_to": 64 if config.train.compile or config.train.precision != "fp32" else 1,
    }  # fmt: skip
    train = Batches(splits.train, splits.train_rows, seed=data.seed, **shared)
    validation = Batches(splits.validation, splits.validation_rows, seed=data.rows_seed, **shared)
    cut = [
        f"{name}: {line}"
        for name, b in (("train", train), ("validation", validation))
        for t in b.truncations
        for line in t.lines(b.block_size)
    ]
    if data.strict and cut:
        raise UserError(f"--data.strict: {'; '.join(cut)}")
    return train, validation, cut


def pair_batches(splits: Splits, config: DPOConfig | RewardConfig) -> tuple[PairBatches, PairBatches, list[str]]:
    """Training and validation pairs as batches, and what had to be cut. Raises: UserError with `data.strict` if anything was."""
    data = config.data
    shared: dict[str, Any] = {
        "batching": data.batching, "block_size": block_size_of(data), "batch_size": config.train.batch_size,
        "truncation": data.truncation,
        "steady": bool(config.train.compile) or config.train.precision != "fp32",
    }  # fmt: skip
    train = PairBatches(PairStore(splits.train), splits.train_rows, seed=data.seed, **shared)
    validation = PairBatches(PairStore(splits.validation), splits.validation_rows, seed=data.rows_seed, **shared)
    named = (("train", train), ("validation", validation))
    cut = [f"{name}: {line}" for name, batches in named for line in batches.cuts.lines()]
    if data.strict and cut:
        raise UserError(f"--data.strict: {'; '.join(cut)}")
    return train, validation, cut


def describe_pairs(train: PairBatches, validation: PairBatches, iters: int) -> dict[str, Any]:
    """What a run logs of its pairs: how many there are, and what length alone would score on those of an estimate."""
    held = validation.used(iters)
    share = validation.longer_chosen(held)
    print(
        f"note: in {share:.1%} of the {len(held):,} validation pairs the chosen answer is the longer one, in tokens of this model"
    )
    return {"train_pairs": len(train), "validation_pairs": len(held), "validation_longer_chosen": share}
