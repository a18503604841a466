"""Dialogues, texts and preferences as rows hold them, and the lists of turns that they are read from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tunesmith.jsontext import parse_json

ROLE_NAMES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
RARE_ROLES = {
    "developer": "system",
    "chatgpt": "assistant",
}  # read, but at the start of a line they are words as any other
TOOL_ROLES = (
    "tool",
    "function",
    "tool_call",
    "tool_response",
    "tool_result",
    "function_call",
    "observation",
    "ipython",
)
NO_TOOLS = "tool calls are not supported; remove them, or write their content into the neighbouring turns"


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Message:
    """One turn.

    lead: what stood between a transcript's marker and the content: a space, but for a few odd rows of HH-RLHF.
    weight: of the loss on an answer: 1, or 0 for an answer that is read but not learned.
    """

    role: str
    content: str
    lead: str = " "
    weight: float = 1


@dataclass(frozen=True)
class Dialogue:
    """Turns in order."""

    messages: tuple[Message, ...]

    def check(self, *, as_text: bool = False) -> Dialogue:
        """Itself, if there is something to learn from. Raises: BadRow with the reason otherwise.

        as_text: every token is learned, so that the last answer may be empty.
        """
        answers = [m for m in self.messages if m.role == "assistant"]
        if not answers:
            raise BadRow("no assistant turn")
        if not as_text and not answers[-1].content.strip():
            raise BadRow("empty answer")
        if not any(m.weight for m in answers):
            raise BadRow("every answer has weight 0: nothing to learn")
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
            if turns[-1].weight != 1:
                raise BadRow(f"the {name} answer has weight {turns[-1].weight:g}: preferences cannot be weighted")
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


# ---- lists of turns ------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the turns of many rows had: each role's name and what it became, keys not used, and answers of weight 0."""

    roles: dict[str, str] = field(default_factory=dict)
    of_weight_0: int = 0
    unused: dict[str, None] = field(default_factory=dict)


_TURN_KEYS = {"role", "from", "content", "value", "weight", "tool_calls", "function_call"}


def parse_messages(messages: Any, seen: Seen | None = None) -> Dialogue:
    """A dialogue from the ecosystem's `[{"role": ..., "content": ...}, ...]`, or ShareGPT's `from` and `value`.

    The list may also be JSON text, a single turn, or an object of two lists (as `datasets` stores a sequence).
    seen: where to write down what the turns had. Raises: BadRow with the reason.
    """
    turns = messages if isinstance(messages, list) else _as_list(messages)
    if not isinstance(turns, list | tuple) or not turns:
        if isinstance(turns, str) and turns.lstrip().startswith(("[{'", "{'")):
            raise BadRow("turns in Python notation, not JSON: save them with json.dumps, or as JSON lines")
        raise BadRow("messages is not a list of turns")
    return Dialogue(tuple(_message(turn, seen) for turn in turns))


def is_turn(value: Any) -> bool:
    """Whether this is one turn of a dialogue: an object that says who and what."""
    return isinstance(value, dict) and ("role" in value or "from" in value) and ("content" in value or "value" in value)


def is_turns(value: Any) -> bool:
    """Whether this is a dialogue: a list of turns, one turn, an object of lists, or any of these as JSON text."""
    if isinstance(value, str) and not _may_be_json(value):
        return False
    found = _as_list(value)
    return isinstance(found, list | tuple) and bool(found) and all(map(is_turn, found))


def _may_be_json(text: str) -> bool:
    return text[:64].lstrip()[:1] in ("[", "{")


def _as_list(value: Any) -> Any:
    if isinstance(value, str) and _may_be_json(value):
        try:
            value = parse_json(value)
        except ValueError:
            return value
    if not isinstance(value, dict):
        return value
    if not is_turn(value):
        return value.get("messages", value)
    columns = list(value.values())
    if not all(isinstance(column, list) for column in columns):
        return [value]
    if len({len(column) for column in columns}) > 1:
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]


def _message(turn: Any, seen: Seen | None) -> Message:
    if not isinstance(turn, dict):
        raise BadRow("a turn without text in `content`")
    name = turn.get("role") or turn.get("from")
    role = ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role is None:
        role = _role(name)
    content = turn.get("content")
    if content is None:
        content = turn.get("value")
    if len(turn) > 2 and (turn.get("tool_calls") or turn.get("function_call")):
        raise BadRow(f"a turn with tool calls: {NO_TOOLS}")
    if not isinstance(content, str):
        content = _text_of_parts(content)
    if seen is not None and name not in seen.roles:
        seen.roles[str(name).strip()] = role
    if len(turn) == 2:
        return Message(role, check_text(content))
    if seen is not None:
        seen.unused |= dict.fromkeys(k for k, v in turn.items() if v is not None and k not in _TURN_KEYS)
    weight = turn.get("weight") if role == "assistant" else None
    found = Message(role, check_text(content), weight=1 if weight is None else turn_weight(weight))
    if seen is not None and not found.weight:
        seen.of_weight_0 += 1
    return found


def _role(name: Any) -> str:
    plain = name.strip().lower() if isinstance(name, str) else ""
    if plain in TOOL_ROLES:
        raise BadRow(f"unknown role {name!r}: {NO_TOOLS}")
    if plain in RARE_ROLES:
        return RARE_ROLES[plain]
    if plain not in ROLE_NAMES:
        raise BadRow(f"unknown role {str(name)[:40]!r}" if name is not None else "unknown role None")
    return ROLE_NAMES[plain]


def _text_of_parts(content: Any) -> str:
    """The text of `[{"type": "text", "text": ...}, ...]`. Raises: BadRow for anything else, a picture for example."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        raise BadRow("a turn without text in `content`")
    for part in content:
        if not isinstance(part.get("text"), str):
            raise BadRow(f"a turn with a part of type {str(part.get('type'))[:40]!r}: only text is supported")
    return "".join(part["text"] for part in content)


def turn_weight(weight: Any) -> float:
    """The weight of an answer's loss. Raises: BadRow for any but 0 and 1."""
    try:
        value = float(weight)
    except (TypeError, ValueError, OverflowError):
        raise BadRow(f"weight {str(weight)[:40]!r} is not a number") from None
    if value not in (0, 1):
        raise BadRow(
            f"weight {value:g}: only 0 (read, not learned) and 1 are supported; repeat the row, or leave the weight out"
        )
    return value


def prose(row: Row) -> str:
    r"""What a base model is trained on: a text as it is, a dialogue (or the chosen one) without roles.

    >>> prose(Dialogue((Message("user", "hi"), Message("assistant", "hello"))))
    'hi\n\nhello'
    """
    dialogue = row.chosen if isinstance(row, Preference) else row
    return dialogue.text if isinstance(dialogue, Text) else "\n\n".join(m.content for m in dialogue.messages)
