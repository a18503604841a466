"""The result of runs in a line: which checkpoint, which run is best, by what and how surely. From run directories alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from tunesmith.files.run import Run
from tunesmith.jsontext import is_number
from tunesmith.judge.measures import accuracy_interval
from tunesmith.stats import Interval, bootstrap_interval, paired_difference, ratio_interval
from tunesmith.study.select import rewards_by_prompt
from tunesmith.study.units import loss_unit, measured_on, rows_seed
from tunesmith.train.choice import Estimate, apart, choose, comparable, loss_difference, read_estimates
from tunesmith.train.methods.table import METHODS

Against = tuple[str, Interval | None]
"""Another one's name, and by how much the best is better; None where nothing can be paired."""


def kind_of(run: Run) -> str:
    """The command of the method that made it: `pretrain`, `sft`, `dpo`, `reward`, ..."""
    if (command := (run.inputs or {}).get("command")) in METHODS:
        return str(command)
    if "tokenizer" in run.config:
        return "pretrain"
    if "dpo" in run.config:
        return "dpo"
    return "reward" if any("validation_accuracy" in r for r in run.metrics("eval")) else "sft"


def accuracy_text(run: Run, accuracy: float) -> str:
    """`97.5 % (87.1 to 99.6)`: a share of the validation pairs with its 95 % interval."""
    share = accuracy_interval(accuracy, next(iter(run.metrics("pairs")), {}))
    if share is None:
        return f"{accuracy:.1%}"
    return f"{100 * accuracy:.1f} % ({100 * share.low:.1f} to {100 * share.high:.1f})"


# ---- one run ---------------------------------------------------------------------------------------------------------


def result_of_run(run: Run) -> str:
    """Which checkpoint is best, by what, with its interval, and which cannot be told from it."""
    estimates, status = read_estimates(run), run.status
    ended = {"finished": "", "running": " The run has not ended."}.get(
        status["state"], f" The run ended early: {status['state']} at step {status['step']:,}."
    )
    if not estimates:
        return f"No estimate of the validation loss was finite, so there is no best checkpoint.{ended}"
    choice = status.get("choice")
    if not isinstance(choice, dict) or not is_number(choice.get("best_step")):
        chosen = choose(estimates, {})
        choice = chosen.as_dict() if chosen else {}
    best, by = choice["best_step"], choice.get("by", "validation_loss")
    others = [s for s in choice.get("not_distinguishable") or () if s != best]
    alike = (
        f" Not distinguishable from it: step{'s' * (len(others) > 1)} {_listed([f'{s:,}' for s in others])}."
        if others
        else ""
    )
    rewarded = _by_reward(run, best) if by == "reward" else ""
    return f"{rewarded or _by_loss(run, best, estimates)}{alike}{ended}"


def _by_reward(run: Run, best: int) -> str:
    """`Best by reward is step 40: 0.81 (0.60 to 1.02) on 40 prompts.`; empty where that step has no reward."""
    event = next((r for r in run.metrics("reward") if r["step"] == best and is_number(r.get("mean"))), None)
    if event is None:
        return ""
    bounds = [event.get("low"), event.get("high")]
    around = f" ({bounds[0]:.3f} to {bounds[1]:.3f})" if all(map(is_number, bounds)) else ""
    prompts = f" on {event['n']:,} prompts" if is_number(event.get("n")) else ""
    return f"Best checkpoint by reward: step {best:,}, mean reward {event['mean']:.3f}{around}{prompts}."


def _by_loss(run: Run, best: int, estimates: Sequence[Estimate]) -> str:
    """The best checkpoint's validation loss, and how far it lies below the first."""
    one = next((e for e in estimates if e.step == best), min(estimates, key=lambda e: (e.validation_loss, e.step)))
    first, last = estimates[0], max(e.step for e in estimates)
    value = f"{loss_text(one)} {loss_unit(run.config, kind_of(run))}{_accuracy(run, one.step)}"
    if one.step == first.step:
        where = (
            "step 0, the untrained starting model" if first.step == 0 else f"step {first.step:,}, the first estimate"
        )
        return f"Best checkpoint by validation loss: {where}, with {value}; none of the {len(estimates) - 1} later estimates is lower."
    text = f"Best checkpoint by validation loss: step {one.step:,} of {last:,}, {value}"
    fall = loss_difference(first.parts, one.parts) if comparable(first, one) else None
    if fall is None:
        gap = first.validation_loss - one.validation_loss
        why = "an estimate was one batch" if len(one.parts) == 1 else "losses per batch were not kept"
        return f"{text}; {gap:.3f} below step {first.step:,} (no interval: {why})."
    if apart(fall):
        return f"{text}; {_interval(fall)} below step {first.step:,}."
    return f"{text}. That is not clearly below step {first.step:,}: the difference of {_interval(fall)} may be chance."


def loss_text(estimate: Estimate) -> str:
    """`3.100 (3.020 to 3.180)`: over the batches where they were kept."""
    if len(estimate.parts) < 2:
        return f"{estimate.validation_loss:.3f}"
    return _interval(ratio_interval([s for s, _ in estimate.parts], [n for _, n in estimate.parts]), at_least=0.0)


