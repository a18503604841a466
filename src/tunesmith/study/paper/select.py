"""What figures, tables and claims take from a study: last values, peaks, rewards by prompt, the chosen checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tunesmith.study.read import CONTINUED, FIRST, Experiment, Json, Line, Point, RunRecord, Study, is_number, shift_of

OPTIMIZERS = ("AdamW", "Adam", "SGD-Nesterov", "SGD-momentum", "SGD")
BATCH_1, BATCH_4, SPLIT = "batch 1", "batch 4", "batch 4 = 4 x 1"
FULL = "full"
PARTS = ("parameters", "gradients", "optimizer_state", "activations", "logits")


def finals(
    experiment: Experiment, labels: Sequence[str], event: str, key: str
) -> tuple[dict[str, dict[int, Point]], list[str]]:
    """Label -> seed -> value at the last step that all finished runs have, and the runs left out."""
    lines = [experiment.line(label, event, key) for label in labels]
    done = {
        line.label: {s: v for s, v in line.seeds.items() if experiment.runs(line.label)[s].state == "finished"}
        for line in lines
    }
    every = [series for seeds in done.values() for series in seeds.values()]
    shared = set.intersection(*({p.step for p in s} for s in every)) if every else set()
    at = max(shared, default=None)
    left = [note for line in lines for note in line.missing]
    if at is None and every:
        left.append("no step at which all of them have a value")
    return {
        label: {seed: p for seed, series in seeds.items() for p in series if p.step == at}
        for label, seeds in done.items()
    }, left


def peaks(experiment: Experiment, labels: Sequence[str]) -> tuple[dict[str, dict[int, Point]], list[str]]:
    """Label -> seed -> largest memory of the finished runs, and the runs left out."""
    found: dict[str, dict[int, Point]] = {}
    left = []
    for label in labels:
        found[label] = {}
        for seed, run in experiment.runs(label).items():
            if run.state == "finished" and run.peak:
                found[label][seed] = run.peak
            else:
                left.append(f"{label}, seed {seed} ({run.name}): {run.trouble or 'no memory logged'}")
    return found, left


def differences(a: Mapping[int, Point], b: Mapping[int, Point]) -> list[float]:
    """a - b by seed, the seeds that both have."""
    return [a[s].value - b[s].value for s in sorted(a.keys() & b.keys())]


def present(experiment: Experiment, *wanted: str) -> list[str]:
    """Those of the wanted labels that the experiment has."""
    return [label for label in wanted if label in experiment.labels]


def ranks(experiment: Experiment) -> list[str]:
    """The labels `rank N`, smallest first."""
    return sorted((x for x in experiment.labels if x.startswith("rank ")), key=lambda x: int(x.split()[1]))


def prompt_rewards(run: RunRecord, step: int) -> dict[str, float]:
    """Prompt -> reward of its answers (the mean of several)."""
    rewards: dict[str, list[float]] = {}
    for record in run.answers.get(step, ()):
        if is_number(record.get("reward")):
            rewards.setdefault(record["prompt"], []).append(record["reward"])
    return {prompt: fmean(values) for prompt, values in rewards.items()}


def rewarded_steps(run: RunRecord) -> dict[int, dict[str, float]]:
    """Step -> prompt -> reward, of the steps with scored answers."""
    return {step: found for step in run.answers if (found := prompt_rewards(run, step))}


def choice_of(run: RunRecord) -> Json:
    """What a run says of its choice of a checkpoint; empty where it says nothing."""
    choice = run.status.get("choice")
    return choice if isinstance(choice, dict) else {}


def best_step(run: RunRecord) -> int | None:
    """The checkpoint that was chosen: by the run itself, else by the reward, else by the validation loss."""
    chosen = choice_of(run).get("best_step")
    if is_number(chosen):
        return int(chosen)
    scored = {p.step: p.value for p in run.series("reward", "mean")}
    best = max(scored, key=scored.__getitem__) if scored else run.status.get("best_step")
    return best if isinstance(best, int) else None


@dataclass(frozen=True)
class Judged:
    """A training whose answers are there, both halves of a continued one together.

    at: step -> the run and its own step. best: the chosen step, None if it has no answers.
    """

    run: RunRecord
    at: Mapping[int, tuple[RunRecord, int]]
    best: int | None

    def rewards(self, step: int) -> dict[str, float]:
        """Prompt -> reward."""
        run, own = self.at[step]
        return prompt_rewards(run, own)

    def answers(self, step: int) -> Sequence[Json]:
        run, own = self.at[step]
        return run.answers[own]

    def marks(self, *steps: int) -> tuple[Point, ...]:
        """Where the mean rewards of these steps stand in the logs."""
        places = [self.at[s] for s in steps]
        return tuple(p for run, own in places for p in run.series("reward", "mean") if p.step == own)


def judged(study: Study) -> list[Judged]:
    """The trainings, one a seed, whose checkpoints E2 judges: those it shows, else E1's."""
    for key in ("e2", "e1"):
        e = study.experiment(key)
        labels = [FIRST, CONTINUED] if {FIRST, CONTINUED} <= set(e.labels) else e.labels[:1]
        seeds = dict.fromkeys(m.seed for m in e.members if m.label in labels)
        found = [_judged([run for x in labels if (run := e.runs(x).get(seed))]) for seed in seeds]
        if found := [j for j in found if j.at]:
            return found
    return []


def alone(run: RunRecord) -> Judged:
    """A training that is one run."""
    return _judged([run])


def _judged(halves: Sequence[RunRecord]) -> Judged:
    shifts = [0, *(shift_of(halves[0], second) for second in halves[1:])]
    at = {
        step + shift: (run, step)
        for run, shift in reversed([*zip(halves, shifts, strict=True)])
        for step in run.answers
    }
    last, shift = halves[-1], shifts[-1]
    if not last.answers:
        last, shift = halves[0], 0
    best = best_step(last)
    return Judged(last, dict(sorted(at.items())), best + shift if best is not None and best + shift in at else None)


def mean_curve(line: Line) -> list[tuple[int, float]]:
    """(step, mean over the seeds that finished) at the steps that all of them have."""
    whole = [s for seed, s in line.seeds.items() if seed not in line.partial]
    if not whole:
        return []
    by_seed = [{p.step: p.value for p in series} for series in whole]
    return [(step, fmean(s[step] for s in by_seed)) for step in sorted(set.intersection(*(set(s) for s in by_seed)))]


def scorer_words(study: Study, name: str) -> str:
    """A scorer in words; one that the study trained itself by its run and not by where it lies."""
    run = name.rstrip("/").rpartition("/")[2].partition("@")[0]
    return f"this study's {run}" if run in study.runs else name


def dpo_runs(study: Study) -> dict[int, RunRecord]:
    """Seed -> run of E8's first line that was trained with DPO."""
    e = study.experiment("e8")
    labels = [m.label for m in e.members if m.run.plan.get("command") == "dpo" or "dpo" in m.run.config]
    return e.runs(labels[0]) if labels else {}


def predicted_gb(memory: Any) -> dict[str, float]:
    """Predicted GB by part from a run's plan: GB already, or the runner's own count, in bytes and with `optimizer` for its state."""
    if not isinstance(memory, dict):
        return {}
    if "optimizer" in memory:
        memory = {"optimizer_state" if k == "optimizer" else k: v / 1e9 for k, v in memory.items() if is_number(v)}
    return {k: float(memory[k]) for k in PARTS if is_number(memory.get(k))}


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
