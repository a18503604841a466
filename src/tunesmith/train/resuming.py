"""Whether a resumed run is still the run that it was: its options by name, what it is made from by content.

What may change is marked at the option (`options.marks`), everything else is closed. Left out: a checksum of config.yaml,
so options that somebody has edited there are taken as those that the run began with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import UsageError, UserError
from tunesmith.files.places import PLACES
from tunesmith.files.run import DRAWS, Run, check_command
from tunesmith.options.configs import AnyConfig, with_options
from tunesmith.options.marks import HISTORY, Marked, checked_history, marked_options
from tunesmith.train.methods.table import method_of
from tunesmith.train.moved import names_kept, places_named
from tunesmith.train.optim import schedule_factor
from tunesmith.train.resolve import Config, check_warmup
from tunesmith.train.splits import Splits, rows_of
from tunesmith.train.trainee import Trainee

ROWS = {  # key in inputs.json: what log and history call it, and in words
    "train": ("train rows", "the training rows"),
    "test": ("test rows", "the validation rows"),
    "sft_data": ("sft_data rows", "the rows of dpo.sft_data"),
    "prompts": ("prompts", "the prompts of eval.prompts"),
}
WEIGHTS = "base weights"
OLD_DRAWS = (
    "an earlier version began this run: from here on its training loss is estimated on other rows, drawn from all there are, "
    "no step takes rows of two epochs, and a linear or cosine rate would reach 0 one step after the last"
)


@dataclass(frozen=True)
class Change:
    """What differs from the run as it began. words: the same in a sentence for people; fixed: nobody can accept it."""

    option: str
    before: Any
    now: Any
    words: str
    fixed: bool = False


@dataclass(frozen=True)
class Origin:
    """What a run is made from and how it changed on the way.

    inputs: what inputs.json holds (`inputs_of`).
    history: accepted changes, oldest first: {"step", "option", "from", "to"}; the new value holds from the step after `step`.
    step: of the checkpoint that it goes on from; 0 at the start.
    notes: what the user should know of it.
    names: option -> how config.yaml goes on to name a place that was found under another name.
    """

    inputs: dict[str, Any]
    history: tuple[dict[str, Any], ...] = ()
    step: int = 0
    notes: tuple[str, ...] = ()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def config(self, options: dict[str, Any]) -> dict[str, Any]:
        """What config.yaml holds: the options as they are now, and what they were before."""
        options = {group: dict(values) for group, values in options.items()}
        for option, name in self.names.items():
            group, key = option.split(".")
            options[group][key] = name
        return {**options, HISTORY: list(self.history)} if self.history else options

    def events(self) -> list[dict[str, Any]]:
        """The changes at this step, to be logged: the log was cut back to the checkpoint, so none of them is in it."""
        return [{k: v for k, v in entry.items() if k != "step"} for entry in self.history if entry["step"] == self.step]


def as_begun(config: Config, stored: Mapping[str, Any]) -> Config:
    """The configuration of a resumed run, with what was left for the program to decide as it was decided then.

    A probe of the machine (train.precision auto) or a longer training (eval.every) would decide otherwise now.
    """
    for option in marked_options(config):
        group, name = option.name.split(".")
        value = stored.get(group, {}).get(name)
        undecided = (option.mark == "closed" and option.value == "auto") or (
            option.mark == "as begun" and option.value is None
        )
        if undecided and value is not None:
            config = with_options(config, {option.name: value})
    return config


def inputs_of(command: str, trainee: Trainee, splits: Splits, others: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is made from: its command, and by content its tokenizer, the weights it stands on and its rows.

    The weights are "" where a resumed run has all of its own (`Trainee.fingerprint`). others: as `rows_of`, by their key in ROWS.
    """
    inputs = {
        "command": command,
        "tokenizer": trainee.tokenizer.fingerprint,
        "template": trainee.tokenizer.template.name,
        "weights": trainee.fingerprint,
        "draws": DRAWS,
        "train": rows_of(splits.train),
    }
    if splits.validation is not splits.train:
        inputs["test"] = rows_of(splits.validation)
    return {**inputs, **others}


