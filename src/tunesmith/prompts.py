"""Sets of evaluation prompts: the embedded forty, or a user's file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import UserError

EMBEDDED = Path(__file__).parent / "sample" / "prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """One user question; group: its topic, "" where the file names none."""

    text: str
    group: str = ""


def load_prompts(file: str | None = None, limit: int | None = None) -> list[Prompt]:
    """The embedded prompts, or those of a file: JSONL with `prompt` (and perhaps `group`), else one prompt a line.

    Raises: UserError naming file and line.
    """
    path = Path(file).expanduser() if file else EMBEDDED
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"--prompts {path}: no such file; give one prompt a line, or JSONL with `prompt` and `group`"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(Prompt(line.strip()))
            continue
        try:
            row = json.loads(line)
            prompts.append(
                Prompt(
                    row["prompt"] if isinstance(row, dict) else str(row),
                    row.get("group", "") if isinstance(row, dict) else "",
                )
            )
        except (json.JSONDecodeError, KeyError) as error:
            raise UserError(f"--prompts {path}:{number}: expected an object with `prompt` ({error})") from None
    if not prompts:
        raise UserError(f"--prompts {path}: no prompt in it")
    return prompts[:limit]
