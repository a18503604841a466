"""A reward model from preference pairs: a model with one score for an answer, the chosen above the rejected.

Bradley-Terry: the loss is -log sigmoid(score of chosen - score of rejected). As in DPO a pair's prompt is computed once
and pairs share rows; both answers are scored at their last token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.options.training import RewardConfig
from tunesmith.train.methods.method import LossSum, Method

if TYPE_CHECKING:
    from tunesmith.models.reward_head import RewardModel


def check(config: RewardConfig) -> list[str]:
    """What is wrong with the options that only this command has."""
    from tunesmith.train.resolve import check_pair_options

    problems = check_pair_options(config.data)
    if config.data.loss_on != "auto":
        problems.append("--data.loss_on has no effect on a reward model, which scores the last token")
    if config.eval.reward is not None:
        problems.append("--eval.reward has no effect on a reward model, which writes no answers")
    return problems


def loss_sum(model: RewardModel, config: RewardConfig) -> LossSum:
    """Bradley-Terry of a batch's pairs."""
    from tunesmith.train.pair_loss import reward_loss_sum
    from tunesmith.train.resolve import precision_of

    precision = precision_of(config)
    return lambda batch: reward_loss_sum(model, batch, precision)


REWARD = Method(
    command="reward",
    config=RewardConfig,
    title="Reward model",
    loss_sum=loss_sum,
    pairs=True,
    scored=True,
    check=check,
)
