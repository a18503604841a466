"""The claims of the 2023 report (GPT-2 medium on HH-RLHF), each with its own words and numbers, judged on a study's runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from tunesmith.jsontext import Json, is_number
from tunesmith.judge.measures import examples_of
from tunesmith.stats import Interval, t_interval
from tunesmith.study.paper import verdicts
from tunesmith.study.paper.experiments import (
    BATCH_1,
    BATCH_4,
    FULL,
    OPTIMIZERS,
    SPLIT,
    dpo_runs,
    judged,
    lines_of,
    ranks,
)
from tunesmith.study.paper.verdicts import FAILS, HOLDS, OPEN, Verdict
from tunesmith.study.records import Experiment, Line, Point, RunRecord, Study
from tunesmith.study.select import (
    best_step,
    differences,
    finals,
    mean_by_prompt,
    mean_curve,
    minutes,
    peaks,
    present,
    prompt_rewards,
    rewarded_steps,
    scorer_words,
)

VISIBLE = 0.05  # of what the loss falls in all: two curves closer than that are one line in a figure
HARDLY = 0.05  # of the memory
GPU_RESOLUTION, CPU_RESOLUTION = 0.005, 0.02  # of a peak: allocated bytes are counted, a resident set is sampled
EXACT = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 3e-2}  # of the loss: rounding, grown over the steps
CARD_GB = 16.0
PAPER_SCORER = "OpenAssistant/reward-model-deberta-v3-large-v2"


@dataclass(frozen=True)
class Finding:
    """A verdict with where its numbers stand in the logs, and the runs that had to be left out."""

    verdict: Verdict
    sources: tuple[Point, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What the report says. `paper`: its number or picture."""

    id: str
    experiment: str
    words: str
    paper: str
    judge: Callable[[Study], Finding]


def judge_all(study: Study) -> list[tuple[Claim, Finding]]:
    """Every claim with its verdict; what a study has not run stays undecided."""
    findings = []
    for claim in CLAIMS:
        there = bool(study.experiment(claim.experiment).members)
        absent = _undecided(f"experiment {claim.experiment.upper()} is not in this study")
        findings.append((claim, claim.judge(study) if there else absent))
    return findings


# ---- what the judges share ------------------------------------------------------------------------------------------


Values = Mapping[str, Mapping[int, Point]]
"""Label -> seed -> value."""


def _undecided(why: str, left: Sequence[str] = ()) -> Finding:
    return Finding(Verdict(OPEN, why), (), tuple(left))


def _all_greater(
    values: Values, left: Sequence[str], one: str, unit: str, *, sign: int = -1, resolution: float = 0.0
) -> Finding:
    """Whether `one` is below all others, with `sign` 1 above. left: the runs left out."""
    verdict = verdicts.all_greater(_against(values, one, sign), resolution=resolution, unit=unit)
    return Finding(verdict, _sources(values), tuple(left))


def _sources(values: Values) -> tuple[Point, ...]:
    return tuple(p for seeds in values.values() for p in seeds.values())


def _against(values: Values, one: str, sign: int) -> dict[str, list[float]]:
    """`sign` times (one - other) for every other label, by seed."""
    names = {o: f"{one} minus {o}" if sign > 0 else f"{o} minus {one}" for o in values if o != one}
    return {names[o]: [sign * d for d in differences(values[one], values[o])] for o in names}


def resolution_of(runs: Sequence[RunRecord]) -> float:
    """What the memory meter resolves, as a share of its reading."""
    gpu = runs and all(str(r.config.get("train", {}).get("device", "")).startswith("cuda") for r in runs)
    return GPU_RESOLUTION if gpu else CPU_RESOLUTION


# ---- E1, E1b, E2, E3 -------------------------------------------------------------------------------------------------


NEAR = 1 / 8  # of a training: two places closer than that are the same place


def near(share: float) -> tuple[float, float]:
    return share - NEAR, share + NEAR


