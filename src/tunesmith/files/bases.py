"""Where the base of an adapter may lie, now that either may have been moved: the places, the likeliest first, and `--model.base`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import note
from tunesmith.files import adapters
from tunesmith.files.adapters import AdapterFiles
from tunesmith.files.converted import converted_here

OWN_BASE = "base"  # in a run's directory: the base of its adapters where no other directory holds it
SAMPLE = Path(__file__).parents[1] / "sample" / "model"


@dataclass
class Asked:
    """A base that was asked for, and whether an adapter has looked there."""

    name: str
    used: bool = False


_base_at: ContextVar[Asked | None] = ContextVar("base_at", default=None)


@contextlib.contextmanager
def base_at(name: str | None) -> Iterator[None]:
    """Inside, the base of an adapter is looked for here first: `--model.base`. None: only where the adapter says.

    A note says so if there was no adapter to use it.
    """
    asked = None if name is None else Asked(name)
    before = _base_at.set(asked)
    try:
        yield
    finally:
        _base_at.reset(before)
    if asked and not asked.used:
        note(
            f"--model.base {asked.name} was not used: it names the base of an adapter, and no MODEL here is an adapter"
        )


def asked_base() -> Asked | None:
    """What the innermost `base_at` asks for."""
    return _base_at.get()


def places_of_base(directory: Path, files: AdapterFiles) -> Iterator[Path]:
    """Where the base of an adapter may lie on this machine, the likeliest first."""
    home = directory.resolve()
    if files.from_here:
        yield home / files.from_here
    if files.base == "sample":
        yield SAMPLE
    elif files.base:
        stored = Path(files.base).expanduser()
        if stored.name == OWN_BASE and files.fingerprint:
            yield home.parent.parent / OWN_BASE
        if not stored.is_absolute() and len(stored.parts) > 1:  # one on the hub is never found like this by accident:
            yield from (
                above / stored for above in home.parents
            )  # its owner's folder would have to lie above the adapter
        yield stored
        if (in_cache := converted_here(files.base)) is not None:
            yield in_cache
        if files.fingerprint:
            yield home.parent.parent / OWN_BASE


def holds_model(place: Path) -> bool:
    """Whether a model, an adapter or a run lies there."""
    return any((place / file).exists() for file in ("config.json", adapters.CONFIG, "status.json"))


def may_be_on_hub(name: str) -> bool:
    """Whether a base's name can be one on the hub."""
    return bool(name) and not name.startswith((".", "/", "~")) and name.count("/") < 2
