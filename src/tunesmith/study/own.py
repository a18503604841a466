"""Experiments of one's own: what each label came to, the labels against each other, and the result in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from tunesmith.jsontext import is_number
from tunesmith.judge.measures import accuracy_interval
from tunesmith.stats import Interval, ratio_interval, t_interval
from tunesmith.study.lines import members_of
from tunesmith.study.outcome import ranked_by_reward
from tunesmith.study.records import Experiment, Point, Study
from tunesmith.study.select import best_step, finals, mean_by_prompt, minutes, peaks, prompt_rewards
from tunesmith.study.tables import Cell, Table, interval_words, of_seeds
from tunesmith.study.units import TOKEN, by_unit, comparable, differing, rows_seed, unit_of, unit_suffix
from tunesmith.train.choice import Sums

ALL_PAIRS = 6  # labels up to which each is held against each; of more, each against the one with the lowest loss
LOSS = "validation_loss"


@dataclass(frozen=True)
class Difference:
    """Last validation loss of `one` less that of `other`.

    by_seed: over the seeds that both have; NaN bounds for a single one. by_batch: over the validation batches of these
    runs, all seeds together; None where the two did not keep the losses of the same batches.
    """

    one: str
    other: str
    by_seed: Interval
    by_batch: Interval | None
    points: tuple[Point, ...]

    @property
    def decisive(self) -> Interval:
        """What decides: the interval over seeds, or of a single seed that over its batches."""
        return self.by_batch if self.by_seed.n == 1 and self.by_batch else self.by_seed

    @property
    def apart(self) -> bool:
        """Whether `one` is clearly below `other`, or above: every interval there is lies on one side of 0."""
        bounds = [x for x in (self.by_seed, self.by_batch) if x is not None and x.low == x.low]
        return bool(bounds) and (all(x.low > 0 for x in bounds) or all(x.high < 0 for x in bounds))


def last_losses(e: Experiment, labels: Sequence[str]) -> dict[str, dict[int, Point]]:
    """Label -> seed -> validation loss of the finished runs at the last step that all seeds of the label have."""
    by_label = {label: finals(e, [label], "eval", LOSS)[0][label] for label in labels}
    return {label: seeds for label, seeds in by_label.items() if seeds}


def _loss(e: Experiment, label: str, last: Mapping[str, Mapping[int, Point]]) -> Cell:
    """A label's last loss over its seeds."""
    return of_seeds(last.get(label, {}).values(), signed=e.line(label, "eval", LOSS).signed)


def differences_of(e: Experiment, pairs: Sequence[tuple[str, str]], level: float = 0.95) -> list[Difference]:
    """The last loss of the first of each pair less that of the second, seed by seed; pairs without a common seed are left out."""
    last = last_losses(e, list(dict.fromkeys(x for pair in pairs for x in pair)))
    differences = []
    for one, other in pairs:
        if seeds := sorted(last.get(one, {}).keys() & last.get(other, {}).keys()):
            a, b = [last[one][s] for s in seeds], [last[other][s] for s in seeds]
            by_seed = t_interval([x.value - y.value for x, y in zip(a, b, strict=True)], level=level)
            differences.append(Difference(one, other, by_seed, _over_batches(e, one, other, a, b, level), (*a, *b)))
    return differences


def _over_batches(
    e: Experiment, one: str, other: str, a: Sequence[Point], b: Sequence[Point], level: float
) -> Interval | None:
    """The difference over the batches of all seeds together; None where they are not the same rows, batch by batch."""
    by_name = {m.run.name: m.run for m in e.members if m.label in (one, other)}
    runs = [(e.runs(one)[s], e.runs(other)[s]) for s in e.runs(one) if s in e.runs(other)]
    if comparable(list(by_name.values())) or any(rows_seed(x.config) != rows_seed(y.config) for x, y in runs):
        return None
    kept_a, kept_b = ([by_name[p.run].parts(p.step) for p in points] for points in (a, b))
    return difference_over_batches(kept_a, kept_b, level)


def difference_over_batches(a: Sequence[Sums], b: Sequence[Sums], level: float = 0.95) -> Interval | None:
    """Loss of the runs `a` less that of the runs `b`, which stand seed by seed, with its bootstrap interval over batches.

    Batches that all seeds share count once, with the mean of their differences; others each for themselves.
    Returns: None unless each two runs of a seed kept more than one batch, with equal counts.
    """
    counts = [[n for _, n in parts] for parts in a]
    if not counts or any(len(n) < 2 for n in counts) or counts != [[n for _, n in parts] for parts in b]:
        return None
    sums = [[x - y for (x, _), (y, _) in zip(one, other, strict=True)] for one, other in zip(a, b, strict=True)]
    if all(n == counts[0] for n in counts):
        return ratio_interval([fmean(column) for column in zip(*sums, strict=True)], counts[0], level=level)
    return ratio_interval([s for one in sums for s in one], [n for one in counts for n in one], level=level)


