"""The figures of an experiment: losses by label, rewards, preferences; and those of an experiment of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tunesmith.study.look as look
from tunesmith.files.run import Run
from tunesmith.jsontext import is_number
from tunesmith.judge.measures import accuracy_interval, examples_of
from tunesmith.study.lines import (
    count_validations,
    curves,
    draw_line,
    finish,
    members_of,
    missing_notes,
    seeds_in_words,
)
from tunesmith.study.look import Plate
from tunesmith.study.records import Experiment, Line, Study
from tunesmith.study.run_figures import favoured
from tunesmith.study.select import Judged, alone, best_step, choice_of, mean_curve, over_rows, scorer_words
from tunesmith.study.units import by_unit, comparable, rows_in_words, unit_of, unit_suffix


@dataclass(frozen=True)
class Missing:
    """A figure that cannot be drawn, and why."""

    name: str
    title: str
    reason: str


Drawn = Plate | Missing


@dataclass(frozen=True)
class Spec:
    """A figure: its name, number or letter in the page, experiment, title, and what draws it."""

    name: str
    experiment: str
    title: str
    draw: Callable[[Study, Spec], Drawn]

    def missing(self, reason: str) -> Missing:
        return Missing(self.name, self.title, reason)


def by_label(
    key: str, wanted: Callable[[Experiment], Sequence[str]], *, by_rows: bool = False
) -> Callable[[Study, Spec], Drawn]:
    """Training or validation loss with one line a label. by_rows: over rows read, where steps differ in size."""

    def draw(study: Study, spec: Spec) -> Drawn:
        e = study.experiment(spec.experiment)
        lines = [e.line(label, "eval", key) for label in wanted(e)]
        lines = [over_rows(e, line) for line in lines] if by_rows else lines
        if not any(line.seeds for line in lines):
            return spec.missing("; ".join(missing_notes(lines)) or "no run has the required label")
        figure, axes = look.new_figure()
        runs = members_of(e, [line.label for line in lines])
        curves(axes, lines, f"loss, {unit_of(runs[0])}", "rows read" if by_rows else look.STEPS)
        rows = "Estimates on the same training rows at every step." if key == "train_loss" else rows_in_words(runs)
        notes = missing_notes(lines) + comparable(runs)
        if key == "train_loss":
            notes += favoured(Run(run.directory) for run in runs)
        return look.to_plate(figure, spec.name, spec.title, f"{rows} {seeds_in_words(lines)}", notes)

    return draw


def rewards(wanted: Callable[[Experiment], Sequence[str]]) -> Callable[[Study, Spec], Drawn]:
    """Reward during training with one line a label; of a single line with its choice of a checkpoint."""

    def draw(study: Study, spec: Spec) -> Drawn:
        e = study.experiment(spec.experiment)
        return reward_figure(study, spec, e, [e.line(label, "reward", "mean") for label in wanted(e)])

    return draw


def reward_figure(
    study: Study, spec: Spec, e: Experiment, lines: Sequence[Line], training: Judged | None = None
) -> Drawn:
    """Lines of an experiment's rewards. training: whose choice is marked where there is one line; None: that of its first run."""
    drawn = [line for line in lines if line.seeds]
    if not drawn:
        return spec.missing("; ".join(missing_notes(lines)) or "no answers were scored (--eval.reward)")
    figure, axes = look.new_figure()
    for number, line in enumerate(drawn):
        draw_line(axes, line, number, band=_bands(study, line))
    runs = [m.run for m in e.members if m.run.lines.get("reward")]
    if len(drawn) == 1:
        _mark_choice(axes, training or alone(runs[0]), drawn[0])
        count_validations(axes, next(iter(drawn[0].seeds.values())))
    finish(axes, "reward of the answers (score)")
    scorers = sorted({scorer_words(study, str(r.get("scorer"))) for run in runs for r in run.lines["reward"]})
    notes = missing_notes(lines) + comparable(runs, "rewards")
    if len(scorers) > 1:
        notes.append(f"Scored by different models, so the rewards are not comparable: {', '.join(scorers)}")
    caption = (
        f"Mean reward of one answer per prompt, scored by {' and '.join(scorers)}. "
        f"{seeds_in_words(lines)} With one seed, bands are the 95 % interval over the prompts."
    )
    return look.to_plate(figure, spec.name, spec.title, caption, notes)


def _bands(study: Study, line: Line) -> dict[int, tuple[float, float]]:
    """Step -> interval over the prompts, as logged."""
    names = {p.run for s in line.seeds.values() for p in s}
    records = [r for name in names for r in study.runs[name].lines.get("reward", ())]
    return {r["step"]: (r["low"], r["high"]) for r in records if is_number(r.get("low")) and is_number(r.get("high"))}


