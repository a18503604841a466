"""The paper's experiments by name: their labels, and which runs its figures, tables and claims take."""

from __future__ import annotations

from tunesmith.study.read import CONTINUED, FIRST, Experiment, Point, RunRecord, Study
from tunesmith.study.select import Judged, predicted_gb, present, whole_training

OPTIMIZERS = ("AdamW", "Adam", "SGD-Nesterov", "SGD-momentum", "SGD")
BATCH_1, BATCH_4, SPLIT = "batch 1", "batch 4", "batch 4 = 4 x 1"
FULL = "full"


def ranks(experiment: Experiment) -> list[str]:
    """The labels `rank N`, smallest first."""
    return sorted((x for x in experiment.labels if x.startswith("rank ")), key=lambda x: int(x.split()[1]))


def judged(study: Study) -> list[Judged]:
    """The trainings, one a seed, whose checkpoints E2 judges: those it shows, else E1's."""
    for key in ("e2", "e1"):
        e = study.experiment(key)
        labels = [FIRST, CONTINUED] if {FIRST, CONTINUED} <= set(e.labels) else e.labels[:1]
        seeds = dict.fromkeys(m.seed for m in e.members if m.label in labels)
        found = [whole_training([run for x in labels if (run := e.runs(x).get(seed))]) for seed in seeds]
        if found := [j for j in found if j.at]:
            return found
    return []


def dpo_runs(study: Study) -> dict[int, RunRecord]:
    """Seed -> run of E8's first line that was trained with DPO."""
    e = study.experiment("e8")
    labels = [m.label for m in e.members if m.run.plan.get("command") == "dpo" or "dpo" in m.run.config]
    return e.runs(labels[0]) if labels else {}


def memory_rows(study: Study) -> list[tuple[str, dict[str, float], list[Point]]]:
    """(label, predicted GB by part, measured peaks) of the optimizers of E4, the ranks of E5 and the DPO of E8."""
    found = []
    for key in ("e4", "e5"):
        e = study.experiment(key)
        for label in present(e, *OPTIMIZERS) if key == "e4" else [*ranks(e), *present(e, FULL)]:
            shown = label if key == "e4" else "all weights (E5)" if label == FULL else f"LoRA {label}"
            found.append((shown, list(e.runs(label).values())))
    if runs := list(dpo_runs(study).values()):
        found.append(("DPO", runs))
    rows = []
    for label, runs in found:
        parts = next((gb for r in runs if (gb := predicted_gb(r.plan.get("memory")))), {})
        rows.append((label, parts, [r.peak for r in runs if r.peak and r.state == "finished"]))
    return [row for row in rows if row[1] or row[2]]
