"""Where the things lie that a run or an adapter names, now that it may have been moved, copied or is used from elsewhere.

inputs.json says in which folder a run was started, and where the run lay in it (`started_here`). So what a run names is found
by its path from the run: what was moved together, a project or a study in it, stays together. Names stay in the files as they
were given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tunesmith.data.datasets import is_named
from tunesmith.data.mixture import parse_sets
from tunesmith.files.run import Run

FOLDER = "folder"  # key in inputs.json


def started_here(run: Path) -> dict[str, str]:
    """For inputs.json: the current directory, from which a run's names are read, and the run's path from it."""
    here = Path.cwd()
    return {"path": str(here), "run": os.path.relpath(run.resolve(), here)}


def located(run: Run, name: str) -> str:
    """A model, file or directory that a run's options name, as it lies now; the name itself where it leads there or nowhere.

    Looked for where it lay from the run; then by the name as it is; then, for a relative one, from every folder above the
    run. `@STEP` stays at its end.
    """
    if name == "sample":
        return name
    stem, at, step = name.rpartition("@")
    if not at or not step.isdigit():
        stem, at, step = name, "", ""
    plain = Path(stem).expanduser()
    for place in _places(run, plain):
        if _exists(place):
            if _exists(plain) and place.resolve() == plain.resolve():
                return name
            now, here = Path(os.path.normpath(place)), Path.cwd()
            return f"{now.relative_to(here) if now.is_relative_to(here) else now}{at}{step}"
    return name


def located_sets(run: Run, names: str) -> str:
    """As `located`, for `data.name`: one data set or several with their weights."""
    sets = [(name if is_named(name) else located(run, name), weight) for name, weight in parse_sets(names)]
    if [name for name, _ in sets] == [name for name, _ in parse_sets(names)]:
        return names
    return ",".join(name if weight is None else f"{name}*{weight:g}" for name, weight in sets)


def _places(run: Run, name: Path) -> Iterator[Path]:
    folder, home = (run.inputs or {}).get(FOLDER), run.path.resolve()
    if isinstance(folder, dict) and {"path", "run"} <= folder.keys():
        start = Path(folder["path"])
        yield home / os.path.relpath(start / name, start / folder["run"])
    yield name
    if not name.is_absolute():
        yield from (above / name for above in home.parents)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name of the hub, or a list, that no file system takes
        return False
