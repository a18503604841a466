"""The two errors that a user can meet, each one line that says what was asked, what was found, where, and the way out; and notes."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path


class UserError(ValueError):
    """Something the user asked for cannot be done; the command line prints it in one line and exits with 1."""


class UsageError(UserError):
    """The command line or a configuration file is wrong; exit code 2."""


class Note(UserWarning):
    """Something that a user should know and that stops nothing: a warning in Python, a line `note: ...` on the command line."""


def note(text: str) -> None:
    """Give a note; the same one is given once. `warnings.filterwarnings("ignore", category=Note)` silences all."""
    warnings.warn(text, Note, stacklevel=3)


def did_you_mean(name: str, known: Iterable[str] | Mapping[str, str], least: float = 0.6) -> str:
    """`. Did you mean sample?` for a name that looks like one of the known ones; else "".

    known: names, or name -> what to suggest for it. least: how alike they have to be, 0 to 1.
    """
    meant = known if isinstance(known, Mapping) else {word: word for word in known}
    near = difflib.get_close_matches(name, meant, 1, least)
    return f". Did you mean {meant[near[0]]}?" if near else ""


def paths_beside(path: Path, limit: int = 1000) -> list[str]:
    """What lies in the folder of a path that does not exist, written as that path is; nothing if there is no such folder."""
    folder = path.parent
    return [str(folder / p.name) for p in islice(folder.iterdir(), limit)] if folder.is_dir() else []
