"""Supervised fine-tuning of a GPT-2 on dialogues.

    tunesmith sft --model.name gpt2-medium --data.name hh --train.steps 40000

Rows are packed whole, attention stays inside each dialogue, loss is on the assistant's turns. What the usual recipes
have and this one leaves out: padding to the longest row, logits of unsupervised tokens, a mean of micro-batch means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.amp import GradScaler

from tunesmith.batching import Batch, Batches
from tunesmith.datasets import holdout_rows, open_dataset
from tunesmith.device import describe, keep_freed_memory, resolve_device, resolve_precision, seed_everything
from tunesmith.errors import UsageError, UserError
from tunesmith.evaluate import estimate_loss, nll_sum
from tunesmith.fit import fit
from tunesmith.models import load_for_training
from tunesmith.optim import DEFAULT_WEIGHT_DECAY, build_optimizer, schedule_factor
from tunesmith.options import DataOptions, SFTConfig
from tunesmith.runlog import Run, new_run_directory, open_log
from tunesmith.tokenizer import Tokenizer
from tunesmith.tokenstore import TokenStore, tokenise


@dataclass(frozen=True)
class Splits:
    """Training and validation rows. When a data set has no test split, both are parts of one store."""

    train: TokenStore
    train_rows: Sequence[int]
    validation: TokenStore
    validation_rows: Sequence[int]
    notes: list[str]


def load_splits(data: DataOptions, tokenizer: Tokenizer) -> Splits:
    """Tokenised rows of a data set. Raises: UserError for unusable data, or with `data.strict` for any bad row."""
    source = open_dataset(data)
    whole = data.batching == "windows"
    train = tokenise(source, "train", tokenizer, whole=whole)
    notes = [*source.notes, *train.report.notes, *(f"train: {line}" for line in train.report.lines())]
    bad = dict(train.report.bad)
    if "test" in source.files:
        validation = tokenise(source, "test", tokenizer, whole=whole)
        notes += [*validation.report.notes, *(f"test: {line}" for line in validation.report.lines())]
        bad |= validation.report.bad
        train_rows, validation_rows = np.arange(len(train)), np.arange(len(validation))
    else:
        validation = train
        train_rows, validation_rows = holdout_rows(len(train), data.holdout, data.seed)
        notes.append(
            f"no test split: {len(validation_rows):,} of {len(train):,} rows are held out for validation (--data.holdout)"
        )
    if data.strict and bad:
        raise UserError(f"--data.strict: {'; '.join(n for n in notes if 'skipped' in n)}")
    return Splits(train, train_rows.tolist(), validation, validation_rows.tolist(), notes)


def make_batches(splits: Splits, config: SFTConfig) -> tuple[Batches, Batches, list[str]]:
    """Training and validation batches, and what had to be cut. Raises: UserError with `data.strict` if anything was."""
    data = config.data
    shared: dict[str, Any] = {
        "batching": data.batching, "block_size": data.block_size, "batch_size": config.train.batch_size,
        "loss_on": data.loss_on, "truncation": data.truncation, "seed": data.seed,
        "fill_to": 64 if config.train.compile or config.train.precision != "fp32" else 1,
    }  # fmt: skip
    train = Batches(splits.train, splits.train_rows, **shared)
    validation = Batches(splits.validation, splits.validation_rows, **shared)
    cut = [
        f"{name}: {line}"
        for name, b in (("train", train), ("validation", validation))
        for t in b.truncations
        for line in t.lines(data.block_size)
    ]
    if data.strict and cut:
        raise UserError(f"--data.strict: {'; '.join(cut)}")
    return train, validation, cut


def resolve_machine(config: SFTConfig, n_embd: int) -> SFTConfig:
    """The configuration with every `auto` that depends on the machine decided."""
    t, o = config.train, config.optimizer
    device = resolve_device(t.device)
    train = dataclasses.replace(
        t,
        device=str(device),
        precision=resolve_precision(t.precision, device, n_embd),
        compile=device.type == "cuda" if t.compile == "auto" else t.compile,
        activation_checkpointing=t.activation_checkpointing is True,
    )
    decay = DEFAULT_WEIGHT_DECAY.get(o.name, 0.0) if o.weight_decay is None else o.weight_decay
    return dataclasses.replace(config, train=train, optimizer=dataclasses.replace(o, weight_decay=decay))


def resolve_length(config: SFTConfig, train: Batches, validation: Batches) -> SFTConfig:
    """The configuration with every default that depends on the data decided: steps and intervals.

    Estimates come 40 times over the training, but on small data not so often that they take longer than the training
    itself (a forward pass is a third of a step).
    """
    per_step = config.train.batch_size * config.train.accumulate
    steps = config.train.steps or max(1, round((config.train.epochs or 1.0) * train.rows_per_epoch / per_step))
    estimate = sum(min(config.eval.iters, -(-b.rows_per_epoch // b.batch_size)) for b in (train, validation))
    every = config.eval.every or max(1, steps // 40, min(steps, estimate // (3 * config.train.accumulate)))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, loss_on=train.loss_on),
        train=dataclasses.replace(config.train, steps=steps, epochs=None),
        eval=dataclasses.replace(config.eval, every=every),
        checkpoint=dataclasses.replace(config.checkpoint, every=config.checkpoint.every or every),
    )


FIXED = (  # what a resumed run cannot change without becoming another run
    "model.name", "model.dropout", "data.name", "data.block_size", "data.batching", "data.loss_on", "data.truncation",
    "data.max_rows", "data.holdout", "data.seed", "train.batch_size", "train.accumulate", "train.precision",
    "optimizer.name",
)  # fmt: skip


def check_resumable(stored: dict[str, Any], config: SFTConfig) -> None:
    """Raises: UserError naming every setting that differs from the run's and would change what it already did."""
    asked = as_dict(config)
    pairs = [(key, stored.get((part := key.split("."))[0], {}).get(part[1]), asked[part[0]][part[1]]) for key in FIXED]
    changed = [f"{key} was {before!r}, now {now!r}" for key, before, now in pairs if before != now]
    if changed:
        raise UserError(f"--resume: {'; '.join(changed)}. Keep these, or start a new run with another --out")