def _mark_choice(axes: Any, training: Judged, line: Line) -> None:
    """The chosen checkpoint of a training, and those that cannot be told from it."""
    if training.best is None:
        return
    several = f"by {training.run.name}, " if len(line.seeds) > 1 else ""
    look.mark_chosen(axes, training.best, f"chosen ({several}step {training.best:,})", 1.2)
    shift = training.best - (best_step(training.run) or 0)
    level = {s + shift for s in choice_of(training.run).get("not_distinguishable") or ()} - {training.best}
    if alike := [(step, value) for step, value in mean_curve(line) if step in level]:
        look.mark_alike(axes, [step for step, _ in alike], [value for _, value in alike])


PANELS = {
    "validation_loss": "",  # its unit hangs on the runs
    "validation_accuracy": "share with the chosen ahead",
    "validation_margin": "reward margin",
    "validation_drift": "drift, nats per answer",
}


def preferences(study: Study, spec: Spec) -> Drawn:
    """Loss, accuracy, margin and drift of the DPO runs on the validation pairs."""
    e = study.experiment(spec.experiment)
    labels = [x for x in e.labels if any(r.series("eval", "validation_accuracy") for r in e.runs(x).values())]
    if not labels:
        lines = [e.line(label, "eval", "validation_accuracy") for label in e.labels]
        return spec.missing("; ".join(missing_notes(lines)) or "no preference run")
    drifts = any(r.series("eval", "validation_drift_chosen") for x in labels for r in e.runs(x).values())
    panels = list(PANELS.items())
    panels = panels if drifts else panels[1:3]  # a reward model has no reference to drift from; its loss has a figure
    figure, axes = look.new_figure(len(panels) // 2, 2, height=3.3 * (len(panels) // 2))
    for panel, (key, ylabel) in zip(axes.flat, panels, strict=True):
        keys = {"chosen": f"{key}_chosen", "rejected": f"{key}_rejected"} if "drift" in key else {"": key}
        for number, label in enumerate(labels):
            band = _accuracy_bands(e, label) if "accuracy" in key else None
            for shift, (side, k) in enumerate(keys.items()):
                name = f"{label}: {side}" if side else label
                draw_line(panel, e.line(label, "eval", k), number + 2 * shift, name, band)
        if key == "validation_accuracy":
            panel.axhline(0.5, color=look.INK, linewidth=0.9, linestyle=":", label="chance")
            panel.set_ylim(-0.02, 1.02)
        finish(panel, ylabel or f"loss, {unit_of(next(iter(e.runs(labels[0]).values())))}")
    lines = [e.line(label, "eval", "validation_accuracy") for label in labels]
    notes = missing_notes(lines) + comparable([r for x in labels for r in e.runs(x).values()])
    unit = examples_of(next((r.pairs for x in labels for r in e.runs(x).values() if r.pairs), {}))[1]
    caption = (
        f"On the validation pairs{'; drift is the log-ratio of policy to reference' if drifts else ''}. "
        f"With one seed, the accuracy's band is the 95 % interval over the {unit}. "
        f"{seeds_in_words(lines)}"
    )
    return look.to_plate(figure, spec.name, spec.title, caption, notes)


def _accuracy_bands(e: Experiment, label: str) -> dict[int, tuple[float, float]]:
    bands = {}
    for run in e.runs(label).values():
        for p in run.series("eval", "validation_accuracy"):
            if share := accuracy_interval(p.value, run.pairs):
                bands[p.step] = share.low, share.high
    return bands


def all_labels(e: Experiment) -> list[str]:
    return e.labels


def _these(labels: Sequence[str]) -> Callable[[Experiment], Sequence[str]]:
    return lambda _: labels


def own_figures(e: Experiment) -> list[Spec]:
    """The figures of an experiment of one's own: training and validation loss, apart for losses of different units; preferences;
    rewards."""
    specs, units = [], by_unit(e)
    for unit, labels in units.items():
        suffix = unit_suffix(unit) if len(units) > 1 else ""
        for word, name, key in (("training", "train", "train_loss"), ("validation", "validation", "validation_loss")):
            title = f"{e.title}: {word} loss{f', {unit}' if suffix else ''}"
            specs.append(Spec(f"figure-{e.id}-{name}{suffix}", e.id, title, by_label(key, _these(labels))))
    if any(m.run.series("eval", "validation_accuracy") for m in e.members):
        specs.append(Spec(f"figure-{e.id}-preferences", e.id, f"{e.title}: preferences", preferences))
    if any(m.run.lines.get("reward") for m in e.members):
        specs.append(Spec(f"figure-{e.id}-reward", e.id, f"{e.title}: reward", rewards(all_labels)))
    return specs


def draw_all(study: Study, specs: Iterable[Spec]) -> dict[str, list[Drawn]]:
    """Experiment -> its figures."""
    drawn: dict[str, list[Drawn]] = {}
    with look.style():
        for spec in specs:
            drawn.setdefault(spec.experiment, []).append(spec.draw(study, spec))
    return drawn