def settle_origin(config: AnyConfig, path: Path, inputs: dict[str, Any]) -> Origin:
    """What a run is made from; of a resumed one only if it is the same run, or its changes are accepted.

    config: resolved.
    Raises: UserError naming every difference at once, old and new, and the way out.
    """
    if not config.resume:
        return Origin({**inputs, PLACES: places_named(config, path)})
    run = Run(path)
    stored, before = run.config, run.inputs
    kept = names_kept(config, stored, run)
    inputs = {**inputs, PLACES: {**(before or {}).get(PLACES, {}), **places_named(config, path, without=kept)}}
    earlier = checked_history(stored.get(HISTORY), str(path / "config.yaml"))
    step = max((at for at, _ in run.checkpoints()), default=0)
    check_command(path, inputs["command"])
    if config.train.steps is not None and config.train.steps < step:
        raise UsageError(
            f"--train.steps {config.train.steps:,}: {path} is already at step {step:,}; give more steps, or start a new "
            "run with another --out"
        )
    changed = input_changes(before, inputs) if before else []
    same_content = before is not None and not changed
    changes, notes = option_changes(
        config, stored, same_content=same_content, base=bool(inputs["weights"]), same_places=kept
    )
    if before and not any(change.option.startswith("data.") for change in changes):
        changed += count_changes(before, inputs)
    if any(change.option == "optimizer.warmup_steps" for change in changes):
        check_warmup(config)
    changes = [*_with_rates(changes, config, stored, step), *changed]
    if before is None:
        notes.append(
            "this run has no inputs.json (it was made by an earlier version), so whether its data have changed is unknown"
        )
    if run.draws != DRAWS:
        inputs = {**inputs, "draws": run.draws}
        notes.append(OLD_DRAWS)
    refuse(changes, config, path)
    notes += [f"changed from step {step + 1:,} on: {change.words}" for change in changes]
    entries = [{"step": step, "option": c.option, "from": c.before, "to": c.now} for c in changes]
    return Origin(inputs, history([*earlier, *entries], step), step, tuple(notes), kept)


def refuse(changes: Sequence[Change], config: AnyConfig, path: Path) -> None:
    """Raises: UserError if changes were not accepted, or cannot be accepted."""
    changed = "; ".join(change.words for change in changes)
    if any(change.option == WEIGHTS for change in changes):
        what = "The reference of a DPO run" if method_of(config).held_to_start else "The base of the adapters"
        raise UserError(
            f"--resume: {changed}. {what} must stay what the run began with: name that model with --model.name, or start a new "
            "run with another --out"
        )
    if fixed := [change.option for change in changes if change.fixed]:
        raise UserError(
            f"--resume: {changed}. The checkpoints of {path} would not fit a different {', '.join(fixed)}: keep what it "
            "began with, or start a new run with another --out"
        )
    if changes and config.resume_changes != "accept":
        raise UserError(
            f"--resume: {changed}. This would no longer be the run in {path}: keep what it began with, give --resume_changes accept "
            "(the change is logged), or start a new run with another --out"
        )


def option_changes(
    config: AnyConfig, stored: Mapping[str, Any], *, same_content: bool, base: bool, same_places: Collection[str] = ()
) -> tuple[list[Change], list[str]]:
    """Closed options that differ from the stored ones, and notes on differences that change nothing.

    same_content: whether all that is compared by content is as it was; base: whether what model.name names is compared.
    same_places: options that name the same place in other words.
    """
    changes, notes = [], []
    for option in marked_options(config):
        group, name = option.name.split(".")
        before = (stored.get(group) or {}).get(name, option.default)
        now = yaml.safe_load(yaml.safe_dump(option.value))  # as it would come back from the file
        # None in data is never decided
        decided = option.default == "auto" or (option.default is None and group != "data")
        unknown = name not in (stored.get(group) or {}) and decided  # not an option then
        if before == now or unknown or option.mark == "open" or option.name in same_places:
            continue
        change = Change(option.name, before, now, f"{option.name} was {before!r}, now {now!r}", option.mark == "fixed")
        if option.mark == "content" and same_content and (option.name != "model.name" or base):
            notes.append(f"{change.words}: the same content")
        elif option.mark == "rounding" and not draws_random_numbers(config):
            notes.append(f"{change.words}, which gives the same result up to rounding")
        elif _lengthened(option, before, config):
            notes.append(f"{change.words}: the constant rate does not depend on it")
        else:
            changes.append(change)
    return changes, notes


def _lengthened(option: Marked, before: Any, config: AnyConfig) -> bool:
    longer = option.mark == "length" and isinstance(before, int) and option.value > before
    return longer and config.optimizer.schedule == "constant"


