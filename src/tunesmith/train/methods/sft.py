"""Supervised fine-tuning on dialogues: all weights, or LoRA adapters.

Rows are packed whole, attention stays inside each dialogue, loss is on the assistant's turns. What the usual recipes
have and this one leaves out: padding to the longest row, logits of unsupervised tokens, a mean of micro-batch means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tunesmith.options.configs import precision_of, with_options
from tunesmith.options.training import SFTConfig
from tunesmith.train.methods.method import Method

if TYPE_CHECKING:
    from tunesmith.models.model import Model
    from tunesmith.options.pretraining import PretrainConfig
    from tunesmith.train.task import Estimated, LossSum, Prepared, Sampled, Task
    from tunesmith.train.token_loss import LossEstimate


def resolve(config: SFTConfig) -> SFTConfig:
    """The configuration with the tokens decided that carry loss."""
    from tunesmith.data.texts import resolve_loss_on

    loss_on = resolve_loss_on(config.data.loss_on, config.data.batching)
    return with_options(config, {"data.loss_on": loss_on})


def token_loss_sum(model: Model, config: SFTConfig | PretrainConfig) -> LossSum:
    """The negative log-likelihood of a batch's targets."""
    from tunesmith.train.token_loss import nll_sum

    precision = precision_of(config)
    return lambda batch: nll_sum(model, batch, precision)


def token_task(run: Prepared, about: str, further: Callable[[LossEstimate], dict[str, float]] = lambda _: {}) -> Task:
    """The task of a loss of tokens. further: metrics of the estimate on the validation rows, besides loss and perplexity."""
    from tunesmith.train.token_loss import estimate_loss

    model, precision, train, validation = run.trainee.trunk, run.precision, run.data.train, run.data.validation

    def evaluate(sampled: Sampled) -> Estimated:
        on_train = estimate_loss(model, train.sample(run.iters), precision, sampled)
        on_validation = estimate_loss(model, validation.fixed(run.iters), precision)
        metrics = {
            "train_loss": on_train.loss,
            "validation_loss": on_validation.loss,
            "validation_perplexity": on_validation.perplexity,
        }
        return metrics | further(on_validation), on_validation.parts

    return run.task(
        loss_sum=token_loss_sum(model, run.config),
        evaluate=evaluate,
        train_loss=lambda n, sampled: estimate_loss(model, train.sample(n), precision, sampled).loss,
        about=about,
    )


def task(run: Prepared) -> Task:
    """The run as the loop reads it."""
    rows, in_batches = len(run.data.splits.train_rows), run.data.train.rows_per_epoch
    return token_task(run, f"{rows:,} rows, {in_batches:,} batch rows per epoch")


METHOD = Method(
    command="sft",
    config=SFTConfig,
    title="Supervised fine-tuning",
    learning_rate=1e-4,
    resolve=resolve,
    loss_sum=token_loss_sum,
    task=task,
)
