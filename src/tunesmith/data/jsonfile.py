"""A JSON object from a file that a model's directory holds; whatever is wrong with it is one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.jsontext import parse_json


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises: UserError naming the file if it is missing or broken."""
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a model directory needs it") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download or save the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; download or save the model again")
    return content


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; empty where there is no such file."""
    return read_json(path) if path.exists() else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as transformers and PEFT lay it out. Raises: OSError."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
