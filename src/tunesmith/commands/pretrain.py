"""Pretraining: a new GPT-2, and where asked for its tokenizer, from plain text.

    tunesmith pretrain --data.name book.txt --model.n_layer 4 --model.n_head 4 --model.n_embd 256 --tokenizer.vocab_size 4096
    tunesmith pretrain --data.name DIR --model.name gpt2 --tokenizer.name gpt2

Short texts share a row without seeing each other, long ones are cut into rows; every token but a text's first is
learned, and the text's end. The validation loss is also reported in bits per byte, in which models with different
tokenizers can be compared. Left out: a schedule of lengths, a mixture of data sets, weights shared with other models.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tunesmith.data.cutting import block_size_of
from tunesmith.data.tokenizer import Tokenizer, bits_per_byte, text_bytes
from tunesmith.errors import UserError
from tunesmith.files.names import new_model
from tunesmith.files.run import Run
from tunesmith.judge.answering import rewards_at_steps
from tunesmith.models.family import Config
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.plan.room import memory_lines
from tunesmith.train.choice import Sums
from tunesmith.train.method import Task
from tunesmith.train.resolve import check_options, check_types, iters_of, precision_of, resolve_length, resolve_machine
from tunesmith.train.resuming import inputs_of, prompts_of, settle_origin
from tunesmith.train.scratch import make_tokenizer, problems_of, resolve_shape
from tunesmith.train.session import begin, run_training
from tunesmith.train.splits import Splits, TextBatches, load_splits, text_batches
from tunesmith.train.token_loss import estimate_loss, nll_sum
from tunesmith.train.trainee import Trainee, prepare_model


def pretrain(config: PretrainConfig) -> Run:
    """Train from scratch and return the finished run.

    Raises: UserError before the first step, for anything in the configuration or data that cannot work.
    """
    config = check_types(config)
    config, shape = resolve_shape(config)
    check_options(config, problems_of(config))
    with begin(config, "pretrain") as (config, path):
        return _pretrain(config, shape, path)


def _pretrain(config: PretrainConfig, shape: Config, path: Path) -> Run:
    """As `pretrain`, in the run's own directory."""
    tokenizer = make_tokenizer(config, path)
    model = new_model(dataclasses.replace(shape, vocab_size=tokenizer.vocab_size), config.train.seed)
    trainee = Trainee(model, model, tokenizer, base="", fingerprint="", lora=False)
    config = resolve_machine(config, shape.width, "pretrain")
    splits = load_splits(config.data, tokenizer, prose=True)
    tokens = check_length(splits, config)
    train, validation, cut = text_batches(splits, config)
    config = resolve_length(config, train, validation)
    origin = settle_origin(config, path, inputs_of("pretrain", trainee, splits, prompts_of(config.eval.prompts)))
    device, precision = prepare_model(trainee.model, trainee.trunk, config), precision_of(config)
    size = held_out_bytes(validation, tokenizer, config)

    def evaluate() -> tuple[dict[str, float], Sums]:
        on_train = estimate_loss(model, train.sample(iters_of(config)), precision)
        found = estimate_loss(model, validation.fixed(iters_of(config)), precision)
        metrics = {
            "train_loss": on_train.loss, "validation_loss": found.loss, "validation_perplexity": found.perplexity,
            "validation_bits_per_byte": bits_per_byte(found.loss * found.tokens, size),
        }  # fmt: skip
        return metrics, found.parts

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
        about=f"vocabulary of {tokenizer.vocab_size:,}, {len(splits.train_rows):,} texts of {tokens:,} tokens, "
        f"{train.rows_per_epoch:,} batch rows per epoch",
        memory=memory_lines(config, trainee.trunk.config, train),
        notes=[*splits.notes, *cut],
        reward_at=rewards_at_steps(config.eval, trainee, path, device),
    )
    return run_training(config, path, trainee, device, origin, task)


def check_length(splits: Splits, config: PretrainConfig) -> int:
    """Tokens in the training texts. Raises: UserError if they do not fill one row of a batch."""
    tokens = int(splits.train.lengths[splits.train_rows].sum())
    if tokens < (block_size := block_size_of(config.data)):
        raise UserError(
            f"--model.block_size {block_size:,} is more than all the training texts together, which have {tokens:,} "
            f"tokens; lower it or add text"
        )
    return tokens


def held_out_bytes(validation: TextBatches, tokenizer: Tokenizer, config: PretrainConfig) -> int:
    """Bytes of text that an estimate predicts. Raises: UserError if the tokenizer is not byte-level."""
    try:
        return sum(text_bytes(tokenizer, b.targets[: b.count].numpy()) for b in validation.fixed(iters_of(config)))
    except ValueError:
        name = config.tokenizer.name
        raise UserError(f"--tokenizer.name {name}: not a byte-level tokenizer like GPT-2's; use gpt2 or new") from None
