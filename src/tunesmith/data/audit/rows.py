"""What can be wrong with the text of one row: nothing to learn from, or a border that the tokenizer sees differently.

Borders matter because in the HH form the space before an answer belongs to its first token. A space at the end of a prompt,
none before an answer, or two, make tokens that the model never meets when it answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tunesmith.data.dialogue import Message, Preference, Row, Text
from tunesmith.data.hh_template import HH_ROLES, marker_inside
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
        "turn without one space before it",
        TURNS,
        f"its first token differs from other turns': put one space after the marker `{HH_ROLES['assistant']}:`, none at the start "
        "of `content` or `completion`",
    ),
    "answer_end": Check(
        "answer ends in white space", TURNS, "the model learns to write it before it stops: strip the answer"
    ),
}
UNREADABLE = "they are skipped: repair or delete them; docs/data.md lists the row formats"

_TEMPLATE = re.compile(r"<\|[a-z_]+\|>|\A<s>|</s>\s*\Z|\[/?INST\]|<(?:start|end)_of_turn>")


def form_of(row: Row) -> str:
    """Which of FORMS a row has."""
    return PAIRS if isinstance(row, Preference) else TEXTS if isinstance(row, Text) else DIALOGUES


def prompt_of(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """What stands before the answer at the end; everything where the last turn is not an answer."""
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def row_defects(raw: dict[str, Any], row: Row, template: Template) -> set[str]:
    """The CHECKS that a row fails, by its text alone.

    raw: its columns; row: what `datasets.read_row` makes of them; template: the form in which a model would read it.
    """
    if isinstance(row, Text):
        return _text_defects([row.text], template) | ({"empty_text"} if not row.text.strip() else set())
    prompt = raw.get("prompt")
    defects = {"prompt_space"} if isinstance(prompt, str) and prompt != prompt.rstrip() else set()
    if not isinstance(row, Preference):
        return defects | _turn_defects(row.messages, "empty_answer", template)
    chosen, rejected = row.chosen.messages, row.rejected.messages
    defects |= _turn_defects(chosen, "empty_chosen", template) | _turn_defects(rejected, "empty_rejected", template)
    if prompt_of(chosen) != prompt_of(rejected):
        defects.add("prompts_differ")
    elif not prompt_of(chosen):
        defects.add("no_prompt")
    return defects | ({"same_answers"} if chosen == rejected else set())


def _turn_defects(turns: tuple[Message, ...], empty: str, template: Template) -> set[str]:
    defects = _text_defects((m.content for m in turns), template)
    *before, last = turns
    if last.role != "assistant":
        defects.add("no_final_answer")
    elif not last.content.strip():
        defects.add(empty)
    if not all(m.content.strip() for m in before):
        defects.add("empty_turn")
    if any(a.role == b.role for a, b in zip(before, turns[1:], strict=True)):
        defects.add("repeated_role")
    for m in turns:
        if not m.content.strip():
            continue
        if m.content[0].isspace() or (template.lead and m.lead != template.lead):
            defects.add("turn_start")
        if m.content[-1].isspace():
            defects.add("answer_end" if m.role == "assistant" else "prompt_space")
    return defects


def _text_defects(texts: Iterable[str], template: Template) -> set[str]:
    defects = set()
    for text in texts:
        # A transcript's markers, with which most rows come, and those of the model's own form.
        if marker_inside(text) or any(stop in text for stop in template.stop_texts):
            defects.add("role_marker")
        if ("<" in text or "[" in text) and _TEMPLATE.search(text):
            defects.add("template_text")
    return defects
