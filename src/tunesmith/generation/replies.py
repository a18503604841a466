"""A model as the source of a chat's answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence

from tunesmith.data.dialogue import Message
from tunesmith.data.prompts import encode_prompt
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.answers import FinishReason
from tunesmith.generation.chat import Note, Source
from tunesmith.generation.context import fit, room_for_prompt
from tunesmith.generation.engine import stream
from tunesmith.generation.sampling import Sampling
from tunesmith.models.model import Model


def model_source(model: Model, tokenizer: Tokenizer, sampling: Sampling, max_new_tokens: int) -> Source:
    """Answers of a model for a `ChatSession`. The tries of a question are drawn as `sampling.sample` + 1, + 2, ..."""
    room = room_for_prompt(model.longest, max_new_tokens)

    def reply(messages: Sequence[Message], number: int) -> Generator[str | Note, None, FinishReason]:
        reading = fit(messages, lambda turns: len(encode_prompt(tokenizer, turns)), room)
        if reading.left_out:
            yield Note(reading.left_out)
        yield ""  # reading a long prompt takes a while
        drawn = dataclasses.replace(sampling, sample=sampling.sample + number)
        answer = yield from stream(model, tokenizer, reading.messages, drawn, max_new_tokens)
        return answer.finish_reason

    return reply
