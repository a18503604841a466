"""A model's answers to a set of prompts, measured and, where a reward model is named, scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tunesmith.data.prompts import Prompt
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.generation.engine import Sampling, generate_answers
from tunesmith.judge.answers import ScoredAnswer
from tunesmith.judge.scoring import Scorer
from tunesmith.models.gpt2 import GPT
from tunesmith.options.training import GenerateOptions


def answer_prompts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    options: GenerateOptions,
    *,
    scorer: Scorer | None = None,
    samples: int = 1,
) -> list[ScoredAnswer]:
    """`samples` answers a prompt, one after the other, all decoded in one batch.

    The streams of chance depend on prompt, number of the sample and seed only, so two models, or two checkpoints of one,
    meet the same luck and differ by their weights.
    """
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    conversations = [[{"role": "user", "content": p.text}] for p in prompts]
    drawn = generate_answers(model, tokenizer, conversations, sampling, options.max_new_tokens, samples=samples)
    answers = [
        ScoredAnswer(p.text, p.group, a.text, a.finish_reason, a.tokens)
        for p, a in zip((p for p in prompts for _ in range(samples)), drawn, strict=True)
    ]
    return scored(answers, scorer) if scorer else answers


def scored(answers: Sequence[ScoredAnswer], scorer: Scorer) -> list[ScoredAnswer]:
    """The same answers with their rewards."""
    found = scorer.score([a.prompt for a in answers], [a.answer for a in answers])
    return [dataclasses.replace(a, reward=value) for a, value in zip(answers, found, strict=True)]