def _overfits(experiment: str, between: tuple[float, float]) -> Callable[[Study], Finding]:
    def judge(study: Study) -> Finding:
        e = study.experiment(experiment)
        validation, train = (
            next(iter(lines_of(e, "eval", key)), Line("", {})) for key in ("validation_loss", "train_loss")
        )
        if not validation.seeds.keys() - validation.partial:
            return _undecided("no finished training", validation.missing)
        held, fitted = dict(mean_curve(validation)), dict(mean_curve(train))
        steps = [s for s in held if s in fitted]
        curve = [held[s] for s in steps], [fitted[s] for s in steps]
        verdict = verdicts.overfits(
            steps, *curve, between=between, difference=_on_the_same_batches(study, validation, steps)
        )
        low = min(steps, key=held.__getitem__, default=None)
        marks = tuple(p for s in validation.seeds.values() for p in s if p.step in (low, steps[-1])) if steps else ()
        return Finding(verdict, marks, validation.missing)

    return judge


def _on_the_same_batches(study: Study, line: Line, steps: Sequence[int]) -> Callable[[int, int], Interval | None]:
    """Two places of a curve -> difference of their losses, paired over the batches of all finished seeds."""
    whole = [{p.step: p for p in s} for seed, s in line.seeds.items() if seed not in line.partial]
    level = 1 - 0.05 / max(1, len(steps) - 1)  # the lowest place was picked among all of them

    @functools.cache
    def parts(i: int) -> list[tuple[float, int]]:
        points = [seed[steps[i]] for seed in whole]
        logged = [next(r for r in study.runs[p.run].lines["eval"] if r["line"] == p.line) for p in points]
        kept = [study.runs[p.run].parts(r["step"]) for p, r in zip(points, logged, strict=True)]
        return [x for batches in kept for x in batches] if all(kept) else []

    def difference(i: int, j: int) -> Interval | None:
        a, b = parts(i), parts(j)
        if len(a) < 2 or [n for _, n in a] != [n for _, n in b]:
            return None
        sums, mean = [x - y for (x, _), (y, _) in zip(a, b, strict=True)], fmean(n for _, n in a)
        ratio = fmean(sums) / mean
        return t_interval([ratio + (s - ratio * n) / mean for s, (_, n) in zip(sums, a, strict=True)], level=level)

    return difference


def _no_convergence(study: Study) -> Finding:
    e = study.experiment("e1b")
    starts: dict[str, list[float]] = {}
    ends: dict[str, list[float | None]] = {}
    marks, left = [], []
    for member in e.members:
        run, series = member.run, member.run.series("eval", "validation_loss")
        if not series or run.state not in ("finished", "diverged"):
            left.append(f"{member.label}, seed {member.seed} ({run.name}): {run.trouble or 'no estimate'}")
            continue
        starts.setdefault(member.label, []).append(series[0].value)
        ends.setdefault(member.label, []).append(None if run.state == "diverged" else series[-1].value)
        marks += [series[0], series[-1]]
    return Finding(verdicts.never_learns(starts, ends), tuple(marks), tuple(left))


def _reward_falls(study: Study) -> Finding:
    trainings = judged(study)
    steps = sorted(set.intersection(*({s for s in j.at if j.rewards(s)} for j in trainings))) if trainings else []
    if not steps:
        return _undecided("no checkpoint was scored")
    means = {s: mean_by_prompt([j.rewards(s) for j in trainings]) for s in steps}
    prompts = sorted(set.intersection(*(set(r) for r in means.values())))
    verdict = verdicts.falls_after_best({s: [r[p] for p in prompts] for s, r in means.items()}, between=near(20 / 40))
    top = max(steps, key=lambda s: fmean(means[s][p] for p in prompts)) if prompts else None
    return Finding(verdict, () if top is None else tuple(p for j in trainings for p in j.marks(top, steps[-1])))


