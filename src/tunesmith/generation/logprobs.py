"""How likely each token of two given answers is under a model: the path of preference pairs, two answers a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data.packing import pack
from tunesmith.data.pairs import join_pairs
from tunesmith.data.prompts import conversation, encode_answered, encode_prompt
from tunesmith.data.token_bytes import ByteRuns
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.answers import ANSWER_END, ScoredAnswer
from tunesmith.generation.context import fit
from tunesmith.models.head import target_logps
from tunesmith.models.model import Model
from tunesmith.models.modes import evaluation_mode

BATCH_TOKENS = 4096  # in one forward pass
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TwoAnswers:
    """A prompt and two answers to it as tokens. ends: whether each ended its turn, which is then a target too."""

    prompt: list[int]
    answers: tuple[list[int], list[int]]
    ends: tuple[bool, bool]

    def cut(self, limit: int) -> tuple[tuple[Array, Array, Array], tuple[bool, bool]]:
        """Parts and ends for `join_pairs`; what lies beyond `limit` positions is left out."""
        room = max(limit - len(self.prompt), 0)
        ends = [end and len(ids) <= room for ids, end in zip(self.answers, self.ends, strict=True)]
        prompt, a, b = (np.array(ids, np.int64) for ids in (self.prompt, *(ids[:room] for ids in self.answers)))
        return (prompt, a, b), (ends[0], ends[1])


def encode_answers(tokenizer: Tokenizer, a: ScoredAnswer, b: ScoredAnswer, room: int | None = None) -> TwoAnswers:
    """Two answers to one prompt as tokens, as in training: the text anew, not the tokens that were drawn.

    room: tokens that the prompt may have; a longer one is read as for the answers (`generation.context`).
    """
    turns = conversation(a.prompt)
    if room is not None:
        turns = fit(turns, lambda some: len(encode_prompt(tokenizer, some)), room).messages
    prompt = encode_prompt(tokenizer, turns)
    ids = [encode_answered(tokenizer, turns, x.answer)[1] if x.answer else [] for x in (a, b)]
    return TwoAnswers(prompt, (ids[0], ids[1]), (a.finish_reason == "stop", b.finish_reason == "stop"))


def token_texts(tokenizer: Tokenizer, two: TwoAnswers) -> tuple[list[str], list[str]]:
    """The text of every target, answer by answer; "" where a character goes on in the next token."""
    texts = [
        ByteRuns(tokenizer).pieces(ids) + [ANSWER_END] * end for ids, end in zip(two.answers, two.ends, strict=True)
    ]
    return texts[0], texts[1]


def logps_of_both(
    model: Model, pairs: Sequence[TwoAnswers], end_of_answer: int
) -> list[tuple[list[float], list[float]]]:
    """Log-probability of every token of both answers to each prompt, the end included where there is one; nats.

    Many prompts share a forward pass, and a prompt is read once for its two answers. Tokens beyond the model's
    positions are left out at the end.
    """
    device = model.device
    cut = [two.cut(model.longest) for two in pairs]
    lengths = [min(sum(map(len, parts)), BATCH_TOKENS) for parts, _ in cut]
    found: list[tuple[list[float], list[float]]] = [([], [])] * len(pairs)
    with evaluation_mode(model):
        for group in pack(lengths, BATCH_TOKENS):
            parts, ends = zip(*(cut[i] for i in group), strict=True)
            batch = join_pairs(parts, ends, end_of_answer, model.longest).to(device)
            logps = target_logps(model, batch).tolist()
            at = 0
            for n, i in enumerate(group):
                first, second = batch.lengths[2 * n : 2 * n + 2]
                found[i] = logps[at : at + first], logps[at + first : at + first + second]
                at += first + second
    return found
