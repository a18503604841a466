"""The report's two tables, and those that this project adds for its experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from tunesmith.jsontext import Json, is_number
from tunesmith.judge.measures import accuracy_interval, examples_of
from tunesmith.study.paper.experiments import (
    BATCH_4,
    FULL,
    OPTIMIZERS,
    PARTS,
    SPLIT,
    dpo_runs,
    judged,
    memory_rows,
    ranks,
)
from tunesmith.study.records import Point, RunRecord, Study, is_signed
from tunesmith.study.select import choice_of, finals, minutes, peaks, present
from tunesmith.study.tables import Cell, Table, of_seeds, plain

PAPER_TABLE_1 = {  # GB, minutes
    "AdamW": (13.52, 200.0),
    "Adam": (13.52, 188.5),
    "SGD-Nesterov": (11.23, 183.5),
    "SGD-momentum": (11.23, 181.8),
    "SGD": (8.41, 170.9),
}
PAPER_TABLE_2 = {"rank 1": 8.0245, "rank 2": 8.0323, "rank 8": 8.0675, "rank 16": 8.1554, "full": 11.7745}


# ---- the paper's two -------------------------------------------------------------------------------------------------


def optimizers(study: Study) -> Table:
    """Table 1: memory and minutes by optimizer."""
    e = study.experiment("e4")
    labels = present(e, *OPTIMIZERS) or e.labels
    memory, left = peaks(e, labels)
    loss, _ = finals(e, labels, "eval", "validation_loss")
    rows = []
    for label in labels:
        gb, spent = PAPER_TABLE_1.get(label, (None, None))
        used, time = of_seeds(memory[label].values(), 2), of_seeds(minutes(e, label).values(), 2)
        last = of_seeds(loss.get(label, {}).values())
        rows.append((Cell(label), used, plain(gb), time, plain(spent, 1), last))
    head = ("optimizer", "memory, GB", "paper, GB", "time, min", "paper, min", "validation loss")
    figures = ("memory, GB", "time, min", "validation loss")
    caption = "Peak memory; time spent in training steps, without estimates; last validation loss. The paper's: gpt2-medium on a P100."
    title = "Memory and time by optimizer"
    return Table("table-1", "e4", title, head, tuple(rows), caption, tuple(left), figures=figures)


def lora_ranks(study: Study) -> Table:
    """Table 2: memory by rank."""
    e = study.experiment("e5")
    labels = [*ranks(e), *present(e, FULL)] or e.labels
    memory, left = peaks(e, labels)
    loss, _ = finals(e, labels, "eval", "validation_loss")
    reward, _ = finals(e, labels, "reward", "mean")
    whole = [p.value for p in memory.get(FULL, {}).values()]
    rows = []
    for label in labels:
        used = memory[label].values()
        paper = PAPER_TABLE_2.get(label)
        count = next((n for r in e.runs(label).values() if (n := r.trained_weights)), None)
        share = 100 * fmean(p.value for p in used) / fmean(whole) if used and whole else None
        shares = plain(share, 1), plain(paper, 4), plain(100 * paper / PAPER_TABLE_2["full"] if paper else None, 1)
        last = of_seeds(loss.get(label, {}).values()), of_seeds(reward.get(label, {}).values(), signed=True)
        rows.append((Cell(label), plain(count, 0), of_seeds(used), *shares, *last))
    of_full = ("% of full", "paper, GB", "paper, % of full")
    head = ("weights trained", "trained parameters", "memory, GB", *of_full, "validation loss", "reward")
    figures = ("memory, GB", "validation loss", "reward")
    caption = "Peak memory; loss and reward at the last step that all runs share. The paper's: gpt2-medium on a P100 of 16 GB."
    return Table("table-2", "e5", "Memory by LoRA rank", head, tuple(rows), caption, tuple(left), figures=figures)


# ---- what is added ---------------------------------------------------------------------------------------------------


def accumulation(study: Study) -> Table:
    """Batch 4 against 4 x 1, step by step."""
    e, rows = study.experiment("e7"), []
    for seed, one in e.runs(BATCH_4).items():
        other = e.runs(SPLIT).get(seed)
        a = {p.step: p for p in one.series("train", "loss")}
        b = {p.step: p for p in other.series("train", "loss")} if other else {}
        shared = sorted(a.keys() & b.keys())
        if not shared:
            continue
        worst = max(shared, key=lambda s: abs(a[s].value - b[s].value))
        for name, step in (("first", shared[0]), ("largest difference", worst), ("last", shared[-1])):
            both = [Cell(f"{p.value:.6f}", sources=(p,)) for p in (a[step], b[step])]
            gap = abs(a[step].value - b[step].value)
            rows.append((Cell(str(seed)), Cell(f"{name}: {step:,}"), *both, Cell(f"{gap:.1e}")))
    head = ("seed", "step", BATCH_4, SPLIT, "difference")
    notes = () if rows else (f"needs runs “{BATCH_4}” and “{SPLIT}” with the same seed",)
    title = "Batch 4 by accumulation versus batch 4 at once: training loss"
    return Table("table-accumulation", "e7", title, head, tuple(rows), notes=notes)


DPO_ROWS = (
    ("loss, nats per pair", "validation_loss"),
    ("accuracy", "validation_accuracy"),
    ("reward margin", "validation_margin"),
    ("reward of the chosen", "validation_chosen_reward"),
    ("reward of the rejected", "validation_rejected_reward"),
    ("drift on the chosen, nats", "validation_drift_chosen"),
    ("drift on the rejected, nats", "validation_drift_rejected"),
    ("loss on the chosen, nats per token", "validation_sft_loss"),
)


def preference(study: Study) -> Table:
    """DPO at step 0 and at the end."""
    runs = [r for r in dpo_runs(study).values() if r.series("eval", "validation_accuracy")]
    rows = []
    for name, key in DPO_ROWS:
        series = [s for r in runs if (s := r.series("eval", key))]
        if series:
            rows.append((Cell(name), *(_share_or_seeds([s[i] for s in series], runs, key) for i in (0, -1))))
    head = ("on the validation pairs", "before", "after")
    left = tuple(f"{r.name}: {r.trouble}" for r in dpo_runs(study).values() if r.trouble)
    caption = (
        f"The accuracy's interval is over the {examples_of(_pairs_of(runs))[1]}. "
        "While policy and reference are equal, the loss is ln 2 = 0.693 "
        "and all else is 0."
    )
    return Table("table-dpo", "e8", "DPO before and after", head, tuple(rows), caption, left, figures=head[1:])


def _pairs_of(runs: Sequence[RunRecord]) -> Json:
    """What the runs logged of their pairs: the same for every seed, so more seeds are no more pairs."""
    return next((r.pairs for r in runs if r.pairs), {})


def _share_or_seeds(points: list[Point], runs: Sequence[RunRecord], key: str) -> Cell:
    pairs = _pairs_of(runs)
    if key == "validation_accuracy" and (share := accuracy_interval(fmean(p.value for p in points), pairs)):
        return Cell(value=share, sources=tuple(points))
    return of_seeds(points, signed=is_signed(key, [r.config for r in runs]))


def prompts(study: Study) -> Table | None:
    """The best and the worst prompts of the chosen checkpoint, beside the paper's."""
    one = next(iter(judged(study)), None)
    if one is None or one.best is None or len(rewards := one.rewards(one.best)) < 2:
        return None
    order = sorted(rewards, key=lambda p: (-rewards[p], p))
    shown = [("best", p) for p in order[:3]] + [("worst", p) for p in order[::-1][: min(3, len(order) - 3) or 1][::-1]]
    rows = tuple((Cell(which), Cell(p), Cell(f"{rewards[p]:.2f}")) for which, p in shown)
    caption = (
        f"{one.run.name}, step {one.best:,}. The paper's best: 2.29, “how blockchain technology works”; "
        "its worst: -3.56, “principles of sustainable architecture”."
    )
    return Table("table-prompts", "e2", "Best and worst prompts", ("", "prompt", "reward"), rows, caption)


