"""Prompts: sets of them for evaluation, the embedded forty or a user's file; and a conversation as the ids that a model reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tunesmith.data.dialogue import BadRow, Message, parse_messages, prompt_segments
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UsageError, UserError

EMBEDDED = Path(__file__).parents[1] / "sample" / "prompts.jsonl"
Conversation = Sequence[Message] | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Prompt:
    """One user question; group: its topic, "" where the file names none."""

    text: str
    group: str = ""


def load_prompts(file: str | None = None, limit: int | None = None, option: str = "--prompts") -> list[Prompt]:
    """The embedded prompts, or those of a file: JSONL with `prompt` (and perhaps `group`), else one prompt a line.

    Raises: UserError naming file and line.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}, expected at least 1")
    path = Path(file).expanduser() if file else EMBEDDED
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also cut at U+2028 and its like
    except FileNotFoundError:
        raise UserError(
            f"{option} {path}: no such file; give one prompt a line, or JSONL with `prompt` and `group`"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option} {path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    jsonl = path.suffix == ".jsonl"
    prompts = [
        _prompt(line, f"{option} {path}:{number}") if jsonl else Prompt(line.strip())
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise UserError(f"{option} {path}: no prompt in it; give one a line, or JSONL with `prompt` and `group`")
    return prompts[:limit]


def _prompt(line: str, place: str) -> Prompt:
    """A line of JSON: a string, or an object with `prompt` and perhaps `group`."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg}); expected an object with `prompt`") from None
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f"{place}: expected an object with a text `prompt` (and perhaps `group`)")
    return Prompt(row["prompt"], str(row.get("group", "")))


def encode_prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Ids of a conversation up to and including `Assistant:`, the same as in training. Raises: UserError."""
    try:
        messages = [m if isinstance(m, Message) else parse_messages([m]).messages[0] for m in conversation]
    except BadRow as reason:
        raise UserError(
            f"a prompt is no conversation: {reason}; expected [{{'role': 'user', 'content': '...'}}, ...]"
        ) from None
    return list(chain.from_iterable(tokenizer.encode_pieces(prompt_segments(messages))))