def _mean_negative(study: Study) -> Finding:
    one = next(iter(judged(study)), None)
    if one is None or one.best is None:
        return _undecided("no answers at the chosen checkpoint")
    run, own = one.at[one.best]
    chosen: Json = next((r for r in run.lines.get("reward", ()) if r["step"] == own), {})
    if not all(is_number(chosen.get(k)) for k in ("mean", "low", "high")):
        return _undecided("no reward with its interval at the chosen checkpoint")
    scorer, marks = chosen.get("scorer", "an unnamed model"), one.marks(one.best)
    interval = f"{chosen['mean']:.3f} [{chosen['low']:.3f}, {chosen['high']:.3f}]"
    evidence = f"mean {interval} at step {one.best:,}, scored by {scorer_words(study, scorer)}"
    if scorer != PAPER_SCORER:
        return Finding(Verdict(OPEN, f"{evidence}: scorers differ in their zero point"), marks)
    return Finding(Verdict(HOLDS if chosen["high"] < 0 else FAILS if chosen["low"] > 0 else OPEN, evidence), marks)


def _tuned_answers(study: Study) -> Finding:
    one = next(iter(judged(study)), None)
    if one is None or 0 not in one.at or not one.best:
        return _undecided("no answers of both the base (step 0) and the chosen checkpoint")
    base, tuned = one.rewards(0), one.rewards(one.best)
    counts = [(sum(r["finish_reason"] == "stop" for r in a), len(a)) for a in (one.answers(one.best), one.answers(0))]
    stops = " against ".join(f"{k} of {n}" for k, n in counts)
    shared = sorted(base.keys() & tuned.keys())
    verdict = verdicts.better_paired([tuned[p] for p in shared], [base[p] for p in shared], "reward, tuned minus base")
    evidence = f"{verdict.evidence}; answers that end by themselves: {stops}"
    return Finding(Verdict(verdict.verdict, evidence), one.marks(0, one.best))


# ---- E4, E5, E7 ------------------------------------------------------------------------------------------------------


def _batches_alike(study: Study) -> Finding:
    """Batch 4 by accumulation where it was run: its estimates are on the rows that batch 1 has; a batch of 4 sees more rows.

    Both after as many rows read: an iteration of the report is a row, at any batch size.
    """
    e = study.experiment("e7")
    done = any(r.state == "finished" for r in e.runs(SPLIT).values())
    return _alike(e, BATCH_1, SPLIT if done else BATCH_4, by_rows=True)


def _alike(e: Experiment, one: str, other: str, *, by_rows: bool = False) -> Finding:
    losses, left = finals(e, present(e, one, other), "eval", "validation_loss", by_rows=by_rows)
    starts = [s[0].value for s in e.line(one, "eval", "validation_loss").seeds.values()]
    ends = [p.value for p in losses.get(one, {}).values()]
    if not starts or not ends or not losses.get(other):
        return _undecided(f"needs finished runs of {one} and {other}", left)
    margin = VISIBLE * abs(fmean(starts) - fmean(ends))
    verdict = verdicts.alike({f"{one} minus {other}": differences(losses[one], losses[other])}, margin, unit="nats")
    return Finding(verdict, _sources(losses), tuple(left))


def _sgd_learns_slowest(study: Study) -> Finding:
    e = study.experiment("e4")
    losses, left = finals(e, present(e, *OPTIMIZERS), "eval", "validation_loss")
    return _plain_sgd(losses, left, "nats", sign=1)


def _sgd_least_memory(study: Study) -> Finding:
    e = study.experiment("e4")
    memory, left = peaks(e, present(e, *OPTIMIZERS))
    return _plain_sgd(memory, left, "GB", resolution=_resolution(e, memory))


def _sgd_least_time(study: Study) -> Finding:
    e = study.experiment("e4")
    return _plain_sgd({label: minutes(e, label) for label in present(e, *OPTIMIZERS)}, (), "min")


def _plain_sgd(values: Values, left: Sequence[str], unit: str, *, sign: int = -1, resolution: float = 0.0) -> Finding:
    if "SGD" not in values or len(values) < 2:
        return _undecided("needs SGD and another optimizer", left)
    return _all_greater(values, left, "SGD", unit, sign=sign, resolution=resolution)