def _accuracy(run: Run, step: int) -> str:
    accuracy = next((e.get("validation_accuracy") for e in run.metrics("eval") if e["step"] == step), None)
    return "" if accuracy is None else f", accuracy {accuracy_text(run, accuracy)}"


def _interval(x: Interval, at_least: float = float("-inf")) -> str:
    mean, low, high = (f"{round(v, 3) + 0.0:.3f}" for v in (x.mean, max(x.low, at_least), x.high))
    return mean if x.low != x.low else f"{mean} ({low} to {high})"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# ---- several runs ----------------------------------------------------------------------------------------------------


def result_of_runs(runs: Sequence[Run]) -> str:
    """Which of the runs that can be compared is best, by reward on the same prompts and by validation loss on the same rows."""
    sentences = [*_best_rewards(runs), *_lowest_losses(runs)]
    return " ".join(sentences) or (
        "No two of these runs can be compared: they differ in method, data or the rows of an estimate. "
        "Each run's own result is at the head of its section."
    )


def _lowest_losses(runs: Sequence[Run]) -> list[str]:
    """For every group of runs estimated on the same rows, the one with the lowest loss, each at its best checkpoint."""
    groups: dict[str, tuple[str, dict[str, Estimate]]] = {}  # rows -> unit, run -> estimate
    for run in runs:
        if estimates := read_estimates(run):
            lowest = min(estimates, key=lambda e: (e.validation_loss, e.step))
            kind = kind_of(run)
            _, named = groups.setdefault(f"{kind} {_rows_of(run, kind)}", (loss_unit(run.config, kind), {}))
            named[run.path.name if run.path.name not in named else str(run.path)] = lowest
    sentences = []
    for unit, lowest_of in groups.values():
        if len(lowest_of) > 1:
            best = min(lowest_of, key=lambda name: lowest_of[name].validation_loss)
            level = 1 - 0.05 / (len(lowest_of) - 1)  # the lowest was picked (Bonferroni)
            one = lowest_of[best]
            against: list[Against] = [
                (name, loss_difference(e.parts, one.parts, level=level) if comparable(e, one) else None)
                for name, e in lowest_of.items()
                if name != best
            ]
            what = f"{best} at step {one.step:,} has the lowest validation loss, {loss_text(one)}"
            sentences.append(_ranked(f"{what} {unit}", against, "below"))
    return sentences


def _rows_of(run: Run, kind: str) -> str:
    """What two runs have in common whose losses can be compared; DPO's is held to the model that it began with."""
    config = run.config
    facts = measured_on(config, kind, str((config.get("model") or {}).get("name")))
    if kind != "dpo":
        del facts["model.name"]
    return repr((sorted(facts.items()), rows_seed(config)))


def _best_rewards(runs: Sequence[Run]) -> list[str]:
    """For every scorer, the run with the highest reward, each at its chosen checkpoint, on the prompts that all answered."""
    by_scorer: dict[str, dict[str, dict[str, float]]] = {}
    for run in runs:
        events = run.metrics("reward")
        chosen = (run.status.get("choice") or {}).get("best_step")
        event = next((r for r in events if r["step"] == chosen), events[-1] if events else {})
        records = run.answers([]).get(event.get("step", -1), [])
        if (rewards := rewards_by_prompt(records)) and event.get("scorer"):
            named = by_scorer.setdefault(str(event.get("scorer")), {})
            named[run.path.name if run.path.name not in named else str(run.path)] = rewards
    return [ranked_by_reward(scorer, rewards) for scorer, rewards in by_scorer.items() if len(rewards) > 1]


def ranked_by_reward(scorer: str, by_name: Mapping[str, Mapping[str, float]]) -> str:
    """The name with the highest mean reward and how it stands to the others. found: name -> prompt -> reward, two names or more."""
    shared = sorted(set.intersection(*(set(r) for r in by_name.values())))
    if not shared:
        return f"{_listed(list(by_name))} answered different prompts, so their rewards cannot be compared."
    values = {name: [rewards[p] for p in shared] for name, rewards in by_name.items()}
    best = max(values, key=lambda name: fmean(values[name]))
    level = 1 - 0.05 / (len(values) - 1)
    against: list[Against] = [
        (name, paired_difference(values[best], v, level=level)) for name, v in values.items() if name != best
    ]
    mean = _interval(bootstrap_interval(values[best]))
    what = f"{best} has the highest mean reward, {mean} on {len(shared)} prompts, scored by {scorer}"
    return _ranked(what, against, "above")


def _ranked(what: str, against: Sequence[Against], side: str) -> str:
    """`what`, and how it stands to each of the others."""
    surely = [f"{_interval(d)} {side} {name}" for name, d in against if d is not None and apart(d)]
    alike = [f"{name} ({_interval(d)})" for name, d in against if d is not None and not apart(d)]
    unknown = [name for name, d in against if d is None]
    text = f"{what}{': ' if surely else ''}{_listed(surely) if surely else ''}."
    if alike:
        text += f" Not distinguishable from it: {_listed(alike)}."
    if unknown:
        text += f" {_listed(unknown)} kept no losses of the same batches, so the difference has no interval."
    return text
