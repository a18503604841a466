r"""Dialogues as text and as tokens: roles, the prompt form, the mask and the stop rule, in one place for all commands.

The form is that of HH-RLHF, byte for byte: `\n\nHuman: hello\n\nAssistant: hi`. A prompt ends in `\n\nAssistant:`
*without* a space, because the space belongs to the answer's first token; one trailing space would tokenise nearly
every prompt in a way that was never trained.

Tokens. A dialogue is cut into segments, context and answer in turn, and each segment is encoded by itself; the same
cut serves training, chat and scoring, so a prompt at inference has exactly the ids that it had in training.

Loss. The supervised tokens are exactly the assistant's answers, each with the end-of-text token as its last target.
The end-of-text token is only ever a *target*: the input stays in the published form, and yet every answer, also one in
the middle of a dialogue, teaches the model to stop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MARKERS = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:", "system": "\n\nSystem:"}
ROLE_NAMES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
STOP_TEXTS = (MARKERS["user"], MARKERS["assistant"], MARKERS["system"])
"""An answer ends at the end-of-text token or before any of these, whichever comes first."""

_TURN = re.compile(r"\n\n(Human|Assistant):")

# What a token teaches, as bits of one byte a token (see `encode_rows`)
NEXT = 1  # its target is the token after it, which belongs to an answer
END = 2  # its target is the end-of-text token: the answer is over


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Message:
    """One turn. `lead` stands between the marker's colon and the content: a space, but for a few odd HH rows."""

    role: str
    content: str
    lead: str = " "


@dataclass(frozen=True)
class Dialogue:
    """Turns in order."""

    messages: tuple[Message, ...]

    def check(self) -> Dialogue:
        """Itself, if there is something to learn from. Raises: BadRow with the reason otherwise."""
        answers = [m for m in self.messages if m.role == "assistant"]
        if not answers:
            raise BadRow("no assistant turn")
        if not answers[-1].content.strip():
            raise BadRow("empty answer")
        return self


@dataclass(frozen=True)
class Text:
    """Plain text without roles; every token of it carries loss."""

    text: str

    def check(self) -> Text:
        """Itself, if there is something to learn from. Raises: BadRow with the reason otherwise."""
        if not self.text.strip():
            raise BadRow("empty text")
        return self


@dataclass(frozen=True)
class Preference:
    """Two dialogues with the same prompt, the first preferred. The answer is the last turn; all before is the prompt."""

    chosen: Dialogue
    rejected: Dialogue

    def check(self) -> Preference:
        """Itself, if there is a preference to learn from. Raises: BadRow with the reason otherwise."""
        chosen, rejected = self.chosen.messages, self.rejected.messages
        for name, turns in (("chosen", chosen), ("rejected", rejected)):
            if not turns or turns[-1].role != "assistant":
                raise BadRow(f"{name} does not end with an answer")
            if not turns[-1].content.strip():
                raise BadRow(f"empty {name} answer")
        if chosen[:-1] != rejected[:-1]:
            raise BadRow("the prompts of chosen and rejected differ")
        if len(chosen) == 1:
            raise BadRow("no prompt before the answers")
        if chosen == rejected:
            raise BadRow("chosen and rejected are the same")
        return self


Row = Dialogue | Text | Preference


def check_text(text: str) -> str:
    """Itself, if it can be encoded. Raises: BadRow for half a surrogate pair, which only JSON's escapes can smuggle in."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("half a character (a lone surrogate)") from None
    return text


def parse_transcript(text: str) -> Dialogue:
    r"""A dialogue from the HH form. `render(parse_transcript(text).messages) == text` for every text it accepts.

    >>> [m.content for m in parse_transcript("\n\nHuman: hi\n\nAssistant: hello").messages]
    ['hi', 'hello']

    Raises: BadRow if the text does not begin with a role marker.
    """
    pieces = _TURN.split(check_text(text))
    if pieces[0] or len(pieces) == 1:
        raise BadRow("no role marker at the beginning")
    messages = []
    for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
        lead = " " if body.startswith(" ") else ""
        messages.append(Message("user" if name == "Human" else "assistant", body[len(lead) :], lead))
    return Dialogue(tuple(messages))


def parse_messages(messages: Any) -> Dialogue:
    """A dialogue from the ecosystem's `[{"role": ..., "content": ...}, ...]`. Raises: BadRow with the reason."""
    if not isinstance(messages, list | tuple) or not messages:
        raise BadRow("messages is not a list of turns")
    parsed = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadRow("a turn without text in `content`")
        role = ROLE_NAMES.get(str(message.get("role")).lower())
        if role is None:
            raise BadRow(f"unknown role {message.get('role')!r}")
        parsed.append(Message(role, check_text(message["content"])))
    return Dialogue(tuple(parsed))


def render(messages: Sequence[Message]) -> str:
    r"""The dialogue as text.

    >>> render([Message("user", "hi"), Message("assistant", "hello")])
    '\n\nHuman: hi\n\nAssistant: hello'
    """
    return "".join(MARKERS[m.role] + m.lead + m.content for m in messages)


def prose(row: Row) -> str:
    r"""What a base model is trained on: a text as it is, a dialogue (or the chosen one) without roles.

    >>> prose(Dialogue((Message("user", "hi"), Message("assistant", "hello"))))
    'hi\n\nhello'
    """
    dialogue = row.chosen if isinstance(row, Preference) else row
    return dialogue.text if isinstance(dialogue, Text) else "\n\n".join(m.content for m in dialogue.messages)


def segments(messages: Sequence[Message]) -> list[tuple[str, bool]]:
    r"""The dialogue as (text, is_answer) pieces that are encoded one by one; joined they are `render(messages)`.

    >>> segments([Message("user", "hi"), Message("assistant", "hello")])
    [('\n\nHuman: hi\n\nAssistant:', False), (' hello', True)]
    """
    pieces: list[tuple[str, bool]] = []
    context = ""
    for m in messages:
        if m.role == "assistant":
            pieces += [(context + MARKERS["assistant"], False), (m.lead + m.content, True)]
            context = ""
        else:
            context += MARKERS[m.role] + m.lead + m.content
    if context:
        pieces.append((context, False))
    return [piece for piece in pieces if piece[0]]


def prompt_segments(messages: Sequence[Message]) -> list[str]:
    r"""What a model reads before it answers; the last piece ends in `\n\nAssistant:`.

    >>> prompt_segments([Message("user", "hi")])
    ['\n\nHuman: hi\n\nAssistant:']
    """
    return [text for text, _ in segments([*messages, Message("assistant", "", "")])]


def cut_at_stop(answer: str) -> tuple[str, bool]:
    """The answer up to the first role marker, and whether there was one."""
    found = [at for at in (answer.find(stop) for stop in STOP_TEXTS) if at >= 0]
    return (answer[: min(found)], True) if found else (answer, False)
