"""A model's answers to a set of prompts and their rewards: once, or at every estimate of a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.prompts import Prompt, each_once, load_prompts
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.answers import ScoredAnswer, write_answers
from tunesmith.files.run import step_name
from tunesmith.generation.engine import generate_answers
from tunesmith.generation.sampling import Sampling
from tunesmith.judge.measures import measures, reward_summary
from tunesmith.judge.scorers import Scorer, load_scorer
from tunesmith.models.model import Model
from tunesmith.options.training import EvalOptions, GenerateOptions
from tunesmith.train.trainee import Trainee


def answer_prompts(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    options: GenerateOptions,
    *,
    scorer: Scorer | None = None,
    samples: int = 1,
) -> list[ScoredAnswer]:
    """`samples` answers a prompt, one after the other, all decoded in one batch. Of a conversation that is too long whole
    turns are left out, with a note (`generation.context`).

    The streams of chance depend on prompt, number of the sample and seed only, so two models, or two checkpoints of one,
    meet the same luck and differ by their weights.
    """
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    conversations = [p.conversation for p in prompts]
    drawn = generate_answers(
        model, tokenizer, conversations, sampling, options.max_new_tokens, too_long="turns", samples=samples
    )
    answers = [
        ScoredAnswer(p.text, p.group, a.text, a.finish_reason, a.tokens, leaks=tokenizer.template.leaks(a.text))
        for p, a in zip((p for p in prompts for _ in range(samples)), drawn, strict=True)
    ]
    return scored(answers, scorer) if scorer else answers


def scored(answers: Sequence[ScoredAnswer], scorer: Scorer) -> list[ScoredAnswer]:
    """The same answers with their rewards."""
    values = scorer.score([a.prompt for a in answers], [a.answer for a in answers])
    return [dataclasses.replace(a, reward=value) for a, value in zip(answers, values, strict=True)]


def rewards_at_steps(
    options: EvalOptions, trainee: Trainee, path: Path, device: torch.device
) -> Callable[[int], dict[str, Any]] | None:
    """step -> what the `reward` event of that step holds; the answers go to `answers/`. None where `options` name no scorer.

    What a command hands to `train.session.run_training`, which itself knows nothing of judging.
    Raises: UserError if there is no such reward model or no prompt.
    """
    if options.reward is None:
        return None
    scorer = load_scorer(options.reward, device=str(device), option="--eval.reward")
    prompts = each_once(load_prompts(options.prompts, option="--eval.prompts"))
    print(f"note: scored by {scorer.description}")

    drawn, model = GenerateOptions(max_new_tokens=options.max_new_tokens), (trainee.trunk, trainee.tokenizer)

    def reward_at(step: int) -> dict[str, Any]:
        with torch.compiler.set_stance("force_eager"):  # answers grow token by token: no shape comes twice
            answers = answer_prompts(*model, prompts, drawn, scorer=scorer, samples=options.samples)
        write_answers(path / "answers" / f"{step_name(step)}.jsonl", answers)
        made_by = {"scorer": scorer.name, "samples": options.samples}
        return reward_summary(answers) | measures(answers) | made_by

    return reward_at
