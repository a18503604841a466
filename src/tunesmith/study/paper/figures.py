"""The figures of a study: what is drawn from which experiment, and what is said of what is not in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import tunesmith.study.look as look
from tunesmith.files.run import Run
from tunesmith.jsontext import is_number
from tunesmith.stats import wilson_interval
from tunesmith.study.lines import (
    STEPS,
    count_validations,
    curves,
    draw_line,
    finish,
    members_of,
    missing_notes,
    seeds_in_words,
)
from tunesmith.study.look import Plate
from tunesmith.study.paper.experiments import FULL, OPTIMIZERS, judged, memory_rows, ranks
from tunesmith.study.read import Experiment, Line, Study
from tunesmith.study.run_figures import favoured
from tunesmith.study.select import (
    PARTS,
    Judged,
    alone,
    best_step,
    choice_of,
    mean_curve,
    over_rows,
    present,
    scorer_words,
)
from tunesmith.study.units import TOKEN, by_unit, comparable, rows_in_words, unit_of, unit_suffix

LOSS = f"loss, {TOKEN}"
WIDE = 10.0  # largest over smallest value, from which on an axis is logarithmic


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


# ---- losses ----------------------------------------------------------------------------------------------------------


def both_losses(study: Study, spec: Spec) -> Drawn:
    """Training and validation loss of the experiment's runs in one figure."""
    e = study.experiment(spec.experiment)
    train, held = e.lines("eval", "train_loss"), e.lines("eval", "validation_loss")
    if not any(line.seeds for line in held):
        return spec.missing("; ".join(missing_notes(held)) or "no validation was logged")
    figure, axes = look.new_figure()
    for i, (a, b) in enumerate(zip(train, held, strict=True)):
        name = f"{a.label}: " if len(held) > 1 else ""
        draw_line(axes, a, 2 * i, f"{name}training rows")
        draw_line(axes, b, 2 * i + 1, f"{name}validation rows")
    finish(axes, LOSS)
    count_validations(axes, next(s for line in held for s in line.seeds.values()))
    labels = [line.label for line in held] if len(held) > 1 else e.labels
    runs = members_of(e, labels)
    notes = missing_notes(held) + comparable(runs) + favoured(Run(run.directory) for run in runs)
    return look.to_plate(figure, spec.name, spec.title, f"{rows_in_words(runs)} {seeds_in_words(held)}", notes)


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
        curves(axes, lines, f"loss, {unit_of(runs[0])}", "rows read" if by_rows else STEPS)
        rows = "Estimates on the same training rows at every step." if key == "train_loss" else rows_in_words(runs)
        notes = missing_notes(lines) + comparable(runs)
        if key == "train_loss":
            notes += favoured(Run(run.directory) for run in runs)
        return look.to_plate(figure, spec.name, spec.title, f"{rows} {seeds_in_words(lines)}", notes)

    return draw


def learning_rates(study: Study, spec: Spec) -> Drawn:
    """Loss of every step, on a logarithmic axis where it runs away."""
    e = study.experiment(spec.experiment)
    lines = e.lines("train", "loss")
    if not any(line.seeds for line in lines):
        return spec.missing("; ".join(missing_notes(lines)) or "no step was logged")
    figure, axes = look.new_figure()
    for number, line in enumerate(line for line in lines if line.seeds):
        draw_line(axes, line, number)
    values = [p.value for line in lines for s in line.seeds.values() for p in s if p.value > 0]
    wide = bool(values) and max(values) > WIDE * min(values)
    if wide:
        axes.set_yscale("log")
    finish(axes, f"{LOSS} (logarithmic)" if wide else LOSS)
    notes = missing_notes(lines) + comparable(members_of(e, e.labels))
    return look.to_plate(
        figure, spec.name, spec.title, "Training loss of every step; a cross marks a run that ended early.", notes
    )


# ---- rewards ---------------------------------------------------------------------------------------------------------


def rewards(wanted: Callable[[Experiment], Sequence[str]] | None) -> Callable[[Study, Spec], Drawn]:
    """Reward during training: one line a label, or (None) the run whose checkpoints are judged, with its choice."""

    def draw(study: Study, spec: Spec) -> Drawn:
        e = study.experiment(spec.experiment)
        labels = wanted(e) if wanted else e.labels
        lines = [e.line(label, "reward", "mean") for label in labels] if wanted else e.lines("reward", "mean")
        if not any(line.seeds for line in lines) and spec.name == "figure-2":
            lines = (e := study.experiment("e1")).lines("reward", "mean")
        if not any(line.seeds for line in lines):
            return spec.missing("; ".join(missing_notes(lines)) or "no answers were scored (--eval.reward)")
        figure, axes = look.new_figure()
        for number, line in enumerate(line for line in lines if line.seeds):
            draw_line(axes, line, number, band=_bands(study, line))
        runs = [m.run for m in e.members if m.run.lines.get("reward")]
        if len([line for line in lines if line.seeds]) == 1:
            _mark_choice(axes, judged(study)[0] if spec.name == "figure-2" and judged(study) else alone(runs[0]), lines)
            count_validations(axes, next(s for line in lines for s in line.seeds.values()))
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

    return draw


