"""What a user can meet: two errors, each one line saying what was asked, what was found, where, and the way out; notes; and the
end that a signal asks for."""

from __future__ import annotations

import difflib
import signal
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path


class UserError(ValueError):
    """Something the user asked for cannot be done; the command line prints it in one line and exits with 1."""


class UsageError(UserError):
    """The command line or a configuration file is wrong; exit code 2."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the work to end. number: the signal's; code: the exit code that a shell gives to what it has ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.code = number, 128 + number


class Note(UserWarning):
    """Something a user should know that does not stop the command: a warning in Python, a line `note: ...` on the command line."""


def note(text: str) -> None:
    """Issue a note; the same note is issued once. `warnings.filterwarnings("ignore", category=Note)` silences all."""
    warnings.warn(text, Note, stacklevel=3)


def first_three(problems: Sequence[str]) -> str:
    """Problems in one line, the first three of them and how many there are besides."""
    return "; ".join(problems[:3]) + (f" (and {len(problems) - 3} more)" if len(problems) > 3 else "")


def did_you_mean(name: str, known: Iterable[str], meant: Mapping[str, str] | None = None) -> str:
    """`. Did you mean sample?` for a name that looks like one of the known ones; else "".

    meant: what to suggest for a known name, where that is not the name itself.
    """
    near = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f". Did you mean {(meant or {}).get(near[0], near[0])}?" if near else ""


def path_meant(path: Path, among: Callable[[Path], bool] = Path.exists, more: Mapping[str, str] | None = None) -> str:
    """`. Did you mean runs/first?` for a path that does not exist: what lies beside it under a similar name; else "".

    among: what can be meant. more: other names -> what to suggest for them.
    """
    folder = path.parent
    there = islice(folder.iterdir(), 1000) if folder.is_dir() else ()
    meant = {**(more or {}), **{p.name: str(folder / p.name) for p in there if among(p)}}
    return did_you_mean(path.name, meant, meant)