def _lora_less_memory(study: Study) -> Finding:
    e = study.experiment("e5")
    memory, left = peaks(e, [*ranks(e), *present(e, FULL)])
    if FULL not in memory or not ranks(e):
        return _undecided("needs a rank and full tuning", left)
    return _all_greater(memory, left, FULL, "GB", sign=1, resolution=_resolution(e, memory))


def _resolution(e: Experiment, memory: Values) -> float:
    """Of a difference of two peaks, GB."""
    largest = max((p.value for seeds in memory.values() for p in seeds.values()), default=0.0)
    return resolution_of([m.run for m in e.members]) * largest


def _lora(event: str, key: str, unit: str) -> Callable[[Study], Finding]:
    def judge(study: Study) -> Finding:
        e = study.experiment("e5")
        values, left = finals(e, [*ranks(e), *present(e, FULL)], event, key)
        if not ranks(e) or not values.get(FULL):
            return _undecided(f"needs finished runs of a rank and of full tuning with a {event} line", left)
        return _all_greater(values, left, FULL, unit)

    return judge


def _rank_memory(study: Study) -> Finding:
    e = study.experiment("e5")
    labels = ranks(e)
    memory, left = peaks(e, [labels[0], labels[-1]] if len(labels) > 1 else [])
    if len(memory) < 2 or not all(memory.values()):
        return _undecided("needs finished runs of two ranks", left)
    low, high = labels[0], labels[-1]
    margin = HARDLY * fmean(p.value for p in memory[low].values())
    gaps = {f"{high} minus {low}": differences(memory[high], memory[low])}
    verdict = verdicts.alike(gaps, margin, resolution=_resolution(e, memory), unit="GB")
    return Finding(verdict, _sources(memory), tuple(left))


def _accumulation(study: Study) -> Finding:
    e = study.experiment("e7")
    pairs = [(e.runs(BATCH_4)[s], e.runs(SPLIT)[s]) for s in e.runs(BATCH_4) if s in e.runs(SPLIT)]
    series = [
        (a, b) for one, split in pairs if (a := one.series("train", "loss")) and (b := split.series("train", "loss"))
    ]
    if not series:
        return _undecided(f"needs runs “{BATCH_4}” and “{SPLIT}” with the same seed")
    precision = str(pairs[0][0].config.get("train", {}).get("precision", "fp32"))
    tolerance = EXACT.get(precision, EXACT["fp32"])
    by_seed = [
        verdicts.same_steps({p.step: p.value for p in a}, {p.step: p.value for p in b}, tolerance) for a, b in series
    ]
    worst = next((v for v in by_seed if v.verdict != HOLDS), by_seed[0])
    return Finding(worst, tuple(side[-1] for pair in series for side in pair))


# ---- E6, E8 ----------------------------------------------------------------------------------------------------------


def _as_good(study: Study) -> Finding:
    helpful = next((m.run for m in study.experiment("e6").members if rewarded_steps(m.run)), None)
    one, step = next(iter(judged(study)), None), best_step(helpful) if helpful else None
    if helpful is None or step is None or one is None or one.best is None:
        return _undecided("needs scored answers of the helpful-only run and of E1's")
    scorers = {str(r.get("scorer")) for run in (helpful, one.run) for r in run.lines.get("reward", ())}
    if len(scorers) > 1:
        return _undecided(f"scored by different models: {', '.join(sorted(scorers))}")
    a, b = prompt_rewards(helpful, step), one.rewards(one.best)
    shared = sorted(a.keys() & b.keys())
    verdict = verdicts.alike_paired(
        [a[p] for p in shared], [b[p] for p in shared], "reward, helpful only minus all data"
    )
    marks = tuple(p for p in helpful.series("reward", "mean") if p.step == step)
    return Finding(verdict, marks + one.marks(one.best))