def _bands(study: Study, line: Line) -> dict[int, tuple[float, float]]:
    """Step -> interval over the prompts, as logged."""
    names = {p.run for s in line.seeds.values() for p in s}
    records = [r for name in names for r in study.runs[name].lines.get("reward", ())]
    return {r["step"]: (r["low"], r["high"]) for r in records if is_number(r.get("low")) and is_number(r.get("high"))}


def _mark_choice(axes: Any, training: Judged, lines: Sequence[Line]) -> None:
    """The chosen checkpoint of a training, and those that cannot be told from it, on the one line there is."""
    if training.best is None:
        return
    (line,) = [line for line in lines if line.seeds]
    several = f"by {training.run.name}, " if len(line.seeds) > 1 else ""
    axes.axvline(
        training.best, color=look.MARK, linestyle="--", linewidth=1.2, label=f"chosen ({several}step {training.best:,})"
    )
    level = {
        s + training.best - (best_step(training.run) or 0)
        for s in choice_of(training.run).get("not_distinguishable") or ()
    }
    if marks := [(step, value) for step, value in mean_curve(line) if step in level and step != training.best]:
        axes.plot(*zip(*marks, strict=True), linestyle="", marker="o", markersize=10, markerfacecolor="none",
                  markeredgecolor=look.MARK, label="not distinguishable from it")  # fmt: skip


# ---- DPO, memory -----------------------------------------------------------------------------------------------------

DPO_PANELS = (
    ("validation_loss", "loss, nats per pair"), ("validation_accuracy", "share with the chosen ahead"),
    ("validation_margin", "reward margin"), ("drift", "drift, nats per answer"),
)  # fmt: skip


def preferences(study: Study, spec: Spec) -> Drawn:
    """Loss, accuracy, margin and drift of the DPO runs on the validation pairs."""
    e = study.experiment(spec.experiment)
    labels = [x for x in e.labels if any(r.series("eval", "validation_accuracy") for r in e.runs(x).values())]
    if not labels:
        lines = e.lines("eval", "validation_accuracy")
        return spec.missing("; ".join(missing_notes(lines)) or "no preference run")
    drifts = any(r.series("eval", "validation_drift_chosen") for x in labels for r in e.runs(x).values())
    panels = (
        DPO_PANELS if drifts else DPO_PANELS[1:3]
    )  # a reward model has no reference to drift from; its loss has a figure
    figure, axes = look.new_figure(len(panels) // 2, 2, height=3.3 * (len(panels) // 2))
    for panel, (key, ylabel) in zip(axes.flat, panels, strict=True):
        keys = [f"validation_{key}_{side}" for side in ("chosen", "rejected")] if key == "drift" else [key]
        for number, label in enumerate(labels):
            for shift, k in enumerate(keys):
                name = f"{label}: {k.rsplit('_', 1)[1]}" if key == "drift" else label
                draw_line(
                    panel,
                    e.line(label, "eval", k),
                    number + 2 * shift,
                    name,
                    band=_accuracy_bands(e, label) if "accuracy" in k else None,
                )
        if key == "validation_accuracy":
            panel.axhline(0.5, color=look.INK, linewidth=0.9, linestyle=":", label="chance")
            panel.set_ylim(-0.02, 1.02)
        finish(
            panel, f"loss, {unit_of(next(iter(e.runs(labels[0]).values())))}" if key == "validation_loss" else ylabel
        )
    lines = [e.line(label, "eval", "validation_accuracy") for label in labels]
    notes = missing_notes(lines) + comparable([r for x in labels for r in e.runs(x).values()])
    caption = (
        f"On the validation pairs{'; drift is the log-ratio of policy to reference' if drifts else ''}. "
        "With one seed, the accuracy's band is the 95 % interval over the pairs. "
        f"{seeds_in_words(lines)}"
    )
    return look.to_plate(figure, spec.name, spec.title, caption, notes)


def _accuracy_bands(e: Experiment, label: str) -> dict[int, tuple[float, float]]:
    found = {}
    for run in e.runs(label).values():
        pairs = [int(p.value) for p in run.series("pairs", "validation_pairs")]
        for p in run.series("eval", "validation_accuracy") if pairs and pairs[0] > 0 else ():
            found[p.step] = wilson_interval(p.value * pairs[0], pairs[0])
    return found


def memory(study: Study, spec: Spec) -> Drawn:
    """Predicted memory by part as stacked bars, the measured peak as a mark."""
    rows = memory_rows(study)
    if not any(parts for _, parts, _ in rows):
        return spec.missing("plan.json carries no predicted memory")
    figure, axes = look.new_figure(height=1.4 + 0.42 * len(rows))
    left = [0.0] * len(rows)
    for i, part in enumerate(PARTS):
        widths = [parts.get(part, 0.0) for _, parts, _ in rows]
        axes.barh(range(len(rows)), widths, left=left, height=0.62, color=look.COLOURS[i], hatch=look.HATCHES[i],
                  edgecolor="white", linewidth=0.5, label=part.replace("_", " "))  # fmt: skip
        left = [a + b for a, b in zip(left, widths, strict=True)]
    marks = [
        (i, fmean(p.value for p in peaks), [p.value for p in peaks]) for i, (_, _, peaks) in enumerate(rows) if peaks
    ]
    if marks:
        low, high = [max(0.0, m - min(v)) for _, m, v in marks], [max(0.0, max(v) - m) for _, m, v in marks]
        axes.errorbar([m for _, m, _ in marks], [i for i, _, _ in marks], xerr=[low, high], fmt="D", color=look.INK,
                      markersize=6, markeredgecolor="white", capsize=3, label="measured peak")  # fmt: skip
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("memory, GB of 10⁹ bytes")
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3)
    caption = (
        "Bars: predicted before the run. Mark: peak memory during it, with whiskers from the smallest to the "
        "largest seed; on a GPU allocated tensors, on a CPU the whole process including its libraries."
    )
    without = [f"{label}: no prediction" for label, parts, _ in rows if not parts]
    without += [f"{label}: not measured" for label, _, peaks in rows if not peaks]
    return look.to_plate(figure, spec.name, spec.title, caption, without)


