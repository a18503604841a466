"""JSON that comes from outside: anything wrong with a text is one kind of error, one bad line, or one clear message.

`parse_json` and `json_object` raise the bare fact, and their callers add what the file is and the way out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from tunesmith.errors import UserError

Json = dict[str, Any]
Bad = Callable[[int, str], None]
CUT_OFF = "the file is cut off there"


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


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def json_object(path: Path) -> Json:
    """The object in a file. Raises: OSError, FileNotFoundError among others; ValueError saying what is wrong with the content."""
    return _object(path.read_text(encoding="utf-8-sig"))


def _object(text: str) -> Json:
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected an object")
    return content


def json_lines(path: Path, bad: Bad) -> Iterator[tuple[int, Json]]:
    """(line number from 1, object) of every readable line of a file. Raises: OSError, FileNotFoundError among others.

    bad: called with the number of an unreadable line and what is wrong with it, so that one bad line stays one: it notes
    that down, or raises. Of a last line that somebody is writing, or was when the machine stopped, it hears CUT_OFF.
    Lines end in \n alone, empty ones count but hold nothing, and bytes that are not UTF-8 become U+FFFD.
    """
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                content = _object(line)
            except ValueError as error:
                bad(number, str(error) if line.endswith("\n") else CUT_OFF)
            else:
                yield number, content


def read_json(path: Path) -> Json:
    """The object in a file of a model's directory. Raises: UserError naming the file if it is missing or broken."""
    try:
        return json_object(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a model directory needs it") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download or save the model again") from None


def read_json_if_there(path: Path) -> Json:
    """As `read_json`; empty where there is no such file."""
    return read_json(path) if path.exists() else {}


def write_json(path: Path, content: Json) -> None:
    """Write an object as transformers and PEFT lay it out. Raises: OSError."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