def check(config: SFTConfig) -> None:
    """Raises: UsageError with every problem at once."""
    t, o, e, d = config.train, config.optimizer, config.eval, config.data
    at_least = {
        "--data.block_size": (d.block_size, 2), "--data.max_rows": (d.max_rows, 1), "--data.seed": (d.seed, 0),
        "--train.seed": (t.seed, 0), "--train.steps": (t.steps, 1), "--train.diverge_after": (t.diverge_after, 0),
        "--train.batch_size": (t.batch_size, 1), "--train.accumulate": (t.accumulate, 1), "--train.grad_clip": (t.grad_clip, 0),
        "--optimizer.lr": (o.lr, 0), "--optimizer.warmup_steps": (o.warmup_steps, 0),
        "--optimizer.weight_decay": (o.weight_decay, 0), "--eval.every": (e.every, 1), "--eval.iters": (e.iters, 1),
        "--checkpoint.every": (config.checkpoint.every, 1), "--checkpoint.keep": (config.checkpoint.keep, 0),
    }  # fmt: skip
    problems = [
        f"{name} is {value}, expected at least {low}"
        for name, (value, low) in at_least.items()
        if value is not None and value < low
    ]
    if t.steps is not None and t.epochs is not None:
        problems.append("give --train.steps or --train.epochs, not both")
    if t.epochs is not None and t.epochs <= 0:
        problems.append(f"--train.epochs is {t.epochs}, expected more than 0")
    if not 0 <= config.model.dropout < 1:
        problems.append(f"--model.dropout is {config.model.dropout}, expected 0 <= dropout < 1")
    if not 0 <= o.momentum < 1:
        problems.append(f"--optimizer.momentum is {o.momentum}, expected 0 <= momentum < 1")
    if o.name == "sgd-nesterov" and o.momentum == 0:
        problems.append("--optimizer.momentum is 0, but sgd-nesterov needs some; use sgd")
    if not 0 < d.holdout < 1:
        problems.append(f"--data.holdout is {d.holdout}, expected a share between 0 and 1")
    if problems:
        raise UsageError("; ".join(problems))


