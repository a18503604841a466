"""A reward model from preference pairs: one score for an answer, the chosen above the rejected.

    tunesmith reward --model.name runs/sft --data.name hh:harmless-base

Bradley-Terry: the loss is -log sigmoid(score of chosen - score of rejected). As in DPO a pair's prompt is computed once
and pairs share rows; both answers are scored at their last token.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.files.run import Run
from tunesmith.models.reward_head import RewardModel
from tunesmith.options.training import RewardConfig
from tunesmith.plan.room import memory_lines
from tunesmith.train.choice import Sums
from tunesmith.train.method import Task
from tunesmith.train.pair_loss import OBSERVED, estimate_reward, reward_loss_sum
from tunesmith.train.resolve import (
    check_options,
    check_pair_options,
    iters_of,
    precision_of,
    resolve_data,
    resolve_length,
    resolve_machine,
)
from tunesmith.train.resuming import inputs_of, settle_origin
from tunesmith.train.session import begin, run_training
from tunesmith.train.splits import describe_pairs, load_splits, pair_batches
from tunesmith.train.trainee import load_trainee, prepare_model


def train_reward_model(config: RewardConfig) -> Run:
    """Train a reward model and return the finished run; `ts.load_reward` loads its best checkpoint.

    Raises: UserError before the first step, for anything in the configuration, data or model that cannot work.
    """
    problems = check_pair_options(config.data)
    if config.data.loss_on != "auto":
        problems.append("--data.loss_on has no effect on a reward model, which scores the last token")
    if config.eval.reward is not None:
        problems.append("--eval.reward has no effect on a reward model, which writes no answers")
    config = check_options(config, problems)
    with begin(config, "reward") as (config, path):
        return _train_reward_model(config, path)


def _train_reward_model(config: RewardConfig, path: Path) -> Run:
    """As `train_reward_model`, in the run's own directory."""
    trainee = load_trainee(config, path, scored=True)
    model = trainee.model
    assert isinstance(model, RewardModel)
    config = resolve_data(config, trainee.trunk.longest)
    config = resolve_machine(config, trainee.trunk.width, "reward")
    splits = load_splits(config.data, trainee.tokenizer, pairs=True)
    train, validation, cut = pair_batches(splits, config)
    config = resolve_length(config, train, validation)
    origin = settle_origin(config, path, inputs_of("reward", trainee, splits, {}))
    device, precision = prepare_model(trainee.model, trainee.trunk, config), precision_of(config)

    def evaluate() -> tuple[dict[str, float], Sums]:
        seen, _ = estimate_reward(model, train.sample(iters_of(config)), precision)
        held, parts = estimate_reward(model, validation.fixed(iters_of(config)), precision)
        found = {"train_loss": seen["loss"], "train_accuracy": seen["accuracy"]}
        return found | {f"validation_{name}": value for name, value in held.items()}, parts

    task = Task(
        micro_batch=lambda i: train[i].to(device),
        per_epoch=train.per_epoch,
        loss_sum=lambda batch: reward_loss_sum(model, batch, precision),
        evaluate=evaluate,
        train_loss=lambda n: estimate_reward(model, train.sample(n), precision)[0]["loss"],
        describe_rows=lambda batches: ", ".join(train.rows.store.place(r) for b in batches for r in b.sources[:3]),
        counted="pairs",
        observed=OBSERVED,
        opening=[("pairs", describe_pairs(train.rows, validation.rows, iters_of(config)))],
        about=f"{len(train.rows):,} pairs, {train.rows_per_epoch:,} batch rows per epoch",
        memory=memory_lines(config, trainee.trunk.config, train),
        notes=[*splits.notes, *cut],
    )
    return run_training(config, path, trainee, device, origin, task)
