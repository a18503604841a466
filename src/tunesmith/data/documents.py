"""JSON in forms other than JSON lines: one document of many rows, documents one after the other, and columns in place of rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.columns import NAMES
from tunesmith.data.dialogue import is_turns
from tunesmith.errors import UserError
from tunesmith.jsontext import UnreadableJSON, parse_json, parse_json_from

SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"),
}
"""The splits, and by which words files, columns and keys are known as theirs; of several tests the first is taken."""
ROW_KEYS = {*NAMES["messages"], *NAMES["text"], *NAMES["chosen"], "prompt", "question", "instruction"}
ABOUT = ("features", "fields", "columns", "schema")  # lists that describe the rows beside them

_BETWEEN = re.compile(r"[\s\ufeff]*")
_COMMA = re.compile(r"[\s\ufeff,]*")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)


def split_of_word(word: str) -> tuple[str, int] | None:
    """The split that a word stands for, alone or at the beginning (`train_sft`, `test[:10%]`), and its rank among the words.

    >>> split_of_word("validation"), split_of_word("Train_sft"), split_of_word("english")
    (('test', 2), ('train', 0), None)
    """
    word = re.split(r"[^a-z]", word.strip().lower(), maxsplit=1)[0]
    return next(((split, words.index(word)) for split, words in SPLIT_WORDS.items() if word in words), None)


def values(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of JSON values one after the other, however they are broken into lines.

    Raises: UserError if something in between is no JSON.
    """
    at, line, counted = _BETWEEN.match(text).end(), 1, 0  # type: ignore[union-attr]
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = parse_json_from(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not valid JSON ({error.msg} in line {error.lineno})") from None
        yield line, value
        at = _start(text, end)


def joined_values(text: str) -> list[Any] | None:
    """The objects that a line holds, as where files were joined or cut out of an array; None if it holds anything else."""
    found: list[Any] = []
    at = _start(text, 0)
    try:
        while at < len(text):
            value, end = parse_json_from(text, at)
            found.append(value)
            at = _COMMA.match(text, end).end()  # type: ignore[union-attr]
    except json.JSONDecodeError:
        return None
    return found if all(isinstance(value, dict) for value in found) else None


def rows_of(value: Any) -> list[Any]:
    """The rows of a list, if it is a list of objects; a dialogue, and anything else, is one row."""
    return value if _holds_rows(value) else [value]


def document_rows(path: Path, value: Any, key: str = "") -> list[Any]:
    """The rows of a whole document: a list, an object that holds one, columns, or one row.

    key: of an object with several splits, which one. Raises: UserError if it holds several lists and none is named.
    """
    if isinstance(value, list):
        return [value] if value and is_turns(value) else value
    if not isinstance(value, dict):
        return [value]
    if key:
        return document_rows(path, value.get(key, []))
    columns = _columns(value)
    if columns is not None:
        return columns
    if value.keys() & ROW_KEYS or is_turns(value):
        return [value]
    lists = {name: found for name, found in value.items() if _holds_rows(found) and name not in ABOUT}
    if len(lists) > 1:
        raise UserError(
            f"{path} holds several lists ({', '.join(lists)}): save the list with the rows as a separate file"
        )
    if not lists:
        return [] if [] in value.values() else [value]
    (rows,) = lists.values()
    return [row["row"] if isinstance(row.get("row"), dict) else row for row in rows]


def _start(text: str, at: int) -> int:
    """Where the next value begins, white space and byte-order marks left behind."""
    return _BETWEEN.match(text, at).end()  # type: ignore[union-attr]


def _holds_rows(found: Any) -> bool:
    return (
        isinstance(found, list) and bool(found) and all(isinstance(row, dict) for row in found) and not is_turns(found)
    )


def _columns(value: dict[str, Any]) -> list[Any] | None:
    """Rows of `{"prompt": [...], "completion": [...]}`, or of the three ways in which pandas writes a table; None for others."""
    if value.keys() == {"columns", "index", "data"}:
        return [dict(zip(value["columns"], row, strict=False)) for row in value["data"]]
    known = {name for names in NAMES.values() for name in names} & {key.strip().lower() for key in value}
    if not known or not value:
        return None
    cells = list(value.values())
    if all(isinstance(column, dict) and column and all(k.isdigit() for k in column) for column in cells):
        cells = [list(column.values()) for column in cells]
    if not all(isinstance(column, list) for column in cells) or any(map(is_turns, cells)):
        return None
    if len({len(column) for column in cells}) != 1:
        return None
    return [dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True)]


def split_keys(value: Any) -> dict[str, str]:
    """split -> key of an object that holds several: `{"train": [...], "validation": [...]}`; empty for anything else."""
    if not isinstance(value, dict):
        return {}
    ranked: dict[str, list[tuple[int, str]]] = {}
    for key, found in value.items():
        if isinstance(found, list | dict) and (known := split_of_word(key)):
            ranked.setdefault(known[0], []).append((known[1], key))
    return {split: min(keys)[1] for split, keys in ranked.items()} if "train" in ranked else {}


def elements(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the elements of an array, found by brackets alone: for one with an element that nobody can read."""
    depth, start, line, counted = 0, 0, 1, 0
    for token in _TOKEN.finditer(text):
        mark = token[0]
        if mark in "[{":
            depth += 1
            start = token.end() if depth == 1 else start
            continue
        if mark not in "]},":
            continue  # a string
        if depth == 1:
            part, first = text[start : token.start()], _start(text, start)
            line, counted = line + text.count("\n", counted, first), first
            if part.strip():
                yield line, part
            start = token.end()
        depth -= mark != ","


def parse_document(path: Path, text: str) -> tuple[Any, list[tuple[int, str]]]:
    """The value of a JSON document, and of an array the elements that cannot be read, as (line, reason).

    Raises: UserError, naming the line, if it is no JSON; json.JSONDecodeError `Extra data` if more than one value is in it.
    """
    try:
        return parse_json(text), []
    except UnreadableJSON as error:
        if not text.lstrip("\ufeff \t\r\n").startswith("["):
            raise UserError(f"{path} cannot be read as JSON ({error.msg}); repair or delete that part") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise
        raise UserError(f"{path} is not valid JSON ({error.msg} in line {error.lineno})") from None
    found, bad = [], []
    for line, part in elements(text):
        try:
            found.append(parse_json(part))
        except json.JSONDecodeError as error:
            bad.append((line, f"invalid JSON ({error.msg})"))
    return found, bad
