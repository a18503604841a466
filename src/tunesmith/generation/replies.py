"""A model as the source of a chat's answers: what of a long conversation it reads, and how it answers."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Generator, Sequence

from tunesmith.data.dialogue import Message
from tunesmith.data.prompts import encode_prompt
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.generation.chat import Ending, Note, Source
from tunesmith.generation.engine import stream
from tunesmith.generation.sampling import Sampling
from tunesmith.models.gpt2 import GPT

MOST_RESERVED = 4  # an answer reserves at most one in so many of the model's positions, whatever max_new_tokens says


def model_source(model: GPT, tokenizer: Tokenizer, sampling: Sampling, max_new_tokens: int) -> Source:
    """Answers of a model for a `ChatSession`. The tries of a question are drawn as `sampling.sample` + 1, + 2, ..."""
    limit = model.config.block_size
    room = limit - min(max_new_tokens, limit // MOST_RESERVED)

    def reply(messages: Sequence[Message], number: int) -> Generator[str | Note, None, Ending]:
        kept, left_out = latest(tokenizer, messages, room)
        if left_out:
            yield Note(left_out)
        yield ""  # reading a long prompt takes a while
        drawn = dataclasses.replace(sampling, sample=sampling.sample + number)
        answer = yield from stream(model, tokenizer, kept, drawn, max_new_tokens, cut_front=True)
        if answer.finish_reason == "stop":
            return "stop"
        return "length" if answer.tokens == max_new_tokens else "context"

    return reply


def latest(tokenizer: Tokenizer, messages: Sequence[Message], room: int) -> tuple[list[Message], str]:
    """The part of a conversation that fits in `room` tokens as a prompt, and what was left out, "" for nothing.

    The system prompt and the last question stay, and as many whole exchanges before it as fit. Where these two alone are
    too long, the system prompt goes; where the question is, its beginning does.
    """

    def fits(turns: Sequence[Message]) -> bool:
        return len(encode_prompt(tokenizer, turns)) <= room

    if fits(messages):
        return list(messages), ""
    scene = list(messages[:1]) if messages[0].role == "system" else []
    starts = [i for i, m in enumerate(messages) if m.role == "user"]
    exchanges = bisect_left(range(len(starts) - 1), True, key=lambda n: fits([*scene, *messages[starts[n] :]]))
    recent = list(messages[starts[exchanges] :])
    if exchanges < len(starts) - 1 or fits([*scene, *recent]):
        return [*scene, *recent], "the conversation is longer than the model's context: its beginning is left out"
    if scene and fits(recent):
        return (
            recent,
            "the system prompt and the message together exceed the model's context: the system prompt is left out",
        )
    question = recent[0]
    dropped = bisect_left(range(len(question.content)), True, key=lambda n: fits([_without(question, n)]))
    gone = "its beginning and the system prompt are" if scene else "its beginning is"
    return [_without(question, dropped)], f"the message is longer than the model's context: {gone} left out"


def _without(message: Message, characters: int) -> Message:
    """The message without its first characters."""
    return dataclasses.replace(message, content=message.content[characters:])
