"""A reward model from preference pairs: a model with one score for an answer, the chosen above the rejected.

Bradley-Terry: the loss is -log sigmoid(score of chosen - score of rejected). As in DPO a pair's prompt is computed once
and pairs share rows; both answers are scored at their last token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.options.configs import precision_of
from tunesmith.options.training import RewardConfig
from tunesmith.train.methods.method import Method
from tunesmith.train.methods.preferences import OBSERVED, check_pair_options, pair_metrics

if TYPE_CHECKING:
    from tunesmith.models.reward_head import RewardModel
    from tunesmith.train.task import Estimated, LossSum, Prepared, Sampled, Task


def check(config: RewardConfig) -> list[str]:
    """What is wrong with the options that only this command has."""
    problems = check_pair_options(config.data)
    if config.data.loss_on != "auto":
        problems.append("--data.loss_on has no effect on a reward model, which scores the last token")
    if config.eval.reward is not None:
        problems.append("--eval.reward has no effect on a reward model, which writes no answers")
    return problems


def loss_sum(model: RewardModel, config: RewardConfig) -> LossSum:
    """Bradley-Terry of a batch's pairs."""
    from tunesmith.train.pair_loss import reward_loss_sum

    precision = precision_of(config)
    return lambda batch: reward_loss_sum(model, batch, precision)


def task(run: Prepared) -> Task:
    """The run as the loop reads it."""
    from tunesmith.train.pair_loss import estimate_reward

    model: Any = run.trainee.model
    train, validation, precision = run.data.train, run.data.validation, run.precision

    def evaluate(sampled: Sampled) -> Estimated:
        on_train, _ = estimate_reward(model, train.sample(run.iters), precision, sampled)
        on_validation, losses = estimate_reward(model, validation.fixed(run.iters), precision)
        return pair_metrics(on_train, on_validation), losses

    return run.task(
        loss_sum=loss_sum(model, run.config),
        evaluate=evaluate,
        train_loss=lambda n, sampled: estimate_reward(model, train.sample(n), precision, sampled)[0]["loss"],
        about=f"{len(train.rows):,} pairs, {train.rows_per_epoch:,} batch rows per epoch",
        opening=[run.data.pairs_event(run.iters)],
    )


METHOD = Method(
    command="reward",
    config=RewardConfig,
    title="Reward model",
    learning_rate=1e-5,
    pairs=True,
    scored=True,
    observed=OBSERVED,
    check=check,
    loss_sum=loss_sum,
    task=task,
)
