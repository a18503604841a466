"""Forms of a row: which column holds what, and the dialogue, text or preference that a row becomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tunesmith.data.dialogue import (
    BadRow,
    Dialogue,
    Message,
    Preference,
    Row,
    Seen,
    Text,
    as_transcript,
    check_text,
    is_turns,
    parse_messages,
    parse_transcript,
    turn_weight,
)
from tunesmith.errors import UsageError

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
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "label": ("label",),
    "weight": ("weight",),
    "history": ("history",),
    "input": ("input", "context"),
}
"""What a column can be, and the names by which it is recognised, in lower case; the first that a row has is taken."""
MAPPED = ("messages", "text", "system", "prompt", "completion", "chosen", "rejected", "label", "weight")
BECOMES = {
    "messages": "turns", "text": "text (a transcript: turns)",
    "system": "system turn", "prompt": "user turn", "completion": "assistant turn",
    "chosen": "better answer", "rejected": "worse answer", "label": "false: row left out", "weight": "0: row left out",
    "history": "turns before", "input": "added to the user turn",
}  # fmt: skip
TAKES_INPUT = ("instruction", "question", "query")  # the columns that a column `input` or `context` goes with
LONG_PROMPT = 4, 20  # words or characters from which on an answer that repeats the prompt is no chance
FALSE, TRUE = ("false", "0", "0.0", "no"), ("true", "1", "1.0", "yes")

HH_ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}

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


@dataclass
class Reader:
    """Rows to dialogues, texts and preferences, and what there is to say of all of them.

    mapped: `--data.columns`. honoured: columns that somebody else heeds, as `split`.
    echoes: whether answers in plain text repeat even a short prompt as a rule (see `repeats_prompts`).
    """

    mapped: Columns = ()
    honoured: tuple[str, ...] = ()
    echoes: bool = False
    forms: Counter[frozenset[str]] = field(default_factory=Counter)
    facts: Counter[str] = field(default_factory=Counter)
    seen: Seen = field(default_factory=Seen)

    def read(self, row: Any) -> Row:
        """What a row is, also where there is nothing to learn from. Raises: BadRow with the reason."""
        try:
            form = self._form(row)
            return self._pair(row, form) if "chosen" in form.columns else self._single(row, form)
        except RecursionError:
            raise BadRow("nested too deeply") from None

    def read_pair(self, row: Any) -> Preference:
        """A preference, checked. Raises: BadRow with the reason."""
        try:
            form = None if is_turns(row) else self._form(row)
        except BadRow:
            form = None
        if form is None or "chosen" not in form.columns:
            raise BadRow("no pair (columns chosen and rejected)")
        try:
            return self._pair(row, form).check()
        except RecursionError:
            raise BadRow("nested too deeply") from None

    def _form(self, row: Any) -> Form:
        if isinstance(row, list) and is_turns(row):
            self.forms[frozenset()] += 1
            return BARE
        if not isinstance(row, dict):
            raise BadRow("not an object with columns")
        columns = frozenset(key for key, value in row.items() if value is not None)
        form = recognise(columns, self.mapped)
        if form is None:
            raise BadRow(
                f"no known columns (found {', '.join(sorted(map(str, columns))) or 'none'}; expected {FORMATS})"
            )
        self.forms[columns] += 1
        return form

    # ---- the forms ---------------------------------------------------------------------------------------------

    def _pair(self, row: dict[str, Any], form: Form) -> Preference:
        if (column := form.columns.get("weight")) and turn_weight(row[column]) == 0:
            raise BadRow("weight 0: a row not to learn from")
        prompt, answers = self._prompt(row, form), [row[form.columns[name]] for name in ("chosen", "rejected")]
        texts = [self._repeated(prompt, answer) for answer in answers]
        if isinstance(prompt, str) and all(rest is not None for _, rest in texts) and any(s for s, _ in texts):
            self.facts["repeated"] += 1
            answers = [rest for _, rest in texts]
        joined = [self._join(prompt, answer) for answer in answers]
        self.facts["repeated"] += any(twice for _, twice in joined)
        chosen, rejected = (self._whole(row, form, turns) for turns, _ in joined)
        return Preference(chosen, rejected)

    def _single(self, row: Any, form: Form) -> Row:
        columns = form.columns
        if form is BARE:
            return parse_messages(row, self.seen)
        self._heed_marks(row, columns)
        if "messages" in columns:
            value = row[columns["messages"]]
            if isinstance(value, str) and (transcript := as_transcript(value)) is not None:
                return self._whole(row, form, self._taken_apart(transcript))
            return self._whole(row, form, list(parse_messages(value, self.seen).messages))
        if "text" in columns:
            return self._text(row[columns["text"]], row.get("role") is not None)
        prompt, answer = self._prompt(row, form), row[columns["completion"]]
        strong, rest = self._repeated(prompt, answer)
        if strong:
            answer = rest
        turns, twice = self._join(prompt, answer)
        self.facts["repeated"] += strong or twice
        return self._whole(row, form, turns)

    def _heed_marks(self, row: dict[str, Any], columns: Mapping[str, str]) -> None:
        """Raises: BadRow for a row that says of itself that it should not be learned."""
        if (column := columns.get("weight")) and turn_weight(row[column]) == 0:
            raise BadRow("weight 0: a row not to learn from")
        if column := columns.get("label"):
            label = str(row[column]).strip().lower()
            if label in FALSE:
                raise BadRow(f"{column} is false: an answer marked as bad is not learned")
            if label not in TRUE:
                self.facts[f"label {column}"] += 1

    def _prompt(self, row: dict[str, Any], form: Form) -> Any:
        """The prompt's column, with what `input` adds to it."""
        column, added = form.columns.get("prompt"), form.columns.get("input")
        prompt = row[column] if column else None
        more = row[added] if added else None
        return f"{prompt}\n\n{more}" if isinstance(prompt, str) and isinstance(more, str) and more.strip() else prompt

    def _whole(self, row: dict[str, Any], form: Form, turns: list[Message]) -> Dialogue:
        """The turns of a row after those of its columns `system` and `history`."""
        if column := form.columns.get("history"):
            turns = [*self._history(row[column]), *turns]
        if column := form.columns.get("system"):
            system = row[column]
            if not isinstance(system, str):
                raise BadRow(f"`{column}` is not text")
            first = turns[0] if turns else None
            if system.strip() and not (first and first.role == "system" and first.content.strip() == system.strip()):
                turns = [Message("system", check_text(system)), *turns]
        if any(m.weight != 1 for m in turns):
            self.facts["weight 0"] += sum(m.weight == 0 for m in turns)
        return Dialogue(tuple(turns))

    def _history(self, history: Any) -> list[Message]:
        """Turns before the prompt: a list of turns, or of [question, answer] pairs."""
        if not history:
            return []
        if is_turns(history):
            return list(parse_messages(history, self.seen).messages)
        pairs = history if isinstance(history, list | tuple) else [None]
        if not all(isinstance(p, list | tuple) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
            raise BadRow("`history` is neither a list of turns nor of [question, answer] pairs")
        return [Message(role, check_text(t)) for p in pairs for role, t in zip(("user", "assistant"), p, strict=True)]

    def _text(self, value: Any, has_role: bool) -> Row:
        if not isinstance(value, str):
            raise BadRow("`text` is not a string")
        if has_role:
            raise BadRow(
                "one turn a row (text and role): join the turns of each dialogue into `messages`, for OpenAssistant along parent_id"
            )
        transcript = as_transcript(value)
        if transcript is not None and (value.startswith("\n\nHuman:") or "\n\nAssistant:" in transcript[2:]):
            return Dialogue(tuple(self._taken_apart(transcript)))
        return Text(check_text(value))

    # ---- prompt and answer ---------------------------------------------------------------------------------------

    def _repeated(self, prompt: Any, answer: Any) -> tuple[bool, Any]:
        """Whether a plain answer surely repeats the plain prompt, and what follows it; (False, None) where it does not."""
        if not (isinstance(prompt, str) and isinstance(answer, str)) or as_transcript(answer) is not None:
            return False, None
        rest = after_prompt(prompt, answer)
        return rest is not None and (self.echoes or _is_long(prompt)), rest

    def _join(self, prompt: Any, answer: Any) -> tuple[list[Message], bool]:
        """Prompt and answer as turns, and whether the answer held the prompt, which then counts once."""
        if isinstance(prompt, str | None) and isinstance(answer, str) and not (is_turns(answer) or is_turns(prompt)):
            return self._join_texts(prompt, answer)
        before, after = self._turns(prompt, "user"), self._turns(answer, "assistant")
        while before and before[-1].role == "assistant" and not before[-1].content.strip():
            before.pop()  # a transcript's open end
        return _once(before, after)

    def _join_texts(self, prompt: str | None, answer: str) -> tuple[list[Message], bool]:
        asked, said = None if prompt is None else as_transcript(prompt), as_transcript(answer)
        if prompt is None:
            return self._taken_apart(answer if said is None else said), False
        if said is not None:
            after = self._taken_apart(said)
            before = self._taken_apart(asked) if asked is not None else [Message("user", prompt)]
            if before[-1].role == "assistant" and not before[-1].content.strip() and len(before) > 1:
                before.pop()
            turns, twice = _once(before, after)
            if twice or after[0].role == "assistant":
                return turns, twice
        if asked is not None:
            return self._taken_apart(asked + answer), False
        return [Message("user", check_text(prompt)), Message("assistant", check_text(answer))], False

    def _taken_apart(self, transcript: str) -> list[Message]:
        turns = list(parse_transcript(transcript).messages)
        self.seen.roles |= {HH_ROLES[turn.role]: turn.role for turn in turns}
        return turns

    def _turns(self, value: Any, role: str) -> list[Message]:
        if value is None:
            return []
        if not isinstance(value, str | list | dict):
            raise BadRow("prompt or answer is neither text nor a list of turns")
        if not isinstance(value, str) or is_turns(value):
            return list(parse_messages(value, self.seen).messages)
        transcript = as_transcript(value)
        if transcript is not None and role == "user":
            return self._taken_apart(transcript)
        return [Message(role, check_text(value))]

    # ---- words ---------------------------------------------------------------------------------------------------

    def form_lines(self) -> list[str]:
        """What was recognised: a line a form, the most frequent first, and one for the names of the roles."""
        rows: Counter[str] = Counter()
        lines: dict[str, Form] = {}
        for columns, n in self.forms.items():
            form = recognise(columns, self.mapped) or BARE
            lines.setdefault(form.line(0), form)
            rows[form.line(0)] += n
        told = [lines[key].line(n) for key, n in rows.most_common()]
        roles = [f"{name} -> {role}" for name, role in self.seen.roles.items()]
        return [*told, *([f"roles: {', '.join(roles)}"] if roles else [])]

    def notes(self) -> list[str]:
        """What a user should know: columns not used, texts that stood in two columns, answers not learned."""
        unused = {c for columns in self.forms if (f := recognise(columns, self.mapped)) for c in f.unused}
        lines = [f"not used: {', '.join(sorted(unused - set(self.honoured)))}"] if unused - set(self.honoured) else []
        if self.seen.unused:
            lines.append(f"not used in turns: {', '.join(self.seen.unused)}")
        if n := self.facts["repeated"]:
            lines.append(f"{n:,} {_rows(n)}: the answer begins with the prompt, which counts once")
        if n := self.facts["weight 0"]:
            lines.append(
                f"{n:,} {'turn has' if n == 1 else 'turns have'} weight 0: read, not learned (where every token carries loss, "
                "as with --data.loss_on all or windows, they are learned all the same)"
            )
        labels = [(fact[6:], n) for fact, n in self.facts.items() if fact.startswith("label ")]
        return lines + [
            f"not used: {column} of {n:,} {_rows(n)}, which is neither true nor false" for column, n in labels
        ]


BARE = Form({"messages": "list of turns"}, ())
"""A row that is a list of turns itself."""


def _rows(n: int) -> str:
    return "row" if n == 1 else "rows"


def _once(before: list[Message], after: list[Message]) -> tuple[list[Message], bool]:
    """Turns of the prompt and of the answer, one after the other; `after` alone where it holds the prompt too."""
    asked = [(m.role, m.content.strip()) for m in before if m.role != "system"]
    said = [(m.role, m.content.strip()) for m in after if m.role != "system"]
    holds = bool(asked) and (said[: len(asked)] == asked or (len(asked) == 1 and asked[0] in said[:-1]))
    if not holds or len(said) <= len(asked):
        return before + after, False
    systems = [m for m in before if m.role == "system"] if after[0].role != "system" else []
    return systems + after, True


def after_prompt(prompt: str, answer: str) -> str | None:
    """What follows in an answer that begins with the whole prompt and goes on with a new word; None for any other."""
    asked, said = prompt.strip(), answer.lstrip()
    rest = said[len(asked) :]
    if not asked or not said.startswith(asked) or not rest.strip() or (asked[-1].isalnum() and rest[0].isalnum()):
        return None
    return rest.lstrip()


def _is_long(prompt: str) -> bool:
    words, letters = LONG_PROMPT
    return len(prompt.split()) >= words or len(prompt.strip()) >= letters


def repeats_prompts(rows: Iterable[Any], mapped: Columns = ()) -> bool:
    """Whether most of these rows with prompt and answer as plain text have answers that begin with the prompt.

    By one row alone that cannot be told of a short prompt: `Hello!` is often answered `Hello! How are you?`.
    """
    repeated = [r for row in rows if (r := _repeats(row, mapped)) is not None]
    return sum(repeated) * 2 > len(repeated)


def _repeats(row: Any, mapped: Columns) -> bool | None:
    if not isinstance(row, dict):
        return None
    form = recognise(frozenset(k for k, v in row.items() if v is not None), mapped)
    if form is None or "prompt" not in form.columns:
        return None
    prompt, *answers = (
        row[form.columns[w]] for w in ("prompt", "chosen", "rejected", "completion") if w in form.columns
    )
    if not all(isinstance(text, str) for text in (prompt, *answers)):
        return None
    return all(after_prompt(prompt, answer) is not None for answer in answers)


# ---- one row -------------------------------------------------------------------------------------------------------


def parse_row(row: Any) -> Row:
    """A Dialogue, Text or Preference from a row in one of FORMATS, checked.

    Transcripts in the HH form are taken apart; any other prompt is one user turn and any other answer one assistant turn.
    Raises: BadRow with the reason.
    """
    return checked(read_row(row))


def read_row(row: Any) -> Row:
    """As `parse_row`, also where there is nothing to learn from: an empty answer, none at all, two prompts that differ."""
    return Reader(echoes=repeats_prompts([row])).read(row)


def parse_pair(row: Any) -> Preference:
    """A Preference from a row with chosen and rejected. Raises: BadRow with the reason."""
    return Reader(echoes=repeats_prompts([row])).read_pair(row)


def checked(row: Row) -> Row:
    """Itself, if there is something to learn from; of a preference in the chosen dialogue. Raises: BadRow."""
    (row.chosen if isinstance(row, Preference) else row).check()
    return row


def prompt_turns(row: Any, mapped: Columns = ()) -> list[Message]:
    """The conversation before the answer of a row of any form, of one with a prompt alone, or of a text. Raises: BadRow."""
    if isinstance(row, str):
        row = {"prompt": row}
    if isinstance(row, dict) and recognise(frozenset(k for k, v in row.items() if v is not None), mapped) is None:
        row = {**row, "completion": "\n\nAssistant: ?"}  # a prompt has no answer yet
    read = Reader(mapped).read(row)
    if isinstance(read, Text):
        raise BadRow("a text without roles")
    turns = list((read.chosen if isinstance(read, Preference) else read).messages)
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns:
        raise BadRow("no prompt in it")
    return turns
