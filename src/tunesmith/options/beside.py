"""Files and directories that a YAML file of options names: looked for beside that file, and then in the current directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.jsontext import parse_json

PLACES = (
    "model.name",
    "model.base",
    "chat.template",
    "data.name",
    "data.root",
    "data.rm_static",
    "dpo.sft_data",
    "eval.reward",
    "eval.prompts",
    "tokenizer.name",
    "prompts",
    "reward",
    "reference",
    "against",
)
"""Options that name something to read. What is written (`out`) goes by the current directory alone."""
SETS = ("data.name", "dpo.sft_data", "against")  # may be several, with weights
NAMED_SETS = ("sample", "hh", "hh-static", "hh-helpful-half", "hh-pairs")
"""Names of data sets and of the embedded model: never files (a test holds them equal to those of `data.datasets`)."""


def placed(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Options by dotted name, with every relative path that leads somewhere from `folder`, the file's, as it is from here.

    Names that lead nowhere from there stay as they are. The configuration of a run was written elsewhere: its names are
    looked for where they lay from the run (`places` in its inputs.json).
    """
    of_run = _of_run(folder)

    def place(text: str) -> str:
        stem, at, step = text.rpartition("@")
        stem = stem if at and step.isdigit() else text
        path = Path(stem).expanduser()
        if path.is_absolute() or text.startswith("@") or not stem or stem.partition(":")[0] in NAMED_SETS:
            return text
        away = stem if of_run is None else of_run.get(text)
        there = None if away is None else folder / away
        if there is None or not _exists(there) or (_exists(path) and path.resolve() == there.resolve()):
            return text
        now, here = Path(os.path.normpath(Path.cwd() / there)), Path.cwd()
        return f"{now.relative_to(here) if now.is_relative_to(here) else now}{text[len(stem) :]}"

    def several(text: str) -> str:
        if not ("," in text or "*" in text) or _exists(folder / text) or _exists(Path(text)):
            return place(text)
        parts = [part.strip().rpartition("*") if "*" in part else (part.strip(), "", "") for part in text.split(",")]
        return ",".join(f"{place(name.strip())}{star}{weight}" for name, star, weight in parts)

    found = dict(options)
    for name in PLACES:
        value = options.get(name)
        if isinstance(value, str):
            found[name] = several(value) if name in SETS else place(value)
        elif isinstance(value, list) and name in SETS:
            found[name] = [several(part) if isinstance(part, str) else part for part in value]
    return found


def _of_run(folder: Path) -> dict[str, str] | None:
    """Where everything lay that the run in this folder names; None where it holds no run."""
    if not (folder / "status.json").is_file():
        return None
    with contextlib.suppress(OSError, ValueError):
        inputs = parse_json((folder / "inputs.json").read_text(encoding="utf-8"))
        if isinstance(inputs, dict) and isinstance(places := inputs.get("places"), dict):
            return {name: place for name, place in places.items() if isinstance(place, str)}
    return {}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # what no file system can hold
        return False