# ---- tables ----------------------------------------------------------------------------------------------------------


def own_tables(e: Experiment) -> list[Table]:
    """What each label came to, and for each unit of loss the differences between the labels."""
    units = by_unit(e)
    tables = [_by_label(e)]
    for unit, labels in units.items():
        if table := _differences(e, labels, unit, unit_suffix(unit) if len(units) > 1 else ""):
            tables.append(table)
    return tables


def _by_label(e: Experiment) -> Table:
    """Last loss in its unit, accuracy on pairs, memory and time by label."""
    memory, left = peaks(e, e.labels)
    units = by_unit(e)
    last = {unit: last_losses(e, labels) for unit, labels in units.items()}
    rows = []
    for label in e.labels:
        cells = [Cell(label), *(_loss(e, label, last[unit]) for unit in units)]
        if units.keys() - {TOKEN}:
            accuracy = finals(e, [label], "eval", "validation_accuracy")[0][label]
            cells.append(Cell(f"{100 * fmean(p.value for p in accuracy.values()):.1f}" if accuracy else ""))
        rows.append((*cells, of_seeds(memory[label].values(), 2), of_seeds(minutes(e, label).values(), 2)))
    losses, accuracy_head = [f"validation loss, {unit}" for unit in units], "accuracy, % of the pairs"
    head = ("", *losses, *([accuracy_head] if units.keys() - {TOKEN} else []), "memory, GB", "time, min")
    figures = (*losses, "memory, GB", "time, min")
    caption = "Finished runs only: loss at the last step that all seeds of a label share, peak memory, time spent in training steps."
    return Table(f"table-{e.id}", e.id, e.title, head, tuple(rows), caption, tuple(left), figures=figures)


def _differences(e: Experiment, labels: Sequence[str], unit: str, suffix: str) -> Table | None:
    """The labels against each other; None where there are no two to compare."""
    last = last_losses(e, labels)
    if len(last) < 2:
        return None
    several = len(last) <= ALL_PAIRS
    pairs = list(combinations(last, 2)) if several else [(x, _lowest(last)) for x in last if x != _lowest(last)]
    rows = []
    for d in differences_of(e, pairs):
        which = ("lower" if d.by_seed.mean < 0 else "higher") if d.apart else "cannot be told apart"
        both = Cell(value=d.by_seed, sources=d.points), Cell(value=d.by_batch)
        rows.append((Cell(f"{d.one} minus {d.other}"), *both, Cell(str(d.by_seed.n)), Cell(which)))
    figures = (f"difference, {unit}", "over validation batches")
    caption = (
        "Last validation loss of the first minus that of the second, seed by seed, with Student's 95 % interval over the seeds; "
        "then with the bootstrap interval over the validation batches that both kept. Each interval alone covers 95 %."
        + ("" if several else f" Of {len(last)} labels, each is compared with the one with the lowest loss.")
    )
    notes = tuple(comparable(members_of(e, labels)))
    title = f"{e.title}: differences between the labels"
    name, head, folded = (
        f"table-{e.id}-differences{suffix}",
        ("", *figures, "seeds", "the first is"),
        len(rows) > ALL_PAIRS,
    )
    return Table(name, e.id, title, head, tuple(rows), caption, notes, folded, figures)


def _lowest(last: Mapping[str, Mapping[int, Point]]) -> str:
    return min(last, key=lambda x: fmean(p.value for p in last[x].values()))


def overview(study: Study) -> Table:
    """Every run in one line."""
    rows = []
    for run in study.runs.values():
        loss = run.series("eval", "validation_loss")
        best = min(loss, key=lambda p: p.value, default=None)
        steps = run.status.get("step")
        stands = ("not run yet" if run.state == "waiting" else run.state, f"{steps:,}" if is_number(steps) else "")
        measured = ((best, 3), (run.peak, 2), (run.minutes, 2))
        figures = (Cell(f"{p.value:,.{digits}f}", sources=(p,)) if p else Cell() for p, digits in measured)
        rows.append((Cell(run.name, run=run.name), *map(Cell, stands), *figures, Cell(unit_of(run))))
    head = ("run", "state", "steps", "best validation loss", "memory, GB", "time, min", "unit of the loss")
    return Table("table-runs", "", "All runs", head, tuple(rows))