# ---- all of them -----------------------------------------------------------------------------------------------------


def _optimizers(e: Experiment) -> list[str]:
    return present(e, *OPTIMIZERS) or e.labels


def _ranks_and_full(e: Experiment) -> list[str]:
    return [*ranks(e), *present(e, FULL)] or e.labels


def _all(e: Experiment) -> list[str]:
    return e.labels


def _these(labels: Sequence[str]) -> Callable[[Experiment], Sequence[str]]:
    return lambda _: labels


FIGURES = (
    Spec("figure-1", "e1", "Loss during training", both_losses),
    Spec("figure-2", "e2", "Reward during training", rewards(None)),
    Spec("figure-3", "e4", "Training loss by optimizer", by_label("train_loss", _optimizers)),
    Spec("figure-4", "e4", "Validation loss by optimizer", by_label("validation_loss", _optimizers)),
    Spec("figure-5", "e5", "Training loss by LoRA rank", by_label("train_loss", _ranks_and_full)),
    Spec("figure-6", "e5", "Validation loss by LoRA rank", by_label("validation_loss", _ranks_and_full)),
    Spec("figure-7", "e5", "Reward by LoRA rank", rewards(_ranks_and_full)),
    Spec("figure-8", "e6", "Loss of the helpful-only run", both_losses),
    Spec("figure-9", "e6", "Reward of the helpful-only run", rewards(_all)),
    Spec("figure-learning-rates", "e1b", "Learning rates that are too high", learning_rates),
    Spec("figure-batches", "e7", "Batch 1, batch 4, and batch 4 by accumulation", by_label("validation_loss", _all, by_rows=True)),
    Spec("figure-dpo", "e8", "DPO: loss, accuracy, margin and drift", preferences),
    Spec("figure-memory", "e4", "Memory by part, predicted and measured", memory),
)  # fmt: skip


def specs_of(study: Study) -> list[Spec]:
    """The figures that a study can have: those of its experiments; of an experiment of one's own its losses and rewards."""
    wanted = set(study.figures)
    known = [s for s in FIGURES if study.experiment(s.experiment).members]
    if study.experiment("e1").members and not study.experiment("e2").members:
        known.insert(1, FIGURES[1])
    own = [e for key, e in study.experiments.items() if key not in {s.experiment for s in FIGURES}]
    for e in own:
        known += _own_losses(e)
        if any(m.run.series("eval", "validation_accuracy") for m in e.members):
            known.append(Spec(f"figure-{e.id}-preferences", e.id, f"{e.title}: preferences", preferences))
        if any(m.run.lines.get("reward") for m in e.members):
            known.append(Spec(f"figure-{e.id}-reward", e.id, f"{e.title}: reward", rewards(_all)))
    paper = {f"figure-{n}" for n in range(1, 10)}
    return [s for s in known if not wanted or s.name in wanted or s.name not in paper]


def _own_losses(e: Experiment) -> list[Spec]:
    """Training and validation loss of an experiment of one's own, apart for losses of different units."""
    specs, units = [], by_unit(e)
    for unit, labels in units.items():
        suffix = unit_suffix(unit) if len(units) > 1 else ""
        for word, name, key in (("training", "train", "train_loss"), ("validation", "validation", "validation_loss")):
            title = f"{e.title}: {word} loss{f', {unit}' if suffix else ''}"
            specs.append(Spec(f"figure-{e.id}-{name}{suffix}", e.id, title, by_label(key, _these(labels))))
    return specs


def draw_all(study: Study) -> dict[str, list[Drawn]]:
    """Experiment -> its figures."""
    found: dict[str, list[Drawn]] = {}
    with look.style():
        for spec in specs_of(study):
            found.setdefault(spec.experiment, []).append(spec.draw(study, spec))
    return found
