"""Rows of every form to what they are: a dialogue, a text or a preference; and what there is to say of a whole set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.columns import BARE, FORMATS, Columns, Form, absent, recognise
from tunesmith.data.dialogue import (
    BadRow,
    Dialogue,
    Message,
    Preference,
    Row,
    Seen,
    Text,
    check_text,
    is_turns,
    parse_messages,
    turn_weight,
)
from tunesmith.data.hh_template import HH, HH_ROLES, as_transcript, dialogue_in, parse_transcript

LONG_PROMPT = 6, 40  # words or characters from which on an answer that repeats the prompt is no chance
FALSE, TRUE = ("false", "0", "0.0", "no"), ("true", "1", "1.0", "yes")


@dataclass
class Reader:
    """Rows to dialogues, texts and preferences, and what there is to say of all of them.

    mapped: `--data.columns`. honoured: columns that are used elsewhere, as `split`.
    echoes: whether answers in plain text repeat even a short prompt as a rule (see `repeats_prompts`).
    """

    mapped: Columns = ()
    honoured: tuple[str, ...] = ()
    echoes: bool = False
    forms: dict[tuple[str, ...], Form] = field(default_factory=dict)
    rows: Counter[tuple[str, ...]] = field(default_factory=Counter)
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
        if not isinstance(row, dict):
            if not isinstance(row, list) or not is_turns(row):
                raise BadRow("not an object with columns")
            self.forms[()] = BARE
            self.rows[()] += 1
            return BARE
        columns = tuple([key for key, value in row.items() if value is not None])
        form = self.forms.get(columns) or recognise(frozenset(columns), self.mapped)
        if form is None:
            found = ", ".join(sorted(map(str, columns))) or "none"
            if missing := absent(self.mapped, columns):
                asked, near = missing[0]
                raise BadRow(f"no known columns (found {found}; --data.columns {asked} names none of them{near})")
            raise BadRow(f"no known columns (found {found}; expected {FORMATS})")
        self.forms[columns] = form
        self.rows[columns] += 1
        return form

    # ---- the forms ---------------------------------------------------------------------------------------------

    def _pair(self, row: dict[str, Any], form: Form) -> Preference:
        if (column := form.columns.get("weight")) and turn_weight(row[column]) == 0:
            raise BadRow("weight 0: not to be learned")
        prompt, answers = self._prompt(row, form), [row[form.columns[name]] for name in ("chosen", "rejected")]
        if len(form.columns) == 2:
            return Preference(self._alone(answers[0]), self._alone(answers[1]))
        (chosen, once), (rejected, again) = (self._join(prompt, answer) for answer in answers)
        if once or again:
            self.facts["repeated"] += 1
        return Preference(self._whole(row, form, chosen), self._whole(row, form, rejected))

    def _single(self, row: Any, form: Form) -> Row:
        columns = form.columns
        if form is BARE:
            return parse_messages(row, self.seen)
        self._heed_marks(row, columns)
        if "messages" in columns:
            value = row[columns["messages"]]
            is_transcript = isinstance(value, str) and as_transcript(value) is not None
            found = self._alone(value) if is_transcript else parse_messages(value, self.seen)
            return found if len(columns) == 1 else self._whole(row, form, list(found.messages))
        if "text" in columns:
            return self._text(row[columns["text"]], row.get("role") is not None)
        turns, twice = self._join(self._prompt(row, form), row[columns["completion"]])
        if twice:
            self.facts["repeated"] += 1
        return self._whole(row, form, turns)

    def _heed_marks(self, row: dict[str, Any], columns: Mapping[str, str]) -> None:
        """Raises: BadRow for a row that says of itself that it should not be learned."""
        if (column := columns.get("weight")) and turn_weight(row[column]) == 0:
            raise BadRow("weight 0: not to be learned")
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
        return Dialogue(tuple(turns))

    def _history(self, history: Any) -> list[Message]:
        """Turns before the prompt: a list of turns, or of [question, answer] pairs."""
        if not history:
            return []
        if is_turns(history):
            return list(parse_messages(history, self.seen).messages)
        if not isinstance(history, list | tuple) or not all(map(_is_exchange, history)):
            raise BadRow("`history` is neither a list of turns nor of [question, answer] pairs")
        return [Message(role, check_text(t)) for p in history for role, t in zip(("user", "assistant"), p, strict=True)]

    def _text(self, value: Any, has_role: bool) -> Row:
        if not isinstance(value, str):
            raise BadRow("`text` is not a string")
        if has_role:
            raise BadRow(
                "one turn per row (text and role): join the turns of each dialogue into `messages`, following parent_id for OpenAssistant"
            )
        transcript = dialogue_in(value)
        if transcript is not None:
            self.facts["transcripts"] += 1
            return self._taken_apart(transcript)
        return Text(check_text(value))

    # ---- prompt and answer ---------------------------------------------------------------------------------------

    def _alone(self, value: Any) -> Dialogue:
        """The dialogue of a column that holds a whole one, as a list of turns or a transcript."""
        if not isinstance(value, str) or is_turns(value):
            if not isinstance(value, str | list | dict):
                raise BadRow("prompt or answer is neither text nor a list of turns")
            return parse_messages(value, self.seen)
        transcript = as_transcript(value)
        return self._taken_apart(value if transcript is None else transcript)

    def _join(self, prompt: Any, answer: Any) -> tuple[list[Message], bool]:
        """Prompt and answer as turns, and whether the answer held the prompt, which then counts once."""
        if (
            isinstance(answer, str)
            and (prompt is None or isinstance(prompt, str))
            and not (is_turns(answer) or is_turns(prompt))
        ):
            return self._join_texts(prompt, answer)
        before, after = self._turns(prompt, "user"), self._turns(answer, "assistant")
        while before and before[-1].role == "assistant" and not before[-1].content.strip():
            before.pop()  # a transcript's open end
        return _once(before, after)

    def _join_texts(self, prompt: str | None, answer: str) -> tuple[list[Message], bool]:
        asked, said = None if prompt is None else as_transcript(prompt), as_transcript(answer)
        if prompt is None:
            return list(self._alone(answer).messages), False
        if said is not None:
            after = list(self._taken_apart(said).messages)
            before = list(self._taken_apart(asked).messages) if asked is not None else [Message("user", prompt)]
            if before[-1].role == "assistant" and not before[-1].content.strip() and len(before) > 1:
                before.pop()
            turns, twice = _once(before, after)
            if twice or after[0].role == "assistant":
                return turns, twice
        if asked is not None:
            return list(self._taken_apart(asked + answer).messages), False
        rest = after_prompt(prompt, answer) if self.echoes or _is_long(prompt) else None
        turns = [
            Message("user", check_text(prompt)),
            Message("assistant", check_text(answer if rest is None else rest)),
        ]
        return turns, rest is not None

    def _taken_apart(self, transcript: str) -> Dialogue:
        dialogue = parse_transcript(transcript)
        if HH_ROLES["user"] not in self.seen.roles or dialogue.messages[0].role == "system":
            self.seen.roles |= {HH_ROLES[turn.role]: turn.role for turn in dialogue.messages}
        return dialogue

    def _turns(self, value: Any, role: str) -> list[Message]:
        if value is None:
            return []
        if not isinstance(value, str | list | dict):
            raise BadRow("prompt or answer is neither text nor a list of turns")
        if not isinstance(value, str) or is_turns(value):
            return list(parse_messages(value, self.seen).messages)
        transcript = as_transcript(value)
        if transcript is not None and role == "user":
            return list(self._taken_apart(transcript).messages)
        return [Message(role, check_text(value))]

    # ---- words ---------------------------------------------------------------------------------------------------

    def form_lines(self) -> list[str]:
        """What was recognised: a line a form, the most frequent first, and one for the names of the roles."""
        rows: Counter[str] = Counter()
        lines: dict[str, Form] = {}
        for columns, n in self.rows.items():
            form = self.forms[columns]
            lines.setdefault(form.line(0), form)
            rows[form.line(0)] += n
        told = [lines[key].line(n) for key, n in rows.most_common()]
        if n := self.facts["transcripts"]:
            told.append(f"{n:,} {'text is a transcript' if n == 1 else 'texts are transcripts'}, split into turns")
        roles = [f"{name} -> {role}" for name, role in self.seen.roles.items()]
        return [*told, *([f"roles: {', '.join(roles)}"] if roles else [])]

    def notes(self) -> list[str]:
        """What a user should know: columns not used, texts that stood in two columns, answers not learned."""
        unused = {column for form in self.forms.values() for column in form.unused}
        lines = [f"not used: {', '.join(sorted(unused - set(self.honoured)))}"] if unused - set(self.honoured) else []
        lines += [
            f"--data.columns {asked}: no row has such a column{near}"
            for asked, near in absent(self.mapped, {column for columns in self.forms for column in columns})
        ]
        if self.seen.unused:
            lines.append(f"not used in turns: {', '.join(self.seen.unused)}")
        if n := self.facts["repeated"]:
            lines.append(f"{n:,} {_rows(n)}: the answer begins with the prompt, which is used only once")
        if n := self.seen.of_weight_0:
            lines.append(
                f"{n:,} {'turn has' if n == 1 else 'turns have'} weight 0: read, not learned (except where every token carries loss, "
                "as with --data.loss_on all or windows)"
            )
        labels = [(fact[6:], n) for fact, n in self.facts.items() if fact.startswith("label ")]
        return lines + [
            f"not used: {column} in {n:,} {_rows(n)}, where it is neither true nor false" for column, n in labels
        ]


def _is_exchange(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


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
    if not asked or not said.startswith(asked):
        return None
    rest = said[len(asked) :]
    if not rest.strip() or (asked[-1].isalnum() and rest[0].isalnum()):
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
    return len(repeated) > 1 and sum(repeated) * 2 > len(repeated)


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


def checked(row: Row, *, as_text: bool = False) -> Row:
    """Itself, if there is something to learn from; of a preference in the chosen dialogue. Raises: BadRow.

    as_text: where every token is learned, as with windows; an empty last answer is then no reason to leave the row out.
    """
    read = row.chosen if isinstance(row, Preference) else row
    if isinstance(read, Text):
        read.check()
    else:
        read.check(as_text=as_text)
    return row


def prompt_turns(row: Any, mapped: Columns = ()) -> list[Message]:
    """The conversation before the answer of a row of any form, of one with a prompt alone, or of a text. Raises: BadRow."""
    if isinstance(row, str):
        row = {"prompt": row}
    if isinstance(row, dict) and recognise(frozenset(k for k, v in row.items() if v is not None), mapped) is None:
        row = {**row, "completion": HH.text([Message("assistant", "?")])}  # a prompt has no answer yet
    read = Reader(mapped).read(row)
    if isinstance(read, Text):
        raise BadRow("a text without roles")
    turns = list((read.chosen if isinstance(read, Preference) else read).messages)
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns:
        raise BadRow("it contains no prompt")
    return turns
