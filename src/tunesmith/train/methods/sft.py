"""Supervised fine-tuning on dialogues: all weights, or LoRA adapters.

Rows are packed whole, attention stays inside each dialogue, loss is on the assistant's turns. What the usual recipes
have and this one leaves out: padding to the longest row, logits of unsupervised tokens, a mean of micro-batch means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.options.training import SFTConfig
from tunesmith.train.methods.method import LossSum, Method

if TYPE_CHECKING:
    from tunesmith.models.model import Model
    from tunesmith.options.pretraining import PretrainConfig


def token_loss_sum(model: Model, config: SFTConfig | PretrainConfig) -> LossSum:
    """The negative log-likelihood of a batch's targets."""
    from tunesmith.train.resolve import precision_of
    from tunesmith.train.token_loss import nll_sum

    precision = precision_of(config)
    return lambda batch: nll_sum(model, batch, precision)


SFT = Method(command="sft", config=SFTConfig, title="Supervised fine-tuning", loss_sum=token_loss_sum)
