"""The paper's experiments by name: their labels, and which runs its figures, tables and claims take."""

from __future__ import annotations

from typing import Any

from tunesmith.jsontext import is_number
from tunesmith.study.records import Experiment, Line, Point, RunRecord, Series, Study, last_step, shift_of
from tunesmith.study.select import Judged, present, whole_training

EXPERIMENTS = ("e1", "e1b", "e2", "e4", "e5", "e6", "e7", "e8")
FIRST, CONTINUED = "first half", "continued"  # labels of the two halves of E1's training
PARTS = ("parameters", "gradients", "optimizer_state", "activations", "logits")

OPTIMIZERS = ("AdamW", "Adam", "SGD-Nesterov", "SGD-momentum", "SGD")
BATCH_1, BATCH_4, SPLIT = "batch 1", "batch 4", "batch 4 = 4 x 1"
FULL = "full"


def lines_of(e: Experiment, event: str, key: str) -> list[Line]:
    """One line a label; the two halves of a continued training are one."""
    labels = e.labels
    if not {FIRST, CONTINUED} <= set(labels):
        return [e.line(label, event, key) for label in labels]
    halves = [e.line(label, event, key) for label in (FIRST, CONTINUED)]
    whole = {}
    for seed in sorted(halves[0].seeds.keys() | halves[1].seeds.keys()):
        first, second = (half.seeds.get(seed, []) for half in halves)
        whole[seed] = joined(first, second, e.runs(FIRST).get(seed), e.runs(CONTINUED).get(seed))
    one, other = halves
    missing, signed = one.missing + other.missing, one.signed or other.signed
    merged = Line(f"{FIRST}, then {CONTINUED}", whole, one.partial | other.partial, missing, signed)
    return [merged, *(e.line(x, event, key) for x in labels if x not in (FIRST, CONTINUED))]


def joined(first: Series, second: Series, one: RunRecord | None, other: RunRecord | None) -> Series:
    """One series from those of a run and of its continuation."""
    if one is None or other is None or not first or not second:
        return first or second
    shift, end = shift_of(one, other), last_step(one)
    return [*first, *(Point(p.step + shift, p.value, p.run, p.line) for p in second if p.step + shift > end)]


def ranks(experiment: Experiment) -> list[str]:
    """The labels `rank N`, smallest first."""
    return sorted((x for x in experiment.labels if x.startswith("rank ")), key=lambda x: int(x.split()[1]))


def judged(study: Study) -> list[Judged]:
    """The trainings, one a seed, whose checkpoints E2 judges: those it shows, else E1's."""
    for key in ("e2", "e1"):
        e = study.experiment(key)
        labels = [FIRST, CONTINUED] if {FIRST, CONTINUED} <= set(e.labels) else e.labels[:1]
        seeds = dict.fromkeys(m.seed for m in e.members if m.label in labels)
        trainings = [whole_training([run for x in labels if (run := e.runs(x).get(seed))]) for seed in seeds]
        if trainings := [j for j in trainings if j.at]:
            return trainings
    return []


def dpo_runs(study: Study) -> dict[int, RunRecord]:
    """Seed -> run of E8's first line that was trained with DPO."""
    e = study.experiment("e8")
    labels = [m.label for m in e.members if m.run.plan.get("command") == "dpo" or "dpo" in m.run.config]
    return e.runs(labels[0]) if labels else {}


def memory_rows(study: Study) -> list[tuple[str, dict[str, float], list[Point]]]:
    """(label, predicted GB by part, measured peaks) of the optimizers of E4, the ranks of E5 and the DPO of E8."""
    runs_of = []
    for key in ("e4", "e5"):
        e = study.experiment(key)
        for label in present(e, *OPTIMIZERS) if key == "e4" else [*ranks(e), *present(e, FULL)]:
            shown = label if key == "e4" else "all weights (E5)" if label == FULL else f"LoRA {label}"
            runs_of.append((shown, list(e.runs(label).values())))
    if runs := list(dpo_runs(study).values()):
        runs_of.append(("DPO", runs))
    rows = []
    for label, runs in runs_of:
        parts = next((gb for r in runs if (gb := predicted_gb(r.plan.get("memory")))), {})
        rows.append((label, parts, [r.peak for r in runs if r.peak and r.state == "finished"]))
    return [row for row in rows if row[1] or row[2]]


def predicted_gb(memory: Any) -> dict[str, float]:
    """Predicted GB by part from a run's plan: GB already, or the runner's own count, in bytes and with `optimizer` for its state."""
    if not isinstance(memory, dict):
        return {}
    if "optimizer" in memory:
        memory = {"optimizer_state" if k == "optimizer" else k: v / 1e9 for k, v in memory.items() if is_number(v)}
    return {k: float(memory[k]) for k in PARTS if is_number(memory.get(k))}
