"""What a run learns from: training and validation rows of a data set, and as batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.batch import Batch
from tunesmith.data.cutting import block_size_of
from tunesmith.data.datasets import holdout_rows, open_dataset
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.fingerprint import content_hash
from tunesmith.data.pairs import PairRows
from tunesmith.data.pairstore import PairStore
from tunesmith.data.texts import TextRows, text_rows
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import Form, TokenStore, tokenise
from tunesmith.errors import UserError
from tunesmith.options.configs import AnyConfig
from tunesmith.options.training import DataOptions, DPOConfig

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


@dataclass(frozen=True)
class Data:
    """What a run learns from and is estimated on, in batches.

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

    def pairs_event(self, iters: int) -> tuple[str, dict[str, Any]]:
        """With what the log of a run of pairs opens: how many there are, and what length alone would score on those of an estimate."""
        pairs = self.validation.rows
        numbers = pairs.used(iters)
        share = pairs.longer_chosen(numbers)
        print(
            f"note: in {share:.1%} of the {len(numbers):,} validation pairs the chosen answer is the longer one, in tokens of this model"
        )
        return "pairs", {
            "train_pairs": len(self.train.rows),
            "validation_pairs": len(numbers),
            "validation_prompts": pairs.different_prompts(numbers),
            "validation_longer_chosen": share,
        }


def load_data(config: AnyConfig, tokenizer: Tokenizer, *, pairs: bool = False) -> Data:
    """The rows of `data.name` in batches: pairs, or dialogues and texts.

    Raises: UserError for unusable data, or with `data.strict` for any bad or cut row.
    """
    return in_batches(load_splits(config.data, tokenizer, pairs=pairs), config, pairs=pairs)


def in_batches(splits: Splits, config: AnyConfig, *, pairs: bool = False) -> Data:
    """Rows that are read, as batches. Raises: UserError with `data.strict` if any had to be cut.

    The validation rows have an order of their own, so that runs that differ in `data.seed` are estimated on the same batches.
    """
    data, options = config.data, config.train
    fill_to = FILL_TO if options.compile or options.precision != "fp32" else 1
    layout = BatchLayout(
        data.batching,
        block_size_of(data),
        options.batch_size,
        data.loss_on,
        truncation=data.truncation,
        fill_to=fill_to,
    )
    by_split: dict[str, Any] = {}
    for name, store, rows, seed in (
        ("train", splits.train, splits.train_rows, data.seed),
        ("validation", splits.validation, splits.validation_rows, data.rows_seed),
    ):
        own = replace(layout, seed=seed)
        by_split[name] = PairRows(PairStore(store), rows, own) if pairs else text_rows(store, rows, own)
    cut = [f"{name}: {line}" for name, rows in by_split.items() for line in rows.cut_lines()]
    if data.strict and cut:
        raise UserError(f"--data.strict: {'; '.join(cut)}")
    return Data(splits, Batches(by_split["train"]), Batches(by_split["validation"]), [*splits.notes, *cut])


def watched_texts(name: str, config: DPOConfig, tokenizer: Tokenizer) -> tuple[Batches[TextRows], list[str]]:
    """Validation rows of a data set on whose texts a run of pairs is estimated too, and what was skipped or cut of them."""
    data = replace(config.data, name=name, columns=None, config=None, batching="packed", truncation="auto")
    splits = load_splits(data, tokenizer)
    layout = BatchLayout(
        "packed", block_size_of(data), config.train.batch_size, loss_on=data.loss_on, seed=data.rows_seed
    )
    rows = TextRows(splits.validation, splits.validation_rows, layout)
    cut = [f"validation: {line}" for line in rows.cut_lines()]
    return Batches(rows), [f"{data.name}: {line}" for line in (*splits.notes, *cut)]


def rows_of(store: TokenStore) -> dict[str, Any]:
    """The rows of a split by content: how many, their SHA-256, and name -> SHA-256 of the files that they come from."""
    digest = store.source.content(store.digests)
    return {"rows": store.report.used, "sha256": digest, "files": dict(store.digests)}


def prompts_of(path: str | None) -> dict[str, Any]:
    """A file of prompts by content, as `inputs_of` takes it; nothing where there is none."""
    if path is None or not (file := Path(path).expanduser()).is_file():
        return {}
    digest = content_hash([file])
    return {"prompts": {"rows": None, "sha256": digest, "files": {file.name: digest}}}
