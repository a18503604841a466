"""Columns of a row: what each is by its name, or by `--data.columns`, and the form that they make together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

from tunesmith.errors import UsageError, did_you_mean

FORMATS = (
    "text | messages | prompt + completion | instruction + output | prompt + chosen + rejected | chosen + rejected; "
    "other names: --data.columns prompt=COLUMN,completion=COLUMN"
)
NAMES = {
    "messages": ("messages", "conversations", "conversation"),
    "text": ("text",),
    "system": ("system", "system_prompt"),
    "prompt": ("prompt", "question", "instruction", "query", "input"),
    "completion": ("completion", "response", "output", "answer"),
    "chosen": ("chosen", "preferred_output"),
    "rejected": ("rejected", "non_preferred_output"),
    "label": ("label",),
    "weight": ("weight",),
    "history": ("history",),
    "input": ("input", "context"),
}
"""What a column can be, and the names by which it is recognised, in lower case; the first that a row has is taken."""
MAPPED = ("messages", "text", "system", "prompt", "completion", "chosen", "rejected", "label", "weight")
BECOMES = {
    "messages": "turns", "text": "text",
    "system": "system turn", "prompt": "user turn", "completion": "assistant turn",
    "chosen": "better answer", "rejected": "worse answer", "label": "false: row left out", "weight": "0: row left out",
    "history": "turns before", "input": "added to the user turn",
}  # fmt: skip
TAKES_INPUT = ("instruction", "question", "query")  # the columns that a column `input` or `context` goes with
Columns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Form:
    """How the rows with one set of columns are read. columns: what -> its column. unused: columns that say nothing here."""

    columns: Mapping[str, str]
    unused: tuple[str, ...]

    @property
    def name(self) -> str:
        """The columns that make the form: `prompt + completion`."""
        return " + ".join(c for what, c in self.columns.items() if what not in ("label", "weight"))

    def line(self, rows: int) -> str:
        """For the user: what each column becomes."""
        columns = ", ".join(f"{column} -> {BECOMES[what]}" for what, column in self.columns.items())
        return f"form: {self.name} ({rows:,} {'row' if rows == 1 else 'rows'}): {columns}"


def parse_columns(option: str | None) -> Columns:
    """`prompt=question,label=` as pairs; an empty name means that no column is that.

    Raises: UsageError for an unknown key, or a word without `=`.
    """
    pairs = []
    for word in filter(None, (option or "").split(",")):
        what, equals, column = (part.strip() for part in word.partition("="))
        if not equals or what not in MAPPED:
            raise UsageError(
                f"--data.columns {option}: {word.strip()!r} is not KEY=COLUMN; the keys are {', '.join(MAPPED)}"
            )
        pairs.append((what, column))
    return tuple(pairs)


def absent(mapped: Columns, columns: Collection[str]) -> list[tuple[str, str]]:
    """What `--data.columns` names and is not among these columns: `system=sytem`, and `. Did you mean system?` or ""."""
    return [(f"{what}={c}", did_you_mean(c, columns)) for what, c in mapped if c and c not in columns]


@lru_cache(maxsize=4096)
def recognise(columns: frozenset[str], mapped: Columns = ()) -> Form | None:
    """The form of rows in which these columns have values; None if it is none that is known."""
    given = dict(mapped)
    plain = {name.strip().lower(): name for name in sorted(columns)} | {name: name for name in columns}
    taken = set(given.values())

    def find(what: str) -> str | None:
        if what in given:
            return given[what] if given[what] in columns else None
        return next((plain[n] for n in NAMES[what] if n in plain and plain[n] not in taken), None)

    form = _what_makes_it({what: c for what in NAMES if (c := find(what))})
    if form is None:
        return None
    used = {what: column for what, column in form.items() if column}
    return Form(used, tuple(sorted(columns - set(used.values()))))


def _what_makes_it(found: dict[str, str]) -> dict[str, str] | None:
    """Of the columns found those that make the form, in the order in which they become turns."""
    if found.get("input") == found.get("prompt"):
        found.pop("input", None)
    prompt = ["system", "history", "prompt"]
    if found.get("prompt", "").lower() in TAKES_INPUT:
        prompt.append("input")
    if "chosen" in found and "rejected" in found:
        wanted = [*prompt, "chosen", "rejected", "weight"]
    elif "messages" in found:
        wanted = ["system", "messages", "label", "weight"]
    elif "prompt" in found and "completion" in found:
        wanted = [*prompt, "completion", "label", "weight"]
    elif "text" in found:
        wanted = ["text", "weight"]
    else:
        return None
    return {what: found[what] for what in wanted if what in found}


BARE = Form({"messages": "list of turns"}, ())
"""A row that is a list of turns itself."""
