"""What can be wrong with the text of one row: nothing to learn from, or a border that the tokenizer sees differently.

Borders matter because a token may hold the white space before a word. In the HH form the space before an answer belongs to
its first token: a space at the end of a prompt, none before an answer, or two, make tokens that the model never meets when it
answers. A template that strips its turns has no such borders, so the template is asked: white space that changes nothing
of what it writes is no defect.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.dialogue import BadRow, Dialogue, Message, Preference, Row, Text
from tunesmith.data.hh_template import marker_inside
from tunesmith.data.template import Template

PAIRS, DIALOGUES, TEXTS = FORMS = ("pairs", "dialogues", "texts")


@dataclass(frozen=True)
class Check:
    """A defect: what it is called, the forms of a row in which it can occur, and the way out."""

    label: str
    forms: tuple[str, ...]
    remedy: str


TURNS, ALL, PAIR = (PAIRS, DIALOGUES), FORMS, (PAIRS,)
SKIPPED = "such rows are skipped in training: complete or delete them"
CHECKS = {
    "empty_text": Check("empty text", (TEXTS,), SKIPPED),
    "empty_answer": Check("empty answer", (DIALOGUES,), SKIPPED),
    "empty_chosen": Check("empty chosen answer", PAIR, SKIPPED),
    "empty_rejected": Check("empty rejected answer", PAIR, SKIPPED),
    "no_final_answer": Check(
        "no answer at the end", TURNS, "the last turn is not learned, a pair is skipped: end it with an answer"
    ),
    "no_prompt": Check("no prompt before the answers", PAIR, SKIPPED),
    "prompts_differ": Check(
        "the two prompts differ",
        PAIR,
        "there is nothing to compare, so it is skipped: make the prompts equal or delete it",
    ),
    "same_answers": Check(
        "chosen equals rejected", PAIR, "there is no preference to learn, so it is skipped: delete the row"
    ),
    "duplicate": Check(
        "duplicate of an earlier row", ALL, "it is learned twice, and may be held out as well as trained on: keep one"
    ),
    "contradiction": Check(
        "an earlier pair with the answers swapped", PAIR, "the two cancel out: keep one and delete the other"
    ),
    "empty_turn": Check(
        "empty turn before the last",
        TURNS,
        "an empty answer teaches the model to stop at once: fill the turn in or delete it",
    ),
    "repeated_role": Check(
        "same role twice in a row", TURNS, "chat templates expect turns to alternate: is one missing, or duplicated?"
    ),
    "role_marker": Check(
        "role marker within the text", ALL, "the model learns to write both sides: split it into turns or delete it"
    ),
    "template_text": Check(
        "another template's markers",
        ALL,
        "here they are plain text, not special tokens: delete them, turn ends are added automatically",
    ),
    "prompt_space": Check(
        "prompt ends in white space",
        TURNS,
        "it yields tokens that training never shows in that place: strip the prompt",
    ),
    "turn_start": Check(
        "odd white space before a turn",
        TURNS,
        "its first token differs from other turns': put one space after a transcript's role marker, none at the start of `content` or "
        "`completion`",
    ),
    "answer_end": Check(
        "answer ends in white space", TURNS, "the model learns to write it before it stops: strip the answer"
    ),
    "not_learned": Check(
        "answer that the template does not let be learned",
        (DIALOGUES,),
        "it is read without loss: the template writes it, or what stands before it, differently once later turns follow. Make rows that "
        "end with that answer, or choose another template (--chat.template)",
    ),
}
REFUSED = "such rows are skipped in training: change them, or choose another template (--chat.template)"
UNREADABLE = "they are skipped: repair or delete them; docs/data.md lists the row formats"

_TEMPLATE = re.compile(r"<\|[a-z_]+\|>|\A<s>|</s>\s*\Z|\[/?INST\]|<(?:start|end)_of_turn>")


def form_of(row: Row) -> str:
    """Which of FORMS a row has."""
    return PAIRS if isinstance(row, Preference) else TEXTS if isinstance(row, Text) else DIALOGUES


def prompt_of(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """What stands before the answer at the end; everything where the last turn is not an answer."""
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def refused(row: Row, template: Template) -> str:
    """Why a template does not take a row, or nothing of it can be learned; "" if it can."""
    if isinstance(row, Text):
        return ""
    try:
        if isinstance(row, Preference):
            for dialogue in (row.chosen, row.rejected):
                template.answered(dialogue.messages)
            return ""
        if any(s.loss for s in template.segments(row.messages, False)):
            return ""
        return template.refusal(row.messages) or "no token of it carries loss"
    except BadRow as reason:
        return str(reason)


def _partly_learned(dialogue: Dialogue, template: Template) -> bool:
    """Whether some answers are learned, but not all that have weight and words."""
    wanted = sum(m.role == "assistant" and m.weight != 0 and bool(m.content.strip()) for m in dialogue.messages)
    try:
        return 0 < template.ends_learned(template.segments(dialogue.messages, False)) < wanted
    except BadRow:
        return False


def row_defects(raw: dict[str, Any], row: Row, template: Template) -> set[str]:
    """The CHECKS that a row fails, by its text alone.

    raw: its columns; row: what `datasets.read_row` makes of them; template: the form in which a model would read it.
    """
    if isinstance(row, Text):
        return _text_defects([row.text], template) | ({"empty_text"} if not row.text.strip() else set())
    prompt = raw.get("prompt")
    ends_in_space = isinstance(prompt, str) and prompt != prompt.rstrip()
    defects = {"prompt_space"} if ends_in_space and _writes_leads(template) else set()
    if not isinstance(row, Preference):
        partly = {"not_learned"} if _partly_learned(row, template) else set()
        return defects | partly | _turn_defects(row.messages, "empty_answer", template)
    chosen, rejected = row.chosen.messages, row.rejected.messages
    defects |= _turn_defects(chosen, "empty_chosen", template) | _turn_defects(rejected, "empty_rejected", template)
    if prompt_of(chosen) != prompt_of(rejected):
        defects.add("prompts_differ")
    elif not prompt_of(chosen):
        defects.add("no_prompt")
    return defects | ({"same_answers"} if chosen == rejected else set())


def _turn_defects(turns: tuple[Message, ...], empty: str, template: Template) -> set[str]:
    defects = _text_defects((m.content for m in turns), template) | _space_defects(turns, template)
    *before, last = turns
    if last.role != "assistant":
        defects.add("no_final_answer")
    elif not last.content.strip():
        defects.add(empty)
    if not all(m.content.strip() for m in before):
        defects.add("empty_turn")
    if any(a.role == b.role for a, b in zip(before, turns[1:], strict=True)):
        defects.add("repeated_role")
    return defects


def _space_defects(turns: tuple[Message, ...], template: Template) -> set[str]:
    """White space at the borders of turns, where the template writes it."""
    defects = set()
    for i, m in enumerate(turns):
        if not m.content.strip():
            continue
        usual = Message(m.role, m.content.lstrip(), weight=m.weight)
        if (m.content, m.lead) != (usual.content, usual.lead) and _differ(turns, i, usual, template):
            defects.add("turn_start")
        stripped = dataclasses.replace(m, content=m.content.rstrip())
        if m.content != stripped.content and _differ(turns, i, stripped, template):
            defects.add("answer_end" if m.role == "assistant" else "prompt_space")
    return defects


def _differ(turns: Sequence[Message], number: int, other: Message, template: Template) -> bool:
    """Whether the dialogue reads differently with another turn in a place. False for one that the template does not take."""
    try:
        return template.text(turns) != template.text([*turns[:number], other, *turns[number + 1 :]])
    except BadRow:
        return False


def _writes_leads(template: Template) -> bool:
    """Whether what stood between a transcript's marker and its text stands there in this form too."""
    return _differ([Message("user", "a")], 0, Message("user", "a", lead=""), template)


def _text_defects(texts: Iterable[str], template: Template) -> set[str]:
    defects = set()
    for text in texts:
        own = template.border_inside(text)
        if own:
            defects.add("role_marker")
        # a transcript's markers, with which many rows come, are plain text in any other form
        foreign = marker_inside(text) and not own
        if "<" in text or "[" in text:
            foreign |= any(not template.border_inside(mark[0]) for mark in _TEMPLATE.finditer(text))
        if foreign:
            defects.add("template_text")
    return defects
