"""Options of `tunesmith plan`: those of the training command, and those of the plan itself. No torch here."""

from dataclasses import dataclass

from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig


@dataclass(frozen=True)
class PlanOptions:
    """Memory and time of a training run, before running it. No data is read, no weights are loaded."""

    device: str = "auto"
    """auto, cpu, cuda: this machine, timed by a probe; or a card, from its data sheet: p100, v100, t4, l4, rtx3090, rtx4090, a100, h100,
    h200."""
    fit: str | None = None
    """Available memory, such as 16GB, or `device`: find the fastest setting that fits and gives the same result."""
    fit_inexact: bool = False
    """With fit: also try settings that change the result slightly: bf16 weights, 8-bit optimizer state, no clipping."""
    text_tokens: int = 170
    """Mean tokens per dialogue, or per pair with preference pairs, as `tunesmith data` reports."""
    supervised: float = 0.5
    """Share of the tokens that carry loss, as `tunesmith data` reports; with loss on all tokens it is 1."""
    out: str | None = None
    """Also write the plan to this JSON file."""


@dataclass(frozen=True)
class PlanSFT(PlanOptions, SFTConfig):
    """Memory and time of supervised fine-tuning, before running it. No data is read, no weights are loaded."""


@dataclass(frozen=True)
class PlanDPO(PlanOptions, DPOConfig):
    """Memory and time of preference optimisation, before running it. No data is read, no weights are loaded."""


@dataclass(frozen=True)
class PlanReward(PlanOptions, RewardConfig):
    """Memory and time of training a reward model, before running it. No data is read, no weights are loaded."""


@dataclass(frozen=True)
class PlanPretrain(PlanOptions, PretrainConfig):
    """Memory and time of pretraining, before running it. No data is read, no weights are loaded."""


PLANS = {"sft": PlanSFT, "pretrain": PlanPretrain, "dpo": PlanDPO, "reward": PlanReward}
