"""Where the things lie that a run or an adapter names, now that it may have been moved, copied or is used from elsewhere.

inputs.json says of every name in a run's options where that lay from the run. So what was moved together, a project or a study
in it, stays together, and the names stay in config.yaml as they were given.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.datasets import is_named
from tunesmith.data.mixture import parse_sets
from tunesmith.errors import UserError
from tunesmith.files.run import Run

PLACES = "places"  # key in inputs.json


def places_of(run: Path, names: Iterable[str]) -> dict[str, str]:
    """Name -> its path from the run's directory, of those names that are files or directories here."""
    plain = {name: Path(_stem(name)[0]).expanduser() for name in names}
    home = run.resolve()
    return {name: os.path.relpath(path.resolve(), home) for name, path in plain.items() if exists(path)}


def _stem(name: str) -> tuple[str, str]:
    """RUN@STEP as RUN and @STEP; any other name with nothing behind it."""
    stem, at, step = name.rpartition("@")
    return (stem, f"{at}{step}") if at and step.isdigit() else (name, "")


def located(run: Run, name: str) -> str:
    """A model, file or directory that a run's options name, as it lies now; the name itself where it leads there or nowhere.

    Looked for where it lay from the run; then by the name as it is; then, for a relative one, from every folder above the
    run. `@STEP` stays at its end.
    """
    if name in ("sample", "smollm2"):  # never a path, even in a project's folder of that name
        return name
    stem, step = _stem(name)
    plain = Path(stem).expanduser()
    for place in _candidates(run, name, plain):
        if exists(place):
            if exists(plain) and place.resolve() == plain.resolve():
                return name
            now, here = Path(os.path.normpath(place)), Path.cwd()
            return f"{now.relative_to(here) if now.is_relative_to(here) else now}{step}"
    return name


def located_sets(run: Run, names: str) -> str:
    """As `located`, for `data.name`: one data set or several with their weights."""
    sets = [(name if is_named(name) else located(run, name), weight) for name, weight in parse_sets(names)]
    if [name for name, _ in sets] == [name for name, _ in parse_sets(names)]:
        return names
    return ",".join(name if weight is None else f"{name}*{weight:g}" for name, weight in sets)


def gone(run: Run, names: str) -> str | None:
    """Of the files and directories that an option names the first that lies nowhere any more, as the place where it lay."""
    places = _places(run)
    for name, _ in parse_sets(names):
        if name in ("sample", "smollm2") or is_named(name) or not isinstance(place := places.get(name), str):
            continue
        if not exists(Path(_stem(located(run, name))[0]).expanduser()):
            return os.path.normpath(run.path / place)
    return None


def _places(run: Run) -> dict[str, Any]:
    known = None
    with contextlib.suppress(UserError):  # damaged: resuming the run reports it
        known = (run.inputs or {}).get(PLACES)
    return known if isinstance(known, dict) else {}


def _candidates(run: Run, name: str, plain: Path) -> Iterator[Path]:
    home = run.path.resolve()
    if isinstance(place := _places(run).get(name), str):
        yield home / place
    yield plain
    if not plain.is_absolute():
        yield from (above / plain for above in home.parents)


def exists(path: Path) -> bool:
    """Whether something lies there; False for what no file system can hold."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name of the hub, or a list, that no file system takes
        return False
