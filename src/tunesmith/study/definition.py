"""A study's file: read, merged with one of its scales, and checked key by key. What it means is worked out in `matrix`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import UsageError
from tunesmith.options.parse import nearest, option_types
from tunesmith.options.yamlfile import read_yaml
from tunesmith.train.methods.table import METHODS

COMMANDS: dict[str, Any] = {m.command: m.config for m in METHODS.values() if not m.new_model}
# each beside what is special to it
BUILT_IN = {path.stem: path for path in sorted(Path(__file__).parent.glob("*/*.yaml"))}
NOT_YOURS = ("out", "resume", "resume_changes")  # options that the study sets itself
BATCHINGS = ("paper", "ours", "as_set")
TOP = ("name", "title", "batching", "seeds", "base", "runs", "experiments", "figures", "tables", "scales")
ENTRY = ("command", "config", "set", "matrix", "label", "labels", "once", "continues", "needs")
EXPERIMENT = ("title", "runs", "also", "lr_search", *ENTRY)
ID = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True)
class Entry:
    """Runs of one kind as the file writes them: a name (a template where there is a matrix) and what they are set to.

    where: file and key, for messages.
    """

    name: str
    where: str
    command: str = "sft"
    config: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    matrix: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    label: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    once: bool = False
    continues: str | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """entries: its own runs and, as (run, label), those of others that it shows too, in the order of the file."""

    id: str
    title: str
    entries: Sequence[Entry | tuple[str, str]]
    lr_search: tuple[float, ...]
    where: str


@dataclass(frozen=True)
class StudyFile:
    """A study as written, at one scale. base: command -> dotted option -> value. content: the merged YAML, to be stored."""

    name: str
    scale: str | None
    title: str
    file: str
    batching: str
    seeds: tuple[int, ...]
    base: Mapping[str, Mapping[str, Any]]
    helpers: Sequence[Entry]
    experiments: Sequence[Experiment]
    figures: Sequence[str]
    tables: Sequence[str]
    content: Mapping[str, Any]
    folder: Path  # where the file lies: relative paths in it are looked for there first


def study_path(name: str) -> Path:
    """The file of a study: the name of a built-in one, or a path. Raises: UsageError listing the built-in ones."""
    if Path(name).is_file():
        return Path(name)
    if name in BUILT_IN:
        return BUILT_IN[name]
    near = nearest(name, list(BUILT_IN)) or "."
    raise UsageError(f"study {name}: no such file, and no such built-in study{near} Built in: {', '.join(BUILT_IN)}")


def read_study_file(path: Path, scale: str | None = None, **changes: Any) -> StudyFile:
    """A study's file at a scale (default: its first). changes: top-level keys that replace those of the file.

    Raises: UsageError with file and key for anything that is unknown, missing or of the wrong kind.
    """
    content = _load(path)
    file = path.name if path in BUILT_IN.values() else str(path)
    scales = _mapping(content.pop("scales", {}), f"{file}: scales")
    if scale is not None and scale not in scales:
        there = f"{nearest(scale, list(scales)) or '.'} It has: {', '.join(scales)}" if scales else "; it has no scales"
        raise UsageError(f"--scale {scale}: {file} has no such scale{there}")
    chosen = scale or next(iter(scales), None)
    for name, override in scales.items():
        _known(_mapping(override or {}, f"{file}: scales.{name}"), TOP[:-1], f"{file}: scales.{name}")
    content = _merge(content, scales.get(chosen or "") or {}) | {k: v for k, v in changes.items() if v is not None}
    _known(content, TOP, file)
    return _study(content, file, path.stem, chosen, path.parent)


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as text:
            content = read_yaml(text, str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error.reason}); save it as UTF-8"
        raise UsageError(f"study {path}: {reason}. Give a YAML file like those in docs/study.md") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    return _mapping(content, f"{path}: a study")


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merged key by key, everything else replaced; null takes a whole mapping (an experiment, a run) away."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and value is None:
            del merged[key]
        else:
            merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _study(content: dict[str, Any], file: str, stem: str, scale: str | None, folder: Path) -> StudyFile:
    """Raises: UsageError."""
    name = str(content.get("name", stem))
    if not ID.fullmatch(name):
        raise UsageError(f'{file}: name: {name!r} is used as a directory; use a-z, 0-9, ".", "_" and "-"')
    batching = content.get("batching", "as_set")
    if batching not in BATCHINGS:
        raise UsageError(f"{file}: batching: {batching!r}, expected {', '.join(BATCHINGS)}")
    seeds = content.get("seeds", [1234])
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        raise UsageError(f"{file}: seeds: {seeds!r}, expected a list of whole numbers, such as [1234, 5678]")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"{file}: seeds: {seeds!r} names a seed twice")
    base = {}
    for command, settings in _mapping(content.get("base", {}), f"{file}: base").items():
        where = f"{file}: base.{command}"
        _known({command: 0}, tuple(COMMANDS), f"{file}: base")
        base[command] = flatten(settings, command, where)
    runs = _mapping(content.get("runs", {}), f"{file}: runs")
    helpers = [_entry(str(name), body or {}, {}, f"{file}: runs.{name}") for name, body in runs.items()]
    wanted = _mapping(content.get("experiments", {}), f"{file}: experiments")
    experiments = [_experiment(str(id), body or {}, f"{file}: experiments.{id}") for id, body in wanted.items()]
    if not helpers and not any(e.entries for e in experiments):
        raise UsageError(f"{file}: no runs; give `experiments:` with at least one, as in docs/study.md")
    title, content = str(content.get("title", name)), {**content, "scale": scale}
    figures, tables = (_names(content.get(kind, []), f"{file}: {kind}") for kind in ("figures", "tables"))
    return StudyFile(
        name, scale, title, file, batching, tuple(seeds), base, helpers, experiments, figures, tables, content, folder
    )


def _experiment(id: str, body: Any, where: str) -> Experiment:
    body = _mapping(body, where)
    _known(body, EXPERIMENT, where)
    if not ID.fullmatch(id):
        raise UsageError(f'{where}: {id!r} is used in names; use a-z, 0-9, ".", "_" and "-"')
    search = body.get("lr_search", [])
    if not isinstance(search, list) or not all(isinstance(rate, int | float) and rate > 0 for rate in search):
        raise UsageError(f"{where}.lr_search: {search!r}, expected a list of learning rates, such as [1e-4, 1e-3]")
    shared = {key: body[key] for key in ENTRY if key in body}
    entries: list[Entry | tuple[str, str]] = []
    for key in body:
        if key == "runs":
            runs = _mapping(body["runs"], f"{where}.runs")
            entries += [_entry(str(name), run or {}, shared, f"{where}.runs.{name}") for name, run in runs.items()]
        elif key == "also":
            others = _mapping(body["also"], f"{where}.also")
            entries += [(str(name), str(label)) for name, label in others.items()]
    if not entries:
        entries = [_entry(id, {}, shared, where)]
    return Experiment(id, str(body.get("title", id)), entries, tuple(map(float, search)), where)


def _entry(name: str, body: Any, shared: Mapping[str, Any], where: str) -> Entry:
    """One kind of run; `shared` is what its experiment says for all of them."""
    body = _mapping(body, where)
    _known(body, ENTRY, where)
    given = {**shared, **body}
    command = given.get("command", "sft")
    _known({command: 0}, tuple(COMMANDS), f"{where}.command")
    settings = flatten(shared.get("set") or {}, command, where) | flatten(
        body.get("set") or {}, command, f"{where}.set"
    )
    matrix = flatten(given.get("matrix") or {}, command, f"{where}.matrix")
    for option, values in matrix.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"{where}.matrix.{option}: {values!r}, expected a list of values")
    config = given.get("config", [])
    return Entry(
        name,
        where,
        command,
        config=tuple(_names([config] if isinstance(config, str) else config, f"{where}.config")),
        settings=settings,
        matrix=matrix,
        label=None if given.get("label") is None else str(given["label"]),
        labels={str(k): str(v) for k, v in _mapping(given.get("labels", {}), f"{where}.labels").items()},
        once=_switch(given.get("once", False), f"{where}.once"),
        continues=None if given.get("continues") is None else str(given["continues"]).removeprefix("@"),
        needs=tuple(n.removeprefix("@") for n in _names(given.get("needs", []), f"{where}.needs")),
    )


def flatten(settings: Any, command: str, where: str) -> dict[str, Any]:
    """Groups of options, or dotted names, as dotted name -> value; `{run: NAME, step: N}` becomes "@NAME@N".

    Raises: UsageError with the nearest name for an option that the command has not.
    """
    types = option_types(COMMANDS[command])
    groups = {name.split(".")[0] for name in types if "." in name}
    flat: dict[str, Any] = {}
    for key, value in _mapping(settings, where).items():
        if key in groups:
            for name, inner in _mapping(value, f"{where}.{key}").items():
                flat[f"{key}.{name}"] = inner
        else:
            flat[str(key)] = value
    for name, value in flat.items():
        if name in NOT_YOURS:
            raise UsageError(f"{where}: {name} is set by the study itself; remove it")
        if name not in types:
            raise UsageError(f'{where}: {command} has no option "{name}"{nearest(name, list(types))}')
        if isinstance(value, dict):
            flat[name] = _reference(value, f"{where}.{name}")
    return flat


def _reference(value: Mapping[str, Any], where: str) -> str:
    _known(value, ("run", "step"), where)
    if not isinstance(value.get("run"), str):
        raise UsageError(f"{where}: expected a value, or {{run: NAME}} for another run of the study")
    return f"@{value['run'].removeprefix('@')}" + (f"@{value['step']}" if value.get("step") is not None else "")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected keys and values, found {value!r}")
    return value


def _names(value: Any, where: str) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"{where}: {value!r}, expected a list of names")
    return list(value)


def _switch(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{where}: {value!r}, expected true or false")
    return value


def _known(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise UsageError(
                f'{where}: unknown key "{key}"{nearest(str(key), list(known)) or "."} Known: {", ".join(known)}'
            )
