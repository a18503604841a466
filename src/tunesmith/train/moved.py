"""What the options of a resumed run name, where it lies now: the run, its data, its base or its judge may have been moved."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.data.mixture import parse_sets
from tunesmith.errors import UserError
from tunesmith.files.bases import OWN_BASE, holds_model
from tunesmith.files.places import PLACES, exists, gone, located, located_sets, places_of
from tunesmith.files.run import Run
from tunesmith.options.configs import with_options
from tunesmith.options.marks import marked_options

C = TypeVar("C")
SETS = ("data.name", "dpo.sft_data")  # may be several, with weights
BY_NAME = ("eval.reward",)  # names a place too, but its content is not compared


def as_they_lie(config: C, run: Run) -> C:
    """The configuration with every place that is named as when the run began (in its config.yaml) replaced by where it is now.

    Raises: UserError for what lies nowhere any more: data, prompts, a judge, a base that the run still needs.
    """
    stored = run.config
    for name, value in _named(config):
        group, key = name.split(".")
        if value != (stored.get(group) or {}).get(key):
            continue
        now = _located(run, name, value)
        if (place := gone(run, value)) and now == value:
            raise UserError(
                f"--resume: --{name} {value}: {place}, which the run began with, is not there. If it was moved (or the run), "
                f"name it again: --{name} PATH"
            )
        if now != value:
            config = with_options(config, {name: now})
    return config


def names_kept(config: Any, stored: Mapping[str, Any], run: Run) -> dict[str, str]:
    """Option -> its name in config.yaml, of the places that have another name now and are the same place."""
    kept = {}
    for name, value in _named(config):
        group, key = name.split(".")
        before = (stored.get(group) or {}).get(key)
        if isinstance(before, str) and before != value and _same(_located(run, name, before), value):
            kept[name] = before
    return kept


def places_named(config: Any, path: Path, without: Collection[str] = ()) -> dict[str, str]:
    """Where everything that the options name lies from the run at `path` (`places_of`); without: options to pass over."""
    named = [(name, value) for name, value in _named(config) if name not in without]
    each = [[part for part, _ in parse_sets(value)] if name in SETS else [value] for name, value in named]
    return places_of(path, chain.from_iterable(each))


def _named(config: Any) -> Iterator[tuple[str, str]]:
    """The options that name a place: dotted name and value."""
    for option in marked_options(config):
        if not isinstance(option.value, str):
            continue
        is_file = option.name == "chat.template" and option.value.endswith(
            ".jinja"
        )  # its content is compared by its hash
        if option.mark == "content" or option.name in BY_NAME or is_file:
            yield option.name, option.value


def _located(run: Run, name: str, value: str) -> str:
    if name in SETS:
        return located_sets(run, value)
    place = located(run, value)
    if name == "model.name" and place in (run.inputs or {}).get(PLACES, {}) and not exists(Path(place).expanduser()):
        return _own_weights(run) or place
    return place


def _own_weights(run: Run) -> str:
    """What a run has in place of the model that it began with; "" where it has nothing.

    With adapters: the base that it keeps. Of all weights of a language model: its last checkpoint, all that it needs of one.
    """
    if (run.config.get("lora") or {}).get("rank"):
        own = run.path / OWN_BASE
        return str(own) if holds_model(own) else ""
    saved = run.checkpoints() if (run.inputs or {}).get("command") == "sft" else []
    return str(saved[-1][1]) if saved else ""


def _same(a: str, b: str) -> bool:
    return a == b or Path(a).expanduser().resolve() == Path(b).expanduser().resolve()
