"""The report's figures: what is drawn from which experiment."""

from __future__ import annotations

from statistics import fmean

import tunesmith.study.look as look
from tunesmith.files.run import Run
from tunesmith.study.figures import Drawn, Spec, all_labels, by_label, preferences, reward_figure, rewards
from tunesmith.study.lines import count_validations, draw_line, finish, members_of, missing_notes, seeds_in_words
from tunesmith.study.paper.experiments import FULL, OPTIMIZERS, PARTS, judged, lines_of, memory_rows, ranks
from tunesmith.study.records import Experiment, Study
from tunesmith.study.run_figures import favoured
from tunesmith.study.select import present
from tunesmith.study.units import TOKEN, comparable, rows_in_words

LOSS = f"loss, {TOKEN}"
WIDE = 10.0  # largest over smallest value, from which on an axis is logarithmic


# ---- losses ----------------------------------------------------------------------------------------------------------


def both_losses(study: Study, spec: Spec) -> Drawn:
    """Training and validation loss of the experiment's runs in one figure."""
    e = study.experiment(spec.experiment)
    train, held = lines_of(e, "eval", "train_loss"), lines_of(e, "eval", "validation_loss")
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


def learning_rates(study: Study, spec: Spec) -> Drawn:
    """Loss of every step, on a logarithmic axis where it runs away."""
    e = study.experiment(spec.experiment)
    lines = lines_of(e, "train", "loss")
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


def judged_rewards(study: Study, spec: Spec) -> Drawn:
    """Reward of the training whose checkpoints E2 judges, with its choice; E1's where E2 shows none."""
    e = study.experiment(spec.experiment)
    lines = lines_of(e, "reward", "mean")
    if not any(line.seeds for line in lines):
        lines = lines_of(e := study.experiment("e1"), "reward", "mean")
    return reward_figure(study, spec, e, lines, next(iter(judged(study)), None))


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory(study: Study, spec: Spec) -> Drawn:
    """Predicted memory by part as stacked bars, the measured peak as a mark."""
    rows = memory_rows(study)
    if not any(parts for _, parts, _ in rows):
        return spec.missing("plan.json carries no predicted memory")
    figure, axes = look.new_figure(height=1.4 + 0.42 * len(rows))
    left = [0.0] * len(rows)
    for i, part in enumerate(PARTS):
        widths = [parts.get(part, 0.0) for _, parts, _ in rows]
        bar = {
            "height": 0.62,
            "color": look.COLOURS[i],
            "hatch": look.HATCHES[i],
            "edgecolor": "white",
            "linewidth": 0.5,
        }
        axes.barh(range(len(rows)), widths, left=left, **bar, label=part.replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    measured = {i: [p.value for p in peaks] for i, (_, _, peaks) in enumerate(rows) if peaks}
    if measured:
        means = [fmean(values) for values in measured.values()]
        low = [max(0.0, mean - min(values)) for mean, values in zip(means, measured.values(), strict=True)]
        high = [max(0.0, max(values) - mean) for mean, values in zip(means, measured.values(), strict=True)]
        mark = {"fmt": "D", "color": look.INK, "markersize": 6, "markeredgecolor": "white", "capsize": 3}
        axes.errorbar(means, list(measured), xerr=[low, high], **mark, label="measured peak")
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


FIGURES = (
    Spec("figure-1", "e1", "Loss during training", both_losses),
    Spec("figure-2", "e2", "Reward during training", judged_rewards),
    Spec("figure-3", "e4", "Training loss by optimizer", by_label("train_loss", _optimizers)),
    Spec("figure-4", "e4", "Validation loss by optimizer", by_label("validation_loss", _optimizers)),
    Spec("figure-5", "e5", "Training loss by LoRA rank", by_label("train_loss", _ranks_and_full)),
    Spec("figure-6", "e5", "Validation loss by LoRA rank", by_label("validation_loss", _ranks_and_full)),
    Spec("figure-7", "e5", "Reward by LoRA rank", rewards(_ranks_and_full)),
    Spec("figure-8", "e6", "Loss of the helpful-only run", both_losses),
    Spec("figure-9", "e6", "Reward of the helpful-only run", rewards(all_labels)),
    Spec("figure-learning-rates", "e1b", "Learning rates that are too high", learning_rates),
    Spec("figure-batches", "e7", "Batch 1, batch 4, and batch 4 by accumulation", by_label("validation_loss", all_labels, by_rows=True)),
    Spec("figure-dpo", "e8", "DPO: loss, accuracy, margin and drift", preferences),
    Spec("figure-memory", "e4", "Memory by part, predicted and measured", memory),
)  # fmt: skip


def specs_of(study: Study) -> list[Spec]:
    """The figures of those of its experiments that a study has; of the numbered ones those that it asks for, or all."""
    known = [s for s in FIGURES if study.experiment(s.experiment).members]
    if study.experiment("e1").members and not study.experiment("e2").members:
        known.insert(1, FIGURES[1])
    return [
        s for s in known if not study.figures or s.name in study.figures or not s.name.removeprefix("figure-").isdigit()
    ]
