"""JSON that comes from outside: whatever is wrong with it is one kind of error."""

from __future__ import annotations

import json
from typing import Any


class UnreadableJSON(json.JSONDecodeError):
    """JSON that may be well formed, but that Python does not read: nested too deeply, or a number with too many digits."""


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text stands for.

    `json.loads` raises RecursionError for deep nesting and a plain ValueError for a number of more than 4,300 digits; here
    both are a JSONDecodeError, so that one bad row stays one bad row.
    Raises: json.JSONDecodeError; UnicodeDecodeError for bytes that are not Unicode text.
    """
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise _as_one_kind(error, text) from None


def parse_json_from(text: str, start: int) -> tuple[Any, int]:
    """The first value at `start`, and where it ends: for texts that hold several. Raises: json.JSONDecodeError."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (RecursionError, ValueError) as error:
        raise _as_one_kind(error, text) from None


def _as_one_kind(error: Exception, text: str | bytes) -> Exception:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return error
    reason = "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"
    return UnreadableJSON(reason, text if isinstance(text, str) else "", 0)
