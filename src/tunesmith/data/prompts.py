"""Prompts: sets of them for evaluation, the embedded forty or a user's file; and a conversation as the ids that a model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tunesmith.data.dialogue import BadRow, Message, parse_messages
from tunesmith.data.encoding import ids_of
from tunesmith.data.forms import prompt_turns
from tunesmith.data.hh_template import HH, as_transcript, asks_for_answers, parse_transcript
from tunesmith.data.readers import SUFFIXES, Report, read_file, read_text, suffix_of
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UsageError, UserError, note, path_meant

EMBEDDED = Path(__file__).parents[1] / "sample" / "prompts.jsonl"
Conversation = Sequence[Message] | Sequence[Mapping[str, str]]


EXPECTED = "expected one prompt per line, or rows with a text `prompt` (and optionally `group`), or another format of docs/data.md"


@dataclass(frozen=True)
class Prompt:
    """What a model is asked. text: its one question, or the whole conversation as a transcript.

    group: its topic, "" where the file names none. turns: the conversation, empty for one question.
    """

    text: str
    group: str = ""
    turns: tuple[Message, ...] = ()

    @property
    def conversation(self) -> Sequence[Message]:
        """The turns that a model reads before it answers."""
        return self.turns or (Message("user", self.text),)


def load_prompts(file: str | None = None, limit: int | None = None, option: str = "--prompts") -> list[Prompt]:
    """The embedded prompts, or those of a file: of its rows in any form of data, else one prompt a line.

    A text file in the HH form holds conversations; each ends where an answer would begin.
    Raises: UserError naming file and line.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}, expected at least 1")
    path = Path(file).expanduser() if file else EMBEDDED
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file; {EXPECTED}{path_meant(path)}")
    try:
        prompts = _of_rows(path) if suffix_of(path) in SUFFIXES else _of_text(read_text(path))
    except UserError as error:
        raise UserError(f"{option} {error}") from None
    if not prompts:
        raise UserError(
            f"{option} {path}: it contains no prompt; give one per line, or rows with `prompt` and optionally `group`"
        )
    return prompts[:limit]


def each_once(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The different ones of some prompts, with a note if some repeat: they get the same answers, and a figure rests on each once."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    if repeats := len(prompts) - len(first):
        note(
            f"{repeats:,} of {len(prompts):,} prompts repeat another one and would be answered in the same words: each is asked and "
            f"counted once, {len(first):,} in all"
        )
    return list(first.values())


def _of_rows(path: Path) -> list[Prompt]:
    """Prompts of a file of rows. Raises: UserError for the first row without one."""
    report, prompts = Report(), []
    for located in read_file(path, 0, report, str(path)):
        try:
            group = located.value.get("group") if isinstance(located.value, dict) else None
            prompts.append(_prompt(prompt_turns(located.value), "" if group is None else str(group)))
        except BadRow as reason:
            raise UserError(f"{path}:{located.line}: {reason}; {EXPECTED}") from None
    for unreadable, places in report.places.items():
        raise UserError(f"{places[0]}: {unreadable.replace('invalid JSON', 'not JSON')}; {EXPECTED}")
    return prompts


def _of_text(text: str) -> list[Prompt]:
    """Prompts of a text: a line each; of a transcript each conversation up to an open answer."""
    transcript = as_transcript(text)
    if transcript is None or not asks_for_answers(transcript):
        lines = filter(None, map(str.strip, text.split("\n")))  # splitlines would also cut at U+2028 and its like
        return [_prompt(prompt_turns(line)) for line in lines]
    prompts: list[list[Message]] = [[]]
    for turn in parse_transcript(transcript).messages:
        if turn.role == "assistant" and not turn.content.strip():
            prompts.append([])
        else:
            prompts[-1].append(turn)
    return [_prompt(turns) for turns in prompts if turns and turns[-1].role == "user"]


def _prompt(turns: Sequence[Message], group: str = "") -> Prompt:
    """A conversation as a prompt."""
    if len(turns) == 1 and turns[0].role == "user":
        return Prompt(turns[0].content, group)
    return Prompt(HH.text(turns).lstrip("\n"), group, tuple(turns))  # the form in which `conversation` reads it back


def conversation(prompt: str | Conversation) -> list[Message]:
    """The turns of a prompt; a text is the only one, or a transcript of several. Raises: BadRow if it is none."""
    if isinstance(prompt, str):
        transcript = as_transcript(prompt)
        return [Message("user", prompt)] if transcript is None else list(parse_transcript(transcript).messages)
    return [m if isinstance(m, Message) else parse_messages([m]).messages[0] for m in prompt]


def encode_prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Ids of what a model reads of a conversation before it answers, the same as in training.

    Raises: as `turns_of`, or UserError if the template refuses the conversation.
    """
    turns = turns_of(conversation)
    try:
        return ids_of(tokenizer.template.segments(turns, True), tokenizer)
    except BadRow as reason:
        raise UserError(f"the model's form of a dialogue has no place for this conversation: {reason}") from None


def encode_answered(tokenizer: Tokenizer, turns: Sequence[Message], answer: str) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and of an answer to it without its end, the same as in training.

    Raises: UserError if the template refuses them.
    """
    try:
        prompt, words = tokenizer.template.answered([*turns, Message("assistant", answer)])
    except BadRow as reason:
        raise UserError(f"the model's form of a dialogue has no place for this answer: {reason}") from None
    return ids_of(prompt, tokenizer), list(
        chain.from_iterable(tokenizer.encode_segments(tokenizer.continued(prompt, words)))
    )


def turns_of(conversation: Conversation) -> list[Message]:
    """The turns of a conversation that a model is to answer. Raises: UserError if it is none, or ends with an answer."""
    try:
        messages = [m if isinstance(m, Message) else parse_messages([m]).messages[0] for m in conversation]
    except BadRow as reason:
        raise UserError(
            f"a prompt is not a conversation: {reason}; expected [{{'role': 'user', 'content': '...'}}, ...]"
        ) from None
    if not messages:
        raise UserError("a prompt is an empty conversation: there is nothing to answer; end it with a user turn")
    if messages[-1].role == "assistant":
        raise UserError(
            "a prompt ends with an assistant turn, which is the model's to write: end it with a user turn "
            f"(the last one says {messages[-1].content[:40]!r})"
        )
    return messages
