"""Supervised fine-tuning on dialogues: all weights, or LoRA adapters.

    tunesmith sft --model.name gpt2-medium --data.name hh --train.steps 40000
    tunesmith sft --model.name gpt2-medium --data.name hh --lora.rank 8

Rows are packed whole, attention stays inside each dialogue, loss is on the assistant's turns. What the usual recipes
have and this one leaves out: padding to the longest row, logits of unsupervised tokens, a mean of micro-batch means.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tunesmith.files.run import Run
from tunesmith.judge.answering import rewards_at_steps
from tunesmith.options.training import SFTConfig
from tunesmith.plan.room import memory_lines
from tunesmith.train.choice import Sums
from tunesmith.train.method import Task
from tunesmith.train.resolve import check_options, iters_of, precision_of, resolve_data, resolve_length, resolve_machine
from tunesmith.train.resuming import inputs_of, prompts_of, settle_origin
from tunesmith.train.session import begin, run_training
from tunesmith.train.splits import load_splits, text_batches
from tunesmith.train.token_loss import estimate_loss, nll_sum
from tunesmith.train.trainee import load_trainee, prepare_model


def sft(config: SFTConfig) -> Run:
    """Fine-tune and return the finished run.

    Raises: UserError before the first step, for anything in the configuration, data or model that cannot work.
    """
    config = check_options(config)
    with begin(config, "sft") as (config, path):
        return _sft(config, path)


def _sft(config: SFTConfig, path: Path) -> Run:
    """As `sft`, in the run's own directory."""
    trainee = load_trainee(config, path)
    model = trainee.trunk
    config = resolve_data(config, model.longest)
    config = resolve_machine(config, model.width, "sft")
    splits = load_splits(config.data, trainee.tokenizer)
    train, validation, cut = text_batches(splits, config)
    config = resolve_length(config, train, validation)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, loss_on=train.rows.loss_on))
    origin = settle_origin(config, path, inputs_of("sft", trainee, splits, prompts_of(config.eval.prompts)))
    device, precision = prepare_model(trainee.model, trainee.trunk, config), precision_of(config)

    def evaluate() -> tuple[dict[str, float], Sums]:
        on_train = estimate_loss(model, train.sample(iters_of(config)), precision)
        on_validation = estimate_loss(model, validation.fixed(iters_of(config)), precision)
        found = {
            "train_loss": on_train.loss, "validation_loss": on_validation.loss,
            "validation_perplexity": on_validation.perplexity,
        }  # fmt: skip
        return found, on_validation.parts

    task = Task(
        micro_batch=lambda i: train[i].to(device),
        per_epoch=train.per_epoch,
        loss_sum=lambda batch: nll_sum(model, batch, precision),
        evaluate=evaluate,
        train_loss=lambda n: estimate_loss(model, train.sample(n), precision).loss,
        describe_rows=lambda batches: (
            ", ".join(splits.train.place(r) for b in batches for r in b.sources[:3]) or "random windows"
        ),
        counted="target_tokens",
        about=f"{len(splits.train_rows):,} rows, {train.rows_per_epoch:,} batch rows per epoch",
        memory=memory_lines(config, trainee.trunk.config, train),
        notes=[*splits.notes, *cut],
        reward_at=rewards_at_steps(config.eval, trainee, path, device),
    )
    return run_training(config, path, trainee, device, origin, task)
