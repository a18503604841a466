"""A conversation with commands, apart from any terminal or model: lines go in, pieces of answers and notes come out."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.data.dialogue import Message
from tunesmith.errors import UserError
from tunesmith.files.answers import FinishReason

HELP = """/reset       start over
/system TEXT set the system prompt and start over
/system off  remove it and start over
/retry       another answer to the last question
/save FILE   write the conversation as JSON
/help        show this list
/quit        quit
//TEXT       send a message that begins with a slash"""
COMMANDS = ("/reset", "/system", "/retry", "/save", "/help", "/quit")


@dataclass(frozen=True)
class Note:
    """A line from the program, not from the model. failed: something that was asked for was not done."""

    text: str
    failed: bool = False


Source = Callable[[Sequence[Message], int], Generator[str | Note, None, FinishReason]]
"""(conversation that ends with a question, number of the try) -> the answer piece by piece, and why it ended. Empty pieces
mean that an answer is on its way. See `generation.replies.model_source` for a model's."""

CUT: dict[FinishReason, str] = {
    "length": "the answer was cut off at the token limit; raise --generate.max_new_tokens for longer answers",
    "context": "the answer was cut off because the model's context is full; /reset empties it",
}


class ChatSession:
    """One conversation: messages and commands in, pieces of answers and notes out. It prints nothing.

    >>> def echo(messages, number):
    ...     yield f"You said {messages[-1].content}"
    ...     return "stop"
    >>> list(ChatSession(echo).send("hello"))
    ['You said hello']

    Attributes:
        messages: the conversation. It grows with every piece, so it holds what was shown at any time: an answer that is
            interrupted is kept up to that point and can be retried; one that is interrupted before its first word
            leaves the conversation as it was. So does one that fails, even if part of it was shown.
        over: whether /quit was given.
    """

    def __init__(self, source: Source, system: str | None = None, help_text: str = HELP) -> None:
        self.source, self.help_text = source, help_text
        self.scene = [Message("system", system)] if system else []
        self.messages = list(self.scene)
        self.over = False
        self._tries = 0  # answers to the last question before the one that stands
        self._own_file: Path | None = None  # what /save without a name wrote

    def send(self, line: str) -> Iterator[str | Note]:
        """What a message or a command leads to. A message may have several lines; an empty one leads to nothing."""
        line = line.strip()
        if line.startswith("//"):
            yield from self._answer([*self.messages, Message("user", line[1:])], 0)
        elif line.startswith("/"):
            command, *rest = line.split(maxsplit=1)
            yield from self._run(command, "".join(rest))
        elif line:
            yield from self._answer([*self.messages, Message("user", line)], 0)

    def _run(self, command: str, rest: str) -> Iterator[str | Note]:
        if command == "/quit":
            self.over = True
        elif command == "/help":
            yield Note(self.help_text)
        elif rest and command in ("/reset", "/retry"):
            yield Note(f"{command} takes no argument; nothing was done", failed=True)
        elif command == "/reset":
            yield self._begin_anew()
        elif command == "/system":
            yield self._set_scene(rest)
        elif command == "/save":
            yield self._save(rest)
        elif command != "/retry":
            near = difflib.get_close_matches(command, COMMANDS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            yield Note(f"unknown command {command}; {hint}/help lists the commands", failed=True)
        elif not self.messages or self.messages[-1].role != "assistant":
            yield Note("there is no answer to try again", failed=True)
        else:
            yield from self._answer(self.messages[:-1], self._tries + 1)

    def _answer(self, asked: list[Message], tries: int) -> Iterator[str | Note]:
        """The pieces of an answer to `asked`, which ends with a question."""
        before, tries_before, answer = self.messages, self._tries, ""
        try:
            pieces = self.source(asked, tries)
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    ending: FinishReason = end.value or "stop"
                    break
                if isinstance(piece, str) and piece:
                    answer += piece
                    self.messages, self._tries = [*asked, Message("assistant", answer)], tries
                yield piece
        except (UserError, OSError, RuntimeError, MemoryError) as error:  # a model, a server, memory: the talk goes on
            self.messages, self._tries = before, tries_before
            reason = " ".join(str(error).split()) or type(error).__name__
            yield Note(f"no answer: {reason}; the conversation is unchanged", failed=True)
            return
        self.messages, self._tries = [*asked, Message("assistant", answer)], tries
        if not answer:
            yield Note("the model ended its turn without writing anything")
        if ending in CUT:
            yield Note(CUT[ending])

    def _begin_anew(self) -> Note:
        self.messages, self._tries = list(self.scene), 0
        return Note("started over")

    def _set_scene(self, text: str) -> Note:
        if not text:
            now = f"the system prompt is: {self.scene[0].content}" if self.scene else "there is no system prompt"
            return Note(f"{now} (/system TEXT sets one, /system off removes it)")
        self.scene = [] if text == "off" else [Message("system", text)]
        return self._begin_anew()

    def _save(self, name: str) -> Note:
        """Write the conversation as JSON: to the file named, or one of the session's own that replaces no other."""
        path = Path(os.path.expanduser(name)) if name else self._own_file or _free_name("conversation.json")
        turns = [{"role": m.role, "content": m.content} for m in self.messages]
        try:
            path.write_text(json.dumps({"messages": turns}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: a name with a null character
            return Note(f"not saved: {path}: {getattr(error, 'strerror', None) or error}", failed=True)
        self._own_file = self._own_file if name else path
        return Note(f"saved to {path.absolute()}")


def _free_name(name: str) -> Path:
    """The name, or with a number where a file has it already."""
    path, number = Path(name), 1
    while path.exists():
        number += 1
        path = Path(name).with_stem(f"{Path(name).stem}-{number}")
    return path
