"""Training and validation rows of a data set, and as batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tunesmith.data.cutting import block_size_of
from tunesmith.data.datasets import holdout_rows, open_dataset
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.pairs import PairRows
from tunesmith.data.pairstore import PairStore
from tunesmith.data.texts import TextRows, WindowRows, text_rows
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import Form, TokenStore, tokenise
from tunesmith.errors import UserError
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.training import DataOptions, DPOConfig, RewardConfig, SFTConfig

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


FILL_TO = 64  # targets of a batch are filled up to a multiple of this where shapes are to be steady
TextBatches = Batches[TextRows | WindowRows]
PairBatches = Batches[PairRows]


def text_batches(splits: Splits, config: SFTConfig | PretrainConfig) -> tuple[TextBatches, TextBatches, list[str]]:
    """Training and validation rows as batches, and what had to be cut. Raises: UserError with `data.strict` if anything was."""
    layout, validation_layout = layouts(config)
    train = Batches(text_rows(splits.train, splits.train_rows, layout))
    validation = Batches(text_rows(splits.validation, splits.validation_rows, validation_layout))
    return train, validation, _cut_lines(config.data, train.rows, validation.rows)


def pair_batches(splits: Splits, config: DPOConfig | RewardConfig) -> tuple[PairBatches, PairBatches, list[str]]:
    """Training and validation pairs as batches, and what had to be cut. Raises: UserError with `data.strict` if anything was."""
    layout, validation_layout = layouts(config)
    train = Batches(PairRows(PairStore(splits.train), splits.train_rows, layout))
    validation = Batches(PairRows(PairStore(splits.validation), splits.validation_rows, validation_layout))
    return train, validation, _cut_lines(config.data, train.rows, validation.rows)


def layouts(config: SFTConfig | PretrainConfig | DPOConfig | RewardConfig) -> tuple[BatchLayout, BatchLayout]:
    """How training and validation rows are laid out; they differ in the seed of their order.

    Validation has the seed of the rows, so that runs that differ in `data.seed` are estimated on the same batches.
    """
    data, train = config.data, config.train
    layout = BatchLayout(
        batching=data.batching,
        block_size=block_size_of(data),
        batch_size=train.batch_size,
        loss_on=data.loss_on,
        truncation=data.truncation,
        seed=data.seed,
        fill_to=FILL_TO if train.compile or train.precision != "fp32" else 1,
    )
    return layout, replace(layout, seed=data.rows_seed)


def _cut_lines(
    data: DataOptions, train: TextRows | WindowRows | PairRows, validation: TextRows | WindowRows | PairRows
) -> list[str]:
    """What had to be cut, for the user. Raises: UserError with `data.strict` if anything was."""
    lines = [
        f"{name}: {line}" for name, rows in (("train", train), ("validation", validation)) for line in rows.cut_lines()
    ]
    if data.strict and lines:
        raise UserError(f"--data.strict: {'; '.join(lines)}")
    return lines


def describe_pairs(train: PairRows, validation: PairRows, iters: int) -> dict[str, Any]:
    """What a run logs of its pairs: how many there are, and what length alone would score on those of an estimate."""
    numbers = validation.used(iters)
    share = validation.longer_chosen(numbers)
    print(
        f"note: in {share:.1%} of the {len(numbers):,} validation pairs the chosen answer is the longer one, in tokens of this model"
    )
    return {
        "train_pairs": len(train),
        "validation_pairs": len(numbers),
        "validation_prompts": validation.different_prompts(numbers),
        "validation_longer_chosen": share,
    }