def _dpo_improves(study: Study) -> Finding:
    runs = [r for r in dpo_runs(study).values() if r.state == "finished"]
    accuracy, margin = (
        [s[-1] for r in runs if (s := r.series("eval", f"validation_{k}"))] for k in ("accuracy", "margin")
    )
    pairs = min((r.pairs for r in runs if r.pairs), key=examples_of, default={})
    verdict = verdicts.above_chance([p.value for p in accuracy], [p.value for p in margin], pairs)
    left = [f"{r.name}: {r.trouble}" for r in dpo_runs(study).values() if r.trouble]
    return Finding(verdict, tuple(accuracy), tuple(left))


def _dpo_fits(study: Study) -> Finding:
    runs = list(dpo_runs(study).values())
    for run in runs:
        if run.state == "failed" and re.search(r"out of memory(?!\?)", run.reason.lower()):  # "?": only a guess
            return Finding(Verdict(FAILS, f"{run.name} failed: {run.reason}"))
    measured = [r.peak for r in runs if r.state == "finished" and r.peak]
    if not measured:
        return _undecided("no finished DPO run")
    top = max(measured, key=lambda p: p.value)
    verdict, words = HOLDS if top.value <= CARD_GB else FAILS, f"; one card has {CARD_GB:.0f} GB"
    if study.scale != FULL:
        verdict, words = OPEN, f", but for the {study.scale or 'unnamed'} scale's model, not for gpt2-medium"
    return Finding(Verdict(verdict, f"peak {top.value:.2f} GB, policy and reference together{words}"), (top,))


CLAIMS = (
    Claim("e1-overfits", "e1", "Full fine-tuning overfits after validation 30 of 40", "figure 1", _overfits("e1", near(30 / 40))),
    Claim("e1b-rates", "e1b", "Learning rates that are too high do not converge", "no convergence within the first "
    "steps at 1e-2 and 1e-3", _no_convergence),
    Claim("e2-falls", "e2", "The reward falls after validation 20 of 40", "figure 2; checkpoint 20 chosen", _reward_falls),
    Claim("e2-negative", "e2", "The mean reward is negative", "best prompt 2.29, worst -3.56", _mean_negative),
    Claim("e3-answers", "e2", "The tuned model answers where the base rambles", "shown by examples", _tuned_answers),
    Claim("e4-adam", "e4", "AdamW and Adam behave alike", "figures 3 and 4: the curves coincide",
          lambda study: _alike(study.experiment("e4"), "AdamW", "Adam")),
    Claim("e4-slowest", "e4", "Plain SGD learns the slowest", "figures 3 and 4", _sgd_learns_slowest),
    Claim("e4-memory", "e4", "Plain SGD needs the least memory", "8.41 GB; momentum 11.23, Adam 13.52", _sgd_least_memory),
    Claim("e4-time", "e4", "Plain SGD needs the least time", "170.9 min; AdamW 200.0", _sgd_least_time),
    Claim("e5-loss", "e5", "LoRA has a higher loss than full tuning", "figures 5 and 6", _lora("eval", "validation_loss", "nats")),
    Claim("e5-reward", "e5", "LoRA has a higher reward than full tuning", "figure 7", _lora("reward", "mean", "")),
    Claim("e5-less", "e5", "LoRA needs less memory than full tuning", "8.02 GB (rank 1) against 11.77", _lora_less_memory),
    Claim("e5-rank", "e5", "The rank hardly affects memory", "8.02 GB at rank 1, 8.16 at rank 16 (+1.6 %)", _rank_memory),
    Claim("e6-overfits", "e6", "Helpful-only training overfits early: in the first half", "figure 8", _overfits("e6", (0.0, 0.5))),
    Claim("e6-reward", "e6", "Helpful-only answers are about as good", "figure 9", _as_good),
    Claim("e7-batch", "e7", "Batch 4 versus batch 1: no visible difference", "the curves coincide", _batches_alike),
    Claim("e7-exact", "e7", "Batch 4 by accumulation equals batch 4", "not tested", _accumulation),
    Claim("e8-fits", "e8", "DPO fits into 16 GB", "failed: two 16 GB cards were not enough", _dpo_fits),
    Claim("e8-improves", "e8", "DPO puts the chosen answer ahead: accuracy and margin", "never ran", _dpo_improves),
)  # fmt: skip
