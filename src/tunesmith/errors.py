"""The two errors that a user can meet, each one line that says what was asked, what was found, where, and the way out; and notes."""

from __future__ import annotations

import warnings


class UserError(ValueError):
    """Something the user asked for cannot be done; the command line prints it in one line and exits with 1."""


class UsageError(UserError):
    """The command line or a configuration file is wrong; exit code 2."""


class Note(UserWarning):
    """Something that a user should know and that stops nothing: a warning in Python, a line `note: ...` on the command line."""


def note(text: str) -> None:
    """Give a note; the same one is given once. `warnings.filterwarnings("ignore", category=Note)` silences all."""
    warnings.warn(text, Note, stacklevel=3)
