"""Which rows of a data set a model was trained on: by the words of the rows, from the configuration of the model's run.

A row counts where its whole text is the same but for case and white space. Left out: rows that only share a prompt, and
rows of a training that stopped before it reached them, which count all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.audit.overlap import fingerprint
from tunesmith.data.datasets import Source, holdout_rows, open_dataset
from tunesmith.data.dialogue import Preference
from tunesmith.data.readers import Report
from tunesmith.errors import UserError
from tunesmith.files.names import run_and_step
from tunesmith.files.places import located, located_sets
from tunesmith.files.run import Run
from tunesmith.options.training import DataOptions
from tunesmith.train.methods.table import METHODS

Array = np.ndarray[Any, Any]


def training_runs(model: str) -> list[Run]:
    """The run that a MODEL is a checkpoint of, and those that it started from, as far as they are on this machine."""
    runs: list[Run] = []
    at = run_and_step(model)
    while at and at[0].path.resolve() not in (run.path.resolve() for run in runs):
        runs.append(at[0])
        try:
            start = at[0].config.get("model", {})
            name = located(at[0], str(start.get("name")))
            here = Path(name.partition("@")[0]).expanduser().is_dir()
            at = run_and_step(name) if here and start.get("init") == "pretrained" else None
        except (UserError, OSError):  # without a configuration, or no model any more
            break
    return runs


def trained_rows(runs: Sequence[Run], source: Source, split: str, *, pairs: bool) -> tuple[Array, list[str]]:
    """(rows,) bool, True for a row that one of the runs was trained on, and what is not known or has to be said of it.

    pairs: rows are preferences, and one counts if one of its two texts was trained on.
    """
    prints = [fingerprint(row.value).texts for row in source.rows(split, Report(), pairs=pairs)]
    wanted = {text for texts in prints for text in texts}
    trained, notes = np.zeros(len(prints), np.bool_), []
    for run in runs:
        try:
            learned, changed = _texts_of(run, wanted)
        except (UserError, OSError) as error:
            notes.append(
                f"it is unknown which of these rows {run.path} was trained on: its data cannot be read ({error})"
            )
            continue
        if changed:
            notes.append(f"the training data of {run.path} have changed since; rows are compared with the current data")
        trained |= [not learned.isdisjoint(texts) for texts in prints]
    return trained, notes


def _texts_of(run: Run, wanted: Collection[bytes]) -> tuple[set[bytes], bool]:
    """Those of the wanted fingerprints that the run's training rows have; and whether its files are others now."""
    config, inputs = run.config, run.inputs or {}
    if "data" not in config:
        raise UserError(f"{run.path / 'config.yaml'} names none")
    known = {field.name for field in dataclasses.fields(DataOptions)}
    options = DataOptions(**{k: v for k, v in config["data"].items() if k in known})
    options = dataclasses.replace(
        options,
        name=located_sets(run, options.name),
        root=options.root and located(run, options.root),
        rm_static=options.rm_static and located(run, options.rm_static),
    )
    method = METHODS.get(inputs.get("command", "dpo" if "dpo" in config else ""))
    pairs = method is not None and method.pairs
    source, among = open_dataset(options), frozenset(wanted)
    hits, count = [], 0
    for row in source.rows("train", Report(), pairs=pairs, as_text=options.batching == "windows"):
        texts = fingerprint(row.value).texts
        if isinstance(row.value, Preference) and not pairs:
            texts = texts[:1]  # only the chosen answer was learned
        if not among.isdisjoint(texts):
            hits.append((count, texts))
        count += 1
    held = set() if "test" in source.files else set(holdout_rows(count, options.holdout, options.rows_seed)[1].tolist())
    now = source.content(source.digests("train"))
    changed = "train" in inputs and inputs["train"]["sha256"] != now
    return {text for row, texts in hits if row not in held for text in texts}, changed