def _with_rates(changes: Sequence[Change], config: AnyConfig, stored: Mapping[str, Any], step: int) -> list[Change]:
    """The changes, the first of those that alter the schedule with what it does to the rate at this step."""
    first = next(
        (c for c in changes if c.option in ("train.steps", "optimizer.schedule", "optimizer.warmup_steps")), None
    )
    o, t = config.optimizer, config.train
    before, steps = stored.get("optimizer") or {}, (stored.get("train") or {}).get("steps")
    if first is None or not step or not isinstance(steps, int) or t.steps is None:
        return list(changes)
    was = schedule_factor(
        before.get("schedule", "constant"), step, steps=max(steps, step), warmup_steps=before.get("warmup_steps") or 0
    )
    now = schedule_factor(o.schedule, step + 1, steps=max(t.steps, step + 1), warmup_steps=o.warmup_steps or 0)
    words = (
        f"{first.words} (the {o.schedule} rate is then that of a run of {t.steps:,} steps from its start: "
        f"{was:.3g} of the peak at step {step:,}, {now:.3g} at step {step + 1:,})"
    )
    return [dataclasses.replace(c, words=words) if c is first else c for c in changes]


def draws_random_numbers(config: AnyConfig) -> bool:
    """Whether a step does: dropout, or stochastic rounding. Another device or kernel would then draw others."""
    return bool(config.model.dropout or config.lora.dropout or config.train.weights == "bf16")


def input_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What the run is made from and no longer is, by content."""
    changes = []
    for key, (name, what) in ROWS.items():
        old, new = before.get(key), now.get(key)
        if (old and old["sha256"]) != (new and new["sha256"]):
            words = f"{what} have changed ({_difference(old, new)})"
            changes.append(Change(name, _in_short(old), _in_short(new), words))
    if before.get("weights") != now["weights"] and before.get("weights"):
        words = "model.name holds different weights from the model that this run began with"
        changes.append(Change(WEIGHTS, before["weights"], now["weights"], words))
    if before.get("tokenizer") != now["tokenizer"]:
        words = "the model's tokenizer is not the one that this run began with"
        changes.append(Change("tokenizer", before.get("tokenizer"), now["tokenizer"], words))
    if (old := before.get("template", "hh")) != now["template"]:
        words = f"the chat template was {old}, now {now['template']}"
        changes.append(Change("chat template", old, now["template"], words))
    return changes


def count_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The same files and options, of which another version skips other rows."""
    changes = []
    for key, (name, what) in ROWS.items():
        old, new = before.get(key), now.get(key)
        if old and new and old["sha256"] == new["sha256"] and old["rows"] != new["rows"]:
            words = f"{what} are chosen otherwise by this version ({old['rows']:,} before, {new['rows']:,} now)"
            changes.append(Change(name, _in_short(old), _in_short(new), words))
    return changes


def _in_short(rows: Mapping[str, Any] | None) -> str:
    """For log and history: `6 rows, sha256 0123456789abcdef`."""
    if not rows:
        return "none"
    count = "" if rows["rows"] is None else f"{rows['rows']:,} rows, "
    return f"{count}sha256 {rows['sha256'][:16]}"


def _difference(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str:
    """How many rows before and now, and which files differ."""
    if old is None or new is None:
        return "none before" if old is None else "none now"
    counts = [] if old["rows"] is None else [f"{old['rows']:,} before, {new['rows']:,} now"]
    a, b = old["files"], new["files"]
    same = {digest for digest in a.values() if digest in b.values()}  # also under another name
    by_kind = {
        "changed": [name for name in b if name in a and a[name] != b[name]],
        "new": [name for name in b if name not in a and b[name] not in same],
        "gone": [name for name in a if name not in b and a[name] not in same],
    }
    return "; ".join([*counts, *(f"{how}: {', '.join(names)}" for how, names in by_kind.items() if names)])


def history(entries: Iterable[Mapping[str, Any]], step: int) -> tuple[dict[str, Any], ...]:
    """The history of a run that goes on from `step`: what was changed later never came to be, so it holds from here.

    Several changes of an option at one step are one; one that was taken back is none.
    """
    merged: dict[tuple[int, str], dict[str, Any]] = {}
    for entry in entries:
        key = min(entry["step"], step), entry["option"]
        first = merged.get(key, entry)
        merged[key] = {"step": key[0], "option": key[1], "from": first["from"], "to": entry["to"]}
    return tuple(entry for entry in merged.values() if entry["from"] != entry["to"])
