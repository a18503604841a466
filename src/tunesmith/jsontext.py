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
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    return _guarded(json.loads, text)


def parse_json_from(text: str, start: int) -> tuple[Any, int]:
    """The first value at `start`, and where it ends: for texts that hold several. Raises: json.JSONDecodeError."""
    found: tuple[Any, int] = _guarded(json.JSONDecoder().raw_decode, text, start)
    return found


def _guarded(parse: Any, text: str, *more: Any) -> Any:
    try:
        return parse(text, *more)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise UnreadableJSON("nested too deeply", text, 0) from None
    except ValueError:  # sys.get_int_max_str_digits
        raise UnreadableJSON("a number with too many digits", text, 0) from None
