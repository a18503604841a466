"""A study's file worked out: every run by name with its whole configuration, its needs and a hash. Runs nothing, no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import UsageError
from tunesmith.options.beside import PLACES as NAMING
from tunesmith.options.beside import placed
from tunesmith.options.parse import from_settings, joined, later_length, nearest, preset_path
from tunesmith.options.yamlfile import read_yaml
from tunesmith.study.definition import COMMANDS, NOT_YOURS, Entry, Experiment, StudyFile, flatten

BATCHING: dict[str, dict[str, dict[str, Any]]] = {  # what `batching:` at the top of a study means for each command
    "paper": {
        "sft": {"data.batching": "windows", "data.loss_on": "all"},
        "dpo": {"data.batching": "padded", "data.truncation": "keep_start"},
    },
    "ours": {
        "sft": {"data.batching": "packed", "data.loss_on": "assistant"},
        "dpo": {"data.batching": "packed", "data.truncation": "keep_end"},
    },
}
PLACES = ("data.root", "data.rm_static", "model.base")  # where the same things lie: no part of what a run is
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class PlannedRun:
    """One run. settings: dotted option -> value, all of them; a value "@NAME" or "@NAME@STEP" is the model of another run.

    changed: the settings that differ from the command's defaults. needs: runs that must have finished before, among them
    `continues`, from whose last checkpoint it goes on. hash: of what the run will do, its needs included. written: places that the
    files name, as they stand there, where `settings` has what they are from here; a study that was moved is still the same.
    """

    name: str
    command: str
    seed: int
    settings: Mapping[str, Any]
    changed: Mapping[str, Any]
    needs: tuple[str, ...]
    continues: str | None
    where: str
    hash: str = ""
    written: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """A run in an experiment, under a label."""

    run: str
    label: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """All runs in an order in which every run comes after those it needs, and what they are shown as.

    searches: experiment -> label -> the runs among which the lowest validation loss decides.
    """

    study: StudyFile
    runs: Mapping[str, PlannedRun]
    experiments: Mapping[str, tuple[str, Sequence[Shown]]]
    searches: Mapping[str, Mapping[str, Sequence[str]]]


@dataclass
class _Maker:
    """Collects runs; raises UsageError where two would have one name."""

    study: StudyFile
    places: Mapping[str, str]
    runs: dict[str, PlannedRun] = field(default_factory=dict)
    bare: dict[str, list[str]] = field(default_factory=dict)  # name without seed -> names

    def add(self, run: PlannedRun, bare: str) -> None:
        if run.name in self.runs:
            raise UsageError(
                f'{run.where}: a run called "{run.name}" is also defined by {self.runs[run.name].where}; '
                "rename one, or put the varied option into the name, as in e5-r{lora.rank}"
            )
        self.runs[run.name] = run
        self.bare.setdefault(bare, []).append(run.name)


def make_plan(study: StudyFile, places: Mapping[str, str] | None = None) -> Plan:
    """Every run of a study. places: where the data lie, by the options in PLACES.

    Raises: UsageError with file and key for names used twice, unknown or circular needs, bad values."""
    maker = _Maker(study, places or {})
    experiments: dict[str, tuple[str, list[Shown]]] = {}
    searches: dict[str, dict[str, list[str]]] = {}
    for entry in study.helpers:
        for _ in _expand(maker, entry):
            pass
    for experiment in study.experiments:
        experiments[experiment.id] = (experiment.title, [])
    for experiment in study.experiments:  # first all own runs: what others show may be made further down
        own = {e.name: list(_expand(maker, e)) for e in experiment.entries if isinstance(e, Entry)}
        experiments[experiment.id] = (experiment.title, [shown for e in own.values() for shown in e])
        if experiment.lr_search:
            id = f"{experiment.id}-lr"
            searched, searches[id] = _search(maker, experiment, own)
            experiments[id] = (f"{experiment.title}: learning rates at equal budget", searched)
    for experiment in study.experiments:
        title, shown = experiments[experiment.id]
        experiments[experiment.id] = (title, _with_others(maker, experiment, shown))
    runs = {name: _linked(maker, run) for name, run in maker.runs.items()}
    return Plan(study, _hashed(_in_order(runs)), experiments, searches)


def _expand(maker: _Maker, entry: Entry, above: Mapping[str, Any] | None = None, suffix: str = "") -> Iterator[Shown]:
    """The runs of an entry: its matrix times the seeds. above: settings above all others; suffix: of the names."""
    study, options = maker.study, list(entry.matrix)
    presets, presets_here = _presets(entry, study.folder)
    for values in itertools.product(*entry.matrix.values()):
        varied = dict(zip(options, values, strict=True))
        for number, seed in enumerate(study.seeds, 1):
            seeds = {"train.seed": seed, "data.seed": seed}
            command = {} if study.batching == "as_set" else BATCHING[study.batching].get(entry.command, {})
            base, fixed = study.base.get(entry.command, {}), {**maker.places, **command, **seeds}
            own = later_length(entry.settings, varied, above or {})
            settings = later_length(presets, base, fixed, own)
            if settings["data.seed"] != study.seeds[0]:  # the validation rows of all runs are those of the first seed
                settings.setdefault("data.split_seed", study.seeds[0])
            config = from_settings(COMMANDS[entry.command], settings, entry.where)
            flat = dict(_flat(dataclasses.asdict(config)))
            here = {**presets_here, **placed(base, study.folder), **fixed, **placed(own, study.folder)}
            moved = {k: joined(here[k]) for k in NAMING if k in here and joined(here[k]) != flat[k]}
            plain = dict(_flat(dataclasses.asdict(COMMANDS[entry.command]())))
            bare = _filled(entry.name, config, entry, varied) + suffix
            name = bare if entry.once else f"{bare}-s{number}"
            if not NAME.fullmatch(name):
                raise UsageError(
                    f'{entry.where}: "{name}" is used as a directory; use letters, digits, ".", "_" and "-"'
                )
            changed = {k: v for k, v in flat.items() if v != plain[k]}
            needs = (*entry.needs, *([entry.continues] if entry.continues else []))
            written = {k: flat[k] for k in moved}
            run = PlannedRun(
                name, entry.command, seed, flat | moved, changed, needs, entry.continues, entry.where, written=written
            )
            maker.add(run, bare)
            yield Shown(name, _label(entry, config, varied), seed)
            if entry.once:
                break


def _presets(entry: Entry, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the entry's configuration files set, later ones winning, as written; and with the paths in them as they are from here.

    folder: the study's, where the files are looked for first.
    """
    written: dict[str, Any] = {}
    here: dict[str, Any] = {}
    for name in entry.config:
        try:
            path = Path(folder / name if (folder / name).is_file() else preset_path(name))
            content = read_yaml(path.read_text(encoding="utf-8"), name)
        except (UsageError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{entry.where}.config: {' '.join(str(error).split())}") from None
        settings = flatten(content, entry.command, f"{entry.where}.config: {name}")
        written |= settings
        here |= placed(settings, path.parent)
    return written, here


def _filled(template: str, config: Any, entry: Entry, varied: Mapping[str, Any]) -> str:
    """A name or label with `{group.option}` filled in; a name without any gets the varied values at its end."""
    try:
        text = template.format(**vars(config))
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise UsageError(f'{entry.where}: "{template}" cannot be filled in ({error}); use {{group.option}}') from None
    if text == template and varied and template == entry.name:
        text += "".join(f"-{value}" for value in varied.values())
    return text


def _label(entry: Entry, config: Any, varied: Mapping[str, Any]) -> str:
    """The label of a run in figures: the template's, or `adamw`, `rank 8`; where the file has a better word for it, that."""
    if entry.label is not None:
        text = _filled(entry.label, config, entry, varied)
    else:
        parts = [v if isinstance(v, str) else f"{option.split('.')[-1]} {v}" for option, v in varied.items()]
        text = ", ".join(parts) or entry.name
    return entry.labels.get(text, text)


def _search(
    maker: _Maker, experiment: Experiment, own: Mapping[str, Sequence[Shown]]
) -> tuple[list[Shown], dict[str, list[str]]]:
    """The runs of a learning-rate search: each entry at each rate; `own` are its runs at its own rate, which count too."""
    searched: list[Shown] = []
    choices: dict[str, list[str]] = {}
    for entry in experiment.entries:
        if not isinstance(entry, Entry):
            continue
        if "optimizer.lr" in entry.matrix:
            raise UsageError(
                f"{experiment.where}.lr_search: {entry.name} already varies optimizer.lr; keep one of them"
            )
        for rate in experiment.lr_search:
            at_own = all(maker.runs[s.run].settings["optimizer.lr"] == rate for s in own[entry.name])
            made = own[entry.name] if at_own else _expand(maker, entry, {"optimizer.lr": rate}, f"-lr{rate:g}")
            for shown in made:
                choices.setdefault(shown.label, []).append(shown.run)
                searched.append(dataclasses.replace(shown, label=f"{shown.label}, lr {rate:g}"))
    return searched, choices


def _with_others(maker: _Maker, experiment: Experiment, own: Sequence[Shown]) -> list[Shown]:
    """An experiment's own runs and those it shows of others, in the order of the file."""
    in_order: list[Shown] = []
    for entry in experiment.entries:
        if isinstance(entry, Entry):
            in_order += [shown for shown in own if maker.runs[shown.run].where == entry.where]
        else:
            name, label = entry
            names = maker.bare.get(name) or ([name] if name in maker.runs else None)
            if names is None:
                raise UsageError(f"{experiment.where}.also: {_unknown(maker, name)}")
            in_order += [Shown(n, label, maker.runs[n].seed) for n in names]
    return in_order


def _unknown(maker: _Maker, name: str) -> str:
    return f'the study has no run "{name}"{nearest(name, [*maker.bare, *maker.runs])}'


# ---- what a run needs ------------------------------------------------------------------------------------------------


def reference(value: Any) -> tuple[str, str] | None:
    """("NAME", "@STEP" or "") of a value that stands for another run's model; None for any other value."""
    if not isinstance(value, str) or not value.startswith("@"):
        return None
    name, at, step = value[1:].partition("@")
    return name, at + step


def _linked(maker: _Maker, run: PlannedRun) -> PlannedRun:
    """The run with every name of another run made exact: of the same seed where there is one of each."""
    needs: dict[str, None] = {}

    def exact(name: str, key: str) -> str:
        names = maker.bare.get(name) or ([name] if name in maker.runs else [])
        targets = [n for n in names if maker.runs[n].seed == run.seed] or names
        if not targets:
            raise UsageError(f"{run.where}.{key}: {_unknown(maker, name)}")
        needs[targets[0]] = None
        return targets[0]

    settings = dict(run.settings)
    for option, value in run.settings.items():
        if target := reference(value):
            settings[option] = f"@{exact(target[0], option)}{target[1]}"
    continues = exact(run.continues, "continues") if run.continues else None
    for name in run.needs:
        exact(name, "needs")
    if continues and maker.runs[continues].command != run.command:
        raise UsageError(
            f"{run.where}.continues: {continues} is a run of {maker.runs[continues].command}, but this is a run of {run.command}"
        )
    changed = {k: run.written.get(k, settings[k]) for k in run.changed}
    return dataclasses.replace(run, settings=settings, changed=changed, needs=tuple(needs), continues=continues)


def _in_order(runs: Mapping[str, PlannedRun]) -> dict[str, PlannedRun]:
    """The runs with every one after its needs, else as they were. Raises: UsageError naming a circle of needs."""
    ordered: dict[str, PlannedRun] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            raise UsageError(f"{runs[name].where}: runs depend on each other in a circle: {circle}")
        if name not in ordered:
            for need in runs[name].needs:
                visit(need, (*path, name))
            ordered[name] = runs[name]

    for name in runs:
        visit(name, ())
    return ordered


def _hashed(runs: Mapping[str, PlannedRun]) -> dict[str, PlannedRun]:
    """The runs with their hashes. Raises: UsageError if two are the same in everything but the name."""
    done: dict[str, PlannedRun] = {}
    same: dict[str, str] = {}
    for name, run in runs.items():
        settings = {**run.settings, **run.written}
        settings = {k: v for k, v in settings.items() if v is not None and k not in PLACES}
        settings.setdefault("optimizer.warmup_steps", 0)  # as when 0 was the default: finished runs stay finished
        if settings.get("data.block_size") == "auto":  # so did 1,024
            settings["data.block_size"] = 1024
        for option, value in settings.items():
            if target := reference(value):
                settings[option] = f"@{done[target[0]].hash}{target[1]}"
        needs = sorted(done[n].hash for n in run.needs)
        content = {"command": run.command, "settings": settings, "needs": needs}
        if run.continues:
            content["continues"] = done[run.continues].hash
        mark = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        if mark in same:
            raise UsageError(
                f'{run.where}: "{name}" is identical to "{same[mark]}" in every setting; use `also:` to show one run in two experiments'
            )
        same[mark] = name
        done[name] = dataclasses.replace(run, hash=mark)
    return done


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif prefix or key not in NOT_YOURS:
            yield prefix + key, value


# ---- what the study's directory holds of it --------------------------------------------------------------------------


def directory_of(name: str) -> str:
    """Where a run lies in the study's directory."""
    return f"runs/{name}"


def run_config(run: PlannedRun, out: Path) -> dict[str, Any]:
    """The run's configuration as groups of options, models of other runs as paths under the study's directory `out`."""
    nested: dict[str, Any] = {}
    for name, value in run.settings.items():
        if target := reference(value):
            value = f"{out / directory_of(target[0])}{target[1]}"
        group, _, key = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[key] = value
    return nested


def plan_record(plan: Plan) -> dict[str, Any]:
    """What plan.json holds: the format that the report reads."""
    study = plan.study
    return {
        "name": study.name,
        "scale": study.scale,
        "title": study.title,
        "experiments": {
            id: {"title": title, "runs": [dataclasses.asdict(s) for s in shown]}
            for id, (title, shown) in plan.experiments.items()
        },
        "runs": {
            name: {"directory": directory_of(name), "hash": run.hash, "command": run.command}
            | {"settings": dict(run.changed), "needs": list(run.needs), "continues": run.continues}
            for name, run in plan.runs.items()
        },
        "searches": {id: {label: list(names) for label, names in by.items()} for id, by in plan.searches.items()},
        "figures": list(study.figures),
        "tables": list(study.tables),
    }
