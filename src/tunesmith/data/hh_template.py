r"""The HH form, that of HH-RLHF byte for byte: `\n\nHuman: hello\n\nAssistant: hi`. Our models' template, and a form of data.

A prompt ends in `\n\nAssistant:` *without* a space, because the space belongs to the answer's first token; one trailing
space would tokenise nearly every prompt in a way that was never trained.

The end of text is only ever a *target*: the input stays in the published form, and yet every answer, also one in the
middle of a dialogue, teaches the model to stop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tunesmith.data.dialogue import ROLE_NAMES, BadRow, Dialogue, Message, check_text
from tunesmith.data.template import Segment, Template

HH_ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}
MARKERS = {role: f"\n\n{name}:" for role, name in HH_ROLES.items()}

_ROLE_OF_NAME = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_OPENING = re.compile(r"\s*(?:Human|Assistant|System):")
_ONE_BREAK = re.compile(r"\n(?=(?:Human|Assistant):)")
_OPEN_END = re.compile(r"\n\nAssistant:\s*(?:\Z|\n\nHuman:)")
_LEAK = re.compile(rf"^\s*({'|'.join(ROLE_NAMES)})\s*:", re.IGNORECASE | re.MULTILINE)
_LEFT_INSIDE = re.compile(r"(?:^|\n)[ \t]*(?:Human|Assistant):|\n\nSystem:|\bAssistant:\s*\Z")


# ---- the template ----------------------------------------------------------------------------------------------------


def _segments(messages: Sequence[Message], answer_follows: bool) -> list[Segment]:
    """Context and answer in turn. All context between two answers is one segment: its turns are encoded in one go."""
    pieces: list[Segment] = []
    context = ""
    for m in messages:
        if m.role == "assistant":
            learned = m.weight != 0
            pieces += [Segment(context + MARKERS["assistant"]), Segment(m.lead + m.content, learned, closes=learned)]
            context = ""
        else:
            context += MARKERS[m.role] + m.lead + m.content
    if answer_follows:
        context += MARKERS["assistant"]
    if context:
        pieces.append(Segment(context))
    return [piece for piece in pieces if piece.text]


def _jinja() -> str:
    """Every role's marker, a space, its content; roles are those that `dialogue.parse_messages` knows."""
    named: dict[str, list[str]] = {}
    for name, role in ROLE_NAMES.items():
        named.setdefault(role, []).append(name)
    branches = "".join(
        f"{{%- {'if' if i == 0 else 'elif'} role in {names!r} -%}}{{{{- {MARKERS[role]!r} -}}}}"  # Jinja's strings know \n
        for i, (role, names) in enumerate(named.items())
    )
    return (
        "{%- for message in messages -%}{%- set role = message['role'] | lower -%}"
        + branches
        + "{%- else -%}{{- raise_exception('unknown role ' + message['role']) -}}{%- endif -%}"
        + "{{- ' ' + message['content'] -}}{%- endfor -%}"
        + f"{{%- if add_generation_prompt -%}}{{{{- {MARKERS['assistant']!r} -}}}}{{%- endif -%}}"
    )


def marker_inside(content: str) -> bool:
    """Whether a turn's text holds what looks like the marker of another turn, which was not split off."""
    # plain `in` first: most texts have none of these, and it is far cheaper than a search
    likely = "Human:" in content or "Assistant:" in content or "System:" in content
    return likely and _LEFT_INSIDE.search(content) is not None


HH = Template(
    name="hh",
    segments=_segments,
    jinja=_jinja(),
    stop_texts=(MARKERS["user"], MARKERS["assistant"], MARKERS["system"]),
    lead=" ",
    opens=True,
    borders=marker_inside,
    leak=lambda answer: _LEAK.search(answer) is not None,
)


# ---- the form of data ------------------------------------------------------------------------------------------------


def as_transcript(text: str) -> str | None:
    r"""A transcript in the HH form, byte for byte if it has it already; None for any other text.

    Read as one too: no blank lines before the first marker, Windows' line ends, a system turn first, and single line breaks
    between all turns.

    >>> as_transcript("Human: hi\r\n\r\nAssistant: hello")
    '\n\nHuman: hi\n\nAssistant: hello'
    """
    whole = text.startswith(("\n\nHuman:", "\n\nAssistant:"))
    if whole and ("\r" not in text or ("\r\n\r\nAssistant:" not in text and "\r\n\r\nHuman:" not in text)):
        return text
    if not whole and not _OPENING.match(text):
        return None
    text = "\n\n" + text.replace("\r\n", "\n").lstrip()
    markers = len(_TURN.findall(text))
    if text.startswith("\n\nSystem:"):
        return text if markers else None
    return text if markers > 1 else text[:1] + _ONE_BREAK.sub("\n\n", text[1:])[1:]


def dialogue_in(text: str) -> str | None:
    """As `as_transcript`, but None for a text that only begins like one: prose with a line `System: ...`, or one turn."""
    transcript = as_transcript(text)
    if transcript is None or text.startswith(MARKERS["user"]) or MARKERS["assistant"] in transcript[2:]:
        return transcript
    return None


def parse_transcript(text: str) -> Dialogue:
    r"""A dialogue from the HH form. `HH.text(parse_transcript(text).messages) == text` for every text it accepts.

    >>> [m.content for m in parse_transcript("\n\nHuman: hi\n\nAssistant: hello").messages]
    ['hi', 'hello']

    Raises: BadRow if the text does not begin with a role marker.
    """
    pieces = _TURN.split(check_text(text))
    opening = pieces[0].removeprefix(MARKERS["system"])
    if (pieces[0] and opening == pieces[0]) or len(pieces) == 1:
        raise BadRow("no role marker at the beginning")
    messages = [_after_marker("system", opening)] if pieces[0] else []
    for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
        messages.append(_after_marker(_ROLE_OF_NAME[name], body))
    return Dialogue(tuple(messages))


def _after_marker(role: str, body: str) -> Message:
    return Message(role, body[1:]) if body[:1] == " " else Message(role, body, "")


def asks_for_answers(transcript: str) -> bool:
    """Whether an answer of a transcript is left open, as in a file of prompts: nothing stands behind its marker."""
    return _OPEN_END.search(transcript) is not None
