"""What figures, tables and claims take from a study: last values, peaks, rewards by prompt, the chosen checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from tunesmith.jsontext import Json, is_number
from tunesmith.study.records import Experiment, Line, Point, RunRecord, Study, shift_of


def rows_of_step(run: RunRecord) -> int:
    """Rows that one optimizer step of a run reads."""
    train = run.config.get("train") or {}
    return int(train.get("batch_size", 1) * train.get("accumulate", 1))


def over_rows(experiment: Experiment, line: Line) -> Line:
    """The line over the rows read so far in place of steps, for runs whose steps differ in size."""
    runs = experiment.runs(line.label)
    rows = {seed: rows_of_step(runs[seed]) for seed in line.seeds}
    return replace(line, seeds={s: [replace(p, step=p.step * rows[s]) for p in line.seeds[s]] for s in line.seeds})


def finals(
    experiment: Experiment, labels: Sequence[str], event: str, key: str, *, by_rows: bool = False
) -> tuple[dict[str, dict[int, Point]], list[str]]:
    """Label -> seed -> value at the last step that all finished runs have, and the runs left out.

    by_rows: at the last number of rows that all have read.
    """
    lines = [experiment.line(label, event, key) for label in labels]
    done = {
        line.label: {s: v for s, v in line.seeds.items() if experiment.runs(line.label)[s].state == "finished"}
        for line in lines
    }
    size = {
        (label, seed): rows_of_step(experiment.runs(label)[seed]) if by_rows else 1
        for label, seeds in done.items()
        for seed in seeds
    }
    every = [{p.step * size[label, s] for p in series} for label, seeds in done.items() for s, series in seeds.items()]
    at = max(set.intersection(*every), default=None) if every else None
    left = [note for line in lines for note in line.missing]
    if at is None and every:
        left.append("no step at which all of them have a value")
    return {
        label: {seed: p for seed, series in seeds.items() for p in series if p.step * size[label, seed] == at}
        for label, seeds in done.items()
    }, left


def peaks(experiment: Experiment, labels: Sequence[str]) -> tuple[dict[str, dict[int, Point]], list[str]]:
    """Label -> seed -> largest memory of the finished runs, and the runs left out."""
    by_label: dict[str, dict[int, Point]] = {}
    left = []
    for label in labels:
        by_label[label] = {}
        for seed, run in experiment.runs(label).items():
            if run.state == "finished" and run.peak:
                by_label[label][seed] = run.peak
            else:
                left.append(f"{label}, seed {seed} ({run.name}): {run.trouble or 'no memory logged'}")
    return by_label, left


def minutes(experiment: Experiment, label: str) -> dict[int, Point]:
    """Seed -> time spent in training steps, of the finished runs."""
    runs = experiment.runs(label).items()
    return {seed: run.minutes for seed, run in runs if run.state == "finished" and run.minutes}


def differences(a: Mapping[int, Point], b: Mapping[int, Point]) -> list[float]:
    """a - b by seed, the seeds that both have."""
    return [a[s].value - b[s].value for s in sorted(a.keys() & b.keys())]


def present(experiment: Experiment, *wanted: str) -> list[str]:
    """Those of the wanted labels that the experiment has."""
    return [label for label in wanted if label in experiment.labels]


def rewards_by_prompt(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Prompt -> mean reward of its answers, those that have one."""
    rewards: dict[str, list[float]] = {}
    for record in records:
        if is_number(record.get("reward")):
            rewards.setdefault(record["prompt"], []).append(record["reward"])
    return {prompt: fmean(values) for prompt, values in rewards.items()}


def prompt_rewards(run: RunRecord, step: int) -> dict[str, float]:
    """Prompt -> reward of its answers (the mean of several)."""
    return rewards_by_prompt(run.answers.get(step, ()))


def mean_by_prompt(several: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Prompt -> mean over the trainings, the prompts that all of them answered."""
    shared = set.intersection(*(set(r) for r in several))
    return {prompt: fmean(r[prompt] for r in several) for prompt in shared}


def rewarded_steps(run: RunRecord) -> dict[int, dict[str, float]]:
    """Step -> prompt -> reward, of the steps with scored answers."""
    return {step: rewards for step in run.answers if (rewards := prompt_rewards(run, step))}


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


def alone(run: RunRecord) -> Judged:
    """A training that is one run."""
    return whole_training([run])


def whole_training(halves: Sequence[RunRecord]) -> Judged:
    shifts = [0, *(shift_of(halves[0], second) for second in halves[1:])]
    backwards = reversed([*zip(halves, shifts, strict=True)])  # where both have a step, the first half's counts
    at = {step + shift: (run, step) for run, shift in backwards for step in run.answers}
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