def sft(config: SFTConfig) -> Run:
    """Fine-tune and return the finished run.

    Raises: UserError for anything in the configuration, data or model that cannot work, before the first step.
    """
    check(config)
    path = new_run_directory(
        config.out, f"runs/sft-{_short(config.model.name)}-{_short(config.data.name)}", config.resume
    )
    keep_freed_memory()
    seed_everything(config.train.seed)
    model, tokenizer = load_for_training(
        config.model.name, init=config.model.init, dropout=config.model.dropout, seed=config.train.seed
    )
    if config.data.block_size > model.config.block_size:
        raise UserError(
            f"--data.block_size {config.data.block_size:,} is more than {config.model.name} can hold: it has positions "
            f"for {model.config.block_size:,} tokens, a part of its weights. Use {model.config.block_size} or less"
        )
    config = resolve_machine(config, model.config.n_embd)
    splits = load_splits(config.data, tokenizer)
    train, validation, cut = make_batches(splits, config)
    config = resolve_length(config, train, validation)
    if config.resume and (path / "config.yaml").exists():
        check_resumable(Run(path).config, config)
    device, precision = resolve_device(config.train.device), config.train.precision
    assert precision != "auto"
    assert config.train.steps is not None
    assert config.eval.every is not None
    assert config.checkpoint.every is not None
    model.to(device).train()
    model.activation_checkpointing = config.train.activation_checkpointing is True
    if config.train.compile:
        for block in model.h:
            block.compile()
    o = config.optimizer
    optimizer = build_optimizer(model, o.name, lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum)
    scaler = GradScaler(device.type) if precision == "fp16" else None

    def loss_sum(batch: Batch) -> Tensor:
        return nll_sum(model, batch, precision)

    def evaluate() -> dict[str, float]:
        on_train = estimate_loss(model, train.fixed(config.eval.iters), precision)
        on_validation = estimate_loss(model, validation.fixed(config.eval.iters), precision)
        return {
            "train_loss": on_train.loss, "validation_loss": on_validation.loss,
            "validation_perplexity": on_validation.perplexity,
        }  # fmt: skip

    steps = config.train.steps
    with open_log(path) as log:
        log.write_config(as_dict(config))
        for line in [*splits.notes, *cut]:
            print(f"note: {line}")
        print(
            f"{path}: {config.model.name}, {model.parameter_count():,} parameters, {precision} on {describe(device)}; "
            f"{len(splits.train_rows):,} rows, {train.rows_per_epoch:,} batch rows an epoch, {steps:,} steps",
            flush=True,
        )
        try:
            fit(
                log=log, model=model, tokenizer=tokenizer, optimizer=optimizer, scaler=scaler,
                micro_batch=lambda i: train[i].to(device), loss_sum=loss_sum,
                learning_rate=lambda step: o.lr * schedule_factor(o.schedule, step, steps=steps, warmup_steps=o.warmup_steps),
                evaluate=evaluate,
                describe_rows=lambda batches: ", ".join(splits.train.place(r) for b in batches for r in b.sources[:3]) or "random windows",
                steps=steps, accumulate=config.train.accumulate, max_norm=config.train.grad_clip,
                eval_every=config.eval.every, eval_at_start=config.eval.at_start, checkpoint_every=config.checkpoint.every,
                keep=config.checkpoint.keep, diverge_after=config.train.diverge_after, resume=config.resume,
            )  # fmt: skip
        except BaseException as error:
            step = log.run.status.get("step", 0) if (path / "status.json").exists() else 0
            log.status("failed", step, f"{type(error).__name__}: {error}")
            raise
    return Run(path)


def as_dict(config: SFTConfig) -> dict[str, Any]:
    """What config.yaml holds: everything but where the run is written."""
    whole = dataclasses.asdict(config)
    return {key: value for key, value in whole.items() if key not in ("out", "resume")}


def _short(name: str) -> str:
    """A name as part of a directory's name."""
    return name.rstrip("/").rsplit("/", 1)[-1].replace(":", "-").partition(".")[0] or "model"
