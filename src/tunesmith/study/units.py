"""What a run's loss is counted in and measured on: which runs can be compared, and what to say of those that cannot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tunesmith.jsontext import Json
from tunesmith.options.training import NOT_IN_NATS
from tunesmith.study.records import Experiment, RunRecord
from tunesmith.train.methods.table import METHODS

TOKEN, PAIR = "nats per target token", "nats per pair"
PAIRWISE = tuple(method.command for method in METHODS.values() if method.pairs)


def loss_unit(config: dict[str, Any], command: str | None) -> str:
    """What a run's loss is counted in: TOKEN, PAIR, or `a pair (ipo)` where it is no negative log-likelihood."""
    if command not in PAIRWISE:
        return TOKEN
    name = (config.get("dpo") or {}).get("loss")
    return f"a pair ({name})" if name in NOT_IN_NATS else PAIR


def unit_of(run: RunRecord) -> str:
    """What a run's loss is counted in, as `loss_unit`; a plan that names no command is known by what the run logged."""
    by_pair = "dpo" in run.config or bool(run.series("eval", "validation_accuracy"))
    return loss_unit(run.config, "dpo" if by_pair else run.plan.get("command"))


def unit_suffix(unit: str) -> str:
    """What tells files of different units apart: nothing, `-pairs`, `-ipo`."""
    return {TOKEN: "", PAIR: "-pairs"}.get(unit, f"-{unit.rpartition('(')[2].rstrip(')')}")


def by_unit(e: Experiment) -> dict[str, list[str]]:
    """Unit -> the labels whose losses are counted in it."""
    labels_of: dict[str, list[str]] = {}
    for label in e.labels:
        for unit in dict.fromkeys(unit_of(run) for run in e.runs(label).values()):
            labels_of.setdefault(unit, []).append(label)
    return labels_of


def comparable(runs: Sequence[RunRecord], what: str = "losses") -> list[str]:
    """Notes where the runs of one figure were trained or measured on different data."""
    runs = [run for run in runs if run.config]
    notes = []
    for key, values in differing(runs).items():
        if what == "rewards" and key.startswith(("dpo.", "the training")):
            continue  # a scorer does not ask how the answers were trained
        each = "; ".join(
            f"{value}: {', '.join(r.name for r, v in zip(runs, values, strict=True) if v == value)}"
            for value in dict.fromkeys(values)
        )
        of = "loss" if key.startswith("dpo.") else "data or model"
        notes.append(f"The runs differ in {of}, so their {what} are not comparable: {key} is {each}")
    return notes


def differing(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """What keeps the losses of these runs from being comparable: option -> its value in each; of runs that have a configuration."""
    groups: dict[str, list[str]] = {}
    runs = [run for run in runs if run.config]
    for run in runs:
        for key, value in measured_on(run.config, run.plan.get("command"), start_of(run)).items():
            groups.setdefault(key, []).append(str(value))
    return {key: v for key, v in groups.items() if len(set(v)) > 1 and len(v) == len(runs)}


NO_CONTENT = ("seed", "split_seed", "root", "rm_static")  # of the data options: the order, and where the data lie
OF_DPO_LOSS = ("loss", "beta", "label_smoothing")


def measured_on(config: Json, command: str | None, start: str) -> dict[str, Any]:
    """What two runs must have in common for their losses to be comparable: data, start, number of rows, what is trained."""
    data, e, t = (config.get(k) or {} for k in ("data", "eval", "train"))
    rows = e["iters"] * t.get("batch_size", 1) if isinstance(e.get("iters"), int) else None
    return {f"data.{k}": v for k, v in data.items() if k not in NO_CONTENT} | {
        "model.name": start,
        "the number of rows per estimate": rows,
        **({"the training": command} if command in PAIRWISE else {}),
        **{f"dpo.{k}": v for k, v in (config.get("dpo") or {}).items() if k in OF_DPO_LOSS},
    }


def rows_seed(config: Json) -> Any:
    """The seed that decided a run's validation rows."""
    data = config.get("data") or {}
    return data.get("seed") if data.get("split_seed") is None else data["split_seed"]


def rows_in_words(runs: Sequence[RunRecord]) -> str:
    """On which validation rows the estimates of these runs were made, for the caption."""
    seeds = {str(rows_seed(run.config)) for run in runs if run.config}
    if len(seeds) > 1:
        return "Estimates on the same rows at every step; different validation rows for each seed."
    shared = "" if differing(runs) else ", with the same validation rows in all runs"
    return f"Estimates on the same rows at every step{shared}."


def start_of(run: RunRecord) -> str:
    """The model that a run starts from; of another run of the study, its name without the seed."""
    name = str((run.config.get("model") or {}).get("name"))
    last, _, step = name.rstrip("/").rpartition("/")[2].partition("@")
    return re.sub(r"-s\d+$", "", last) + step if last in (run.plan.get("needs") or ()) else name