def choices(study: Study) -> Table | None:
    """Which checkpoint each run chose, by what, and which cannot be told from it."""
    rows = []
    for run in study.runs.values():
        choice = choice_of(run)
        if not is_number(choice.get("best_step")):
            continue
        best, since = choice["best_step"], choice.get("overfitting_since")
        level = [f"{s:,}" for s in choice.get("not_distinguishable") or [] if s != best]
        by, over = str(choice.get("by", "")).replace("_", " "), "no" if since is None else f"since step {since:,}"
        words = (f"{best:,}", by, "; ".join(level) or "none", over)
        rows.append((Cell(run.name, run=run.name), *map(Cell, words)))
    if not rows:
        return None
    head = ("run", "chosen step", "by", "steps not distinguishable from it", "overfitting")
    return Table("table-choices", "e2", "The checkpoint chosen in each run", head, tuple(rows), folded=len(rows) > 6)


def memory_parts(study: Study) -> Table | None:
    """The numbers of the memory figure."""
    memory = memory_rows(study)
    if not any(parts for _, parts, _ in memory):
        return None
    rows = []
    for label, parts, measured in memory:
        total = sum(parts.values()) if parts else None
        cell = of_seeds(measured, 3)
        error = 100 * (total / cell.value.mean - 1) if total and cell.value and cell.value.mean else None
        rows.append((Cell(label), *(plain(parts.get(p), 3) for p in PARTS), plain(total, 3), cell, plain(error, 1)))
    caption = "Error: predicted over measured, minus 1; on a CPU, the measurement includes Python and its libraries."
    head = ("", *(p.replace("_", " ") for p in PARTS), "predicted, GB", "measured, GB", "error, %")
    title = "Memory by part, in GB of 10⁹ bytes"
    return Table("table-memory", "e4", title, head, tuple(rows), caption, figures=("measured, GB",))


TABLES: dict[str, tuple[str, Callable[[Study], Table | None]]] = {
    "table-1": ("e4", optimizers),
    "table-2": ("e5", lora_ranks),
    "table-prompts": ("e2", prompts),
    "table-choices": ("e2", choices),
    "table-accumulation": ("e7", accumulation),
    "table-dpo": ("e8", preference),
    "table-memory": ("e4", memory_parts),
}


def tables_of(study: Study) -> dict[str, list[Table]]:
    """Experiment -> its tables, for those of the report's experiments that a study has."""
    made: dict[str, list[Table]] = {}
    for name, (key, make) in TABLES.items():
        unwanted = study.tables and name in ("table-1", "table-2") and name not in study.tables
        present_in_study = study.experiment(key).members or (key == "e2" and study.experiment("e1").members)
        if present_in_study and not unwanted and (table := make(study)):
            made.setdefault(key, []).append(table)
    return made