# ---- the result in words ---------------------------------------------------------------------------------------------


def conclusion(e: Experiment) -> str:
    """Which label has the lowest last validation loss, and the highest reward, by how much, or that none can be told apart."""
    units = by_unit(e)
    sentences = [_by_loss(e, labels, unit) for unit, labels in units.items()]
    if len(units) > 1:
        sentences = [
            f"Losses in {unit}: {text[:1].lower()}{text[1:]}" for unit, text in zip(units, sentences, strict=True)
        ]
    return " ".join(filter(None, (*sentences, _by_reward(e)))) or "None of its runs has started."


def _by_reward(e: Experiment) -> str:
    """The labels' answers at the chosen checkpoints, prompt by prompt; empty without two labels that one scorer judged."""
    by_label, scorers = {}, set()
    for label in e.labels:
        runs = [run for run in e.runs(label).values() if run.state == "finished" and run.lines.get("reward")]
        rewards = [prompt_rewards(run, best_step(run) or 0) for run in runs]
        if runs and all(rewards):
            by_label[label] = mean_by_prompt(rewards)
            scorers |= {str(r.get("scorer")) for run in runs for r in run.lines["reward"]}
    if len(by_label) < 2 or len(scorers) > 1:
        return ""
    return f"{ranked_by_reward(scorers.pop(), by_label)} Reward intervals are over the prompts."


def _by_loss(e: Experiment, labels: Sequence[str], unit: str) -> str:
    last = last_losses(e, labels)
    missing = [x for x in labels if x not in last]
    left = f" Without a finished run: {', '.join(missing)}." if missing else ""
    if not last:
        return "No run has finished, so there is nothing to compare yet."
    best = _lowest(last)
    value = f"{_loss(e, best, last).shown} {unit}"
    if len(last) == 1:
        return f"The last validation loss of {best} is {value}; there is no other label to compare it with.{left}"
    if keys := differing(members_of(e, list(last))):
        return (
            f"The labels' losses cannot be compared, as they differ in {', '.join(keys)}.{_accuracies(e, last)}{left}"
        )
    level = 1 - 0.05 / (len(last) - 1)  # the lowest was picked after looking at all of them (Bonferroni)
    differences = differences_of(e, [(x, best) for x in last if x != best], level)
    apart, alike = [d for d in differences if d.apart], [d for d in differences if not d.apart]
    beaten = "; ".join(f"{interval_words(d.decisive)} less than {d.one}" for d in apart)
    rivals = " and ".join(f"{d.one} ({interval_words(d.decisive)} higher)" for d in alike)
    if not apart:
        text = (
            f"No difference between the labels is distinguishable from chance: {best} is lowest with {value}, "
            f"but not clearly below {rivals}."
        )
    elif alike:
        text = f"{best} has the lowest validation loss, {value}: {beaten}. Not distinguishable from it: {rivals}."
    else:
        text = f"{best} has the lowest validation loss, {value}: {beaten}."
    return f"{text}{_what_it_rests_on(differences)}{left}"


def _accuracies(e: Experiment, labels: Iterable[str]) -> str:
    """The labels' shares of validation pairs with the chosen answer ahead, each with Wilson's interval; empty without pairs."""
    shares = []
    for label in labels:
        points = list(finals(e, [label], "eval", "validation_accuracy")[0][label].values())
        pairs = next((run.pairs for run in e.runs(label).values() if run.pairs), {})  # more seeds are no more pairs
        if points and (share := accuracy_interval(fmean(p.value for p in points), pairs)):
            shares.append(f"{label} {100 * share.mean:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]")
    return f" Pairs with the chosen answer ahead: {'; '.join(shares)}." if shares else ""


def _what_it_rests_on(differences: Sequence[Difference]) -> str:
    """Seeds, batches, and how many comparisons the intervals are made for."""
    seeds = min((d.by_seed.n for d in differences), default=0)
    together = " jointly" if len(differences) > 1 else ""
    if seeds > 1:
        return f" Intervals: 95 %{together}, paired over {seeds} seeds."
    if any(d.by_batch for d in differences):
        return (
            f" Intervals: 95 %{together}, over the validation batches of one seed; other seeds may reverse the order."
        )
    return " With one seed and no losses per batch, the effect of another seed is unknown."
