"""What the training commands share around the loop: checked options, resolved defaults, the model, the run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.amp import GradScaler

from tunesmith.answers import measures, reward_summary, write_answers
from tunesmith.batching import Batches
from tunesmith.choice import Sums
from tunesmith.datasets import holdout_rows, open_dataset
from tunesmith.device import (
    Precision,
    describe,
    environment,
    keep_freed_memory,
    resolve_device,
    resolve_precision,
    seed_everything,
)
from tunesmith.errors import UsageError, UserError
from tunesmith.fit import MicroBatch, fit
from tunesmith.judging import answer_prompts
from tunesmith.optim import DEFAULT_WEIGHT_DECAY, build_optimizer, schedule_factor
from tunesmith.options import (
    DataOptions,
    DPOConfig,
    EvalOptions,
    GenerateOptions,
    LoRAOptions,
    PairDataOptions,
    RewardConfig,
    SFTConfig,
)
from tunesmith.pairs import PairBatches, PairStore
from tunesmith.pretrain_options import PretrainConfig
from tunesmith.prompts import load_prompts
from tunesmith.runlog import Run, new_run_directory, open_log, step_name
from tunesmith.scoring import load_scorer
from tunesmith.tokenizer import Tokenizer
from tunesmith.tokenstore import Form, TokenStore, tokenise
from tunesmith.trainee import AnyConfig, Trainee, alpha_of

Config = TypeVar("Config", SFTConfig, DPOConfig, RewardConfig, PretrainConfig)
Command = Literal["pretrain", "sft", "dpo", "reward"]
LEARNING_RATE: dict[Command, float] = {"pretrain": 6e-4, "sft": 1e-4, "reward": 1e-5, "dpo": 1e-6}
LORA_FACTOR = 10  # adapters want a larger rate than all weights do


# ---- options ---------------------------------------------------------------------------------------------------------


def check_options(config: AnyConfig, more: Sequence[str] = ()) -> None:
    """Raises: UsageError with every problem at once; `more` are those that the command found in its own options."""
    t, o, e, d = config.train, config.optimizer, config.eval, config.data
    at_least = {
        "--data.block_size": (d.block_size, 2), "--data.max_rows": (d.max_rows, 1), "--data.seed": (d.seed, 0),
        "--train.seed": (t.seed, 0), "--train.steps": (t.steps, 1), "--train.diverge_after": (t.diverge_after, 0),
        "--train.batch_size": (t.batch_size, 1), "--train.accumulate": (t.accumulate, 1), "--train.grad_clip": (t.grad_clip, 0),
        "--optimizer.lr": (o.lr, 0), "--optimizer.warmup_steps": (o.warmup_steps, 0),
        "--optimizer.weight_decay": (o.weight_decay, 0), "--eval.every": (e.every, 1), "--eval.iters": (e.iters, 1),
        "--checkpoint.every": (config.checkpoint.every, 1), "--checkpoint.keep": (config.checkpoint.keep, 0),
        "--lora.rank": (config.lora.rank, 0), "--eval.patience": (e.patience, 1), "--eval.samples": (e.samples, 1),
        "--eval.max_new_tokens": (e.max_new_tokens, 1),
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
    shares = {
        "--model.dropout": config.model.dropout,
        "--lora.dropout": config.lora.dropout,
        "--optimizer.momentum": o.momentum,
    }
    problems += [
        f"{name} is {x}, expected 0 <= {name.split('.')[1]} < 1" for name, x in shares.items() if not 0 <= x < 1
    ]
    if o.name == "sgd-nesterov" and o.momentum == 0:
        problems.append("--optimizer.momentum is 0, but sgd-nesterov needs some; use sgd")
    if not 0 < d.holdout < 1:
        problems.append(f"--data.holdout is {d.holdout}, expected a share between 0 and 1")
    if e.reward is None and (e.prompts, e.samples, e.max_new_tokens) != (None, 1, 128):
        problems.append(
            "--eval.prompts, --eval.samples and --eval.max_new_tokens are for --eval.reward, which is not given"
        )
    if config.lora.alpha is not None and not config.lora.alpha > 0:
        problems.append(f"--lora.alpha is {config.lora.alpha:g}, expected more than 0")
    if problems := [*problems, *more]:
        raise UsageError("; ".join(problems))


def check_pair_options(data: PairDataOptions) -> list[str]:
    """What is wrong with the data options of a command that trains on pairs."""
    problems = []
    if data.batching == "windows":
        problems.append("--data.batching windows cuts through dialogues and knows no pairs; use packed or padded")
    if data.truncation == "split":
        problems.append("--data.truncation split is for plain texts; for pairs use keep_end, keep_start or drop")
    return problems


def resolve_machine(config: Config, n_embd: int, command: Command) -> Config:
    """The configuration with every default decided that depends on the machine or on other options."""
    t, o, lora = config.train, config.optimizer, config.lora
    device = resolve_device(t.device)
    train = dataclasses.replace(
        t,
        device=str(device),
        precision=resolve_precision(t.precision, device, n_embd),
        compile=device.type == "cuda" if t.compile == "auto" else t.compile,
        activation_checkpointing=t.activation_checkpointing is True,
    )
    rate = LEARNING_RATE[command] * (LORA_FACTOR if lora.rank else 1)
    optimizer = dataclasses.replace(
        o,
        lr=rate if o.lr is None else o.lr,
        weight_decay=DEFAULT_WEIGHT_DECAY.get(o.name, 0.0) if o.weight_decay is None else o.weight_decay,
    )
    if lora.rank and not isinstance(config, PretrainConfig):
        config = dataclasses.replace(config, lora=dataclasses.replace(lora, alpha=alpha_of(lora)))
    return dataclasses.replace(config, train=train, optimizer=optimizer)


class Countable(Protocol):
    """Batches by number, of which an epoch has a known number of rows."""

    rows_per_epoch: int
    batch_size: int


def resolve_length(config: Config, train: Countable, validation: Countable) -> Config:
    """The configuration with every default decided that depends on the data: steps and intervals.

    Estimates come 40 times over the training, but on small data not so often that they take longer than the training
    itself (a forward pass is a third of a step).
    """
    per_step = config.train.batch_size * config.train.accumulate
    steps = config.train.steps or max(1, round((config.train.epochs or 1.0) * train.rows_per_epoch / per_step))
    estimate = sum(min(config.eval.iters, -(-b.rows_per_epoch // b.batch_size)) for b in (train, validation))
    every = config.eval.every or max(1, steps // 40, min(steps, estimate // (3 * config.train.accumulate)))
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=steps, epochs=None),
        eval=dataclasses.replace(config.eval, every=every),
        checkpoint=dataclasses.replace(config.checkpoint, every=config.checkpoint.every or every),
    )


FIXED = (  # what a resumed run cannot change without becoming another run
    "model.name", "model.dropout", "model.n_layer", "model.n_head", "model.n_embd", "model.block_size",
    "tokenizer.name", "tokenizer.vocab_size", "data.name", "data.block_size", "data.batching", "data.loss_on", "data.truncation",
    "data.max_rows", "data.holdout", "data.seed", "train.batch_size", "train.accumulate", "train.precision",
    "optimizer.name", "lora.rank", "lora.alpha", "lora.dropout", "lora.targets",
    "dpo.beta", "dpo.loss", "dpo.label_smoothing",
)  # fmt: skip


def check_resumable(stored: dict[str, Any], config: AnyConfig) -> None:
    """Raises: UserError naming every setting that differs from the run's and would change what it already did."""
    asked = as_dict(config)
    parts = [(key, *key.split(".")) for key in FIXED]
    pairs = [(key, stored.get(group, {}).get(name), asked.get(group, {}).get(name)) for key, group, name in parts]
    changed = [f"{key} was {before!r}, now {now!r}" for key, before, now in pairs if before != now]
    if changed:
        raise UserError(f"--resume: {'; '.join(changed)}. Keep these, or start a new run with another --out")


def as_dict(config: AnyConfig) -> dict[str, Any]:
    """What config.yaml holds: everything but where the run is written."""
    whole = dataclasses.asdict(config)
    return {key: value for key, value in whole.items() if key not in ("out", "resume")}


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """Training and validation rows. When a data set has no test split, both are parts of one store."""

    train: TokenStore
    train_rows: Sequence[int]
    validation: TokenStore
    validation_rows: Sequence[int]
    notes: list[str]


def load_splits(data: DataOptions, tokenizer: Tokenizer, *, pairs: bool = False, prose: bool = False) -> Splits:
    """Tokenised rows of a data set; with `pairs` the row numbers are those of preference pairs, with `prose` every row is text.

    Raises: UserError for unusable data, or with `data.strict` for any bad row.
    """
    source = open_dataset(data)
    form: Form = "pairs" if pairs else "prose" if prose else "texts" if data.batching == "windows" else "dialogues"
    size = 3 if pairs else 1  # stored rows a row
    train = tokenise(source, "train", tokenizer, form=form)
    notes = [*source.notes, *train.report.notes, *(f"train: {line}" for line in train.report.lines())]
    bad = dict(train.report.bad)
    if "test" in source.files:
        validation = tokenise(source, "test", tokenizer, form=form)
        notes += [*validation.report.notes, *(f"test: {line}" for line in validation.report.lines())]
        bad |= validation.report.bad
        train_rows, validation_rows = np.arange(len(train) // size), np.arange(len(validation) // size)
    else:
        validation = train
        train_rows, validation_rows = holdout_rows(len(train) // size, data.holdout, data.seed)
        notes.append(
            f"no test split: {len(validation_rows):,} of {len(train) // size:,} rows are held out for validation (--data.holdout)"
        )
    if data.strict and bad:
        raise UserError(f"--data.strict: {'; '.join(n for n in notes if 'skipped' in n)}")
    return Splits(train, train_rows.tolist(), validation, validation_rows.tolist(), notes)


def text_batches(splits: Splits, config: SFTConfig | PretrainConfig) -> tuple[Batches, Batches, list[str]]:
    """Training and validation rows as batches, and what had to be cut. Raises: UserError with `data.strict` if anything was."""
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


def pair_batches(splits: Splits, config: DPOConfig | RewardConfig) -> tuple[PairBatches, PairBatches, list[str]]:
    """Training and validation pairs as batches, and what had to be cut. Raises: UserError with `data.strict` if anything was."""
    data = config.data
    shared: dict[str, Any] = {
        "batching": data.batching, "block_size": data.block_size, "batch_size": config.train.batch_size,
        "truncation": data.truncation, "seed": data.seed,
        "steady": bool(config.train.compile) or config.train.precision != "fp32",
    }  # fmt: skip
    train = PairBatches(PairStore(splits.train), splits.train_rows, **shared)
    validation = PairBatches(PairStore(splits.validation), splits.validation_rows, **shared)
    named = (("train", train), ("validation", validation))
    cut = [f"{name}: {line}" for name, batches in named for line in batches.cuts.lines()]
    if data.strict and cut:
        raise UserError(f"--data.strict: {'; '.join(cut)}")
    return train, validation, cut


def describe_pairs(train: PairBatches, validation: PairBatches, iters: int) -> dict[str, Any]:
    """What a run logs of its pairs: how many there are, and what length alone would score on those of an estimate."""
    held = validation.used(iters)
    share = validation.longer_chosen(held)
    print(f"note: in {share:.1%} of the {len(held):,} validation pairs the longer answer is the chosen one")
    return {"train_pairs": len(train), "validation_pairs": len(held), "validation_longer_chosen": share}


# ---- the run ---------------------------------------------------------------------------------------------------------


def begin(config: AnyConfig, command: Command) -> Path:
    """Settle where the run goes, and make the process ready: allocator and seeds. Raises: UserError if `out` is taken."""
    default = f"runs/{command}-{_short(config.model.name)}-{_short(config.data.name)}"
    path = new_run_directory(config.out, default, config.resume)
    keep_freed_memory()
    seed_everything(config.train.seed)
    return path


def _short(name: str) -> str:
    """A name as part of a directory's name."""
    return name.rstrip("/").rsplit("/", 1)[-1].replace(":", "-").partition(".")[0] or "model"


def precision_of(config: AnyConfig) -> Precision:
    """The arithmetic of a resolved configuration."""
    assert config.train.precision != "auto"
    return config.train.precision


B = TypeVar("B", bound=MicroBatch)


def run_training(
    config: AnyConfig,
    path: Path,
    trainee: Trainee,
    device: torch.device,
    *,
    micro_batch: Callable[[int], B],
    loss_sum: Callable[[B], Tensor],
    evaluate: Callable[[], tuple[dict[str, float], Sums]],
    describe_rows: Callable[[Sequence[B]], str],
    counted: str,
    about: str,
    notes: Sequence[str],
    observed: Sequence[str] = (),
    opening: Sequence[tuple[str, dict[str, Any]]] = (),
) -> Run:
    """Say what will be done and do it; the run's status tells how it ended. Arguments as in `fit`.

    about: the data in words. notes: what the user should know before the first step.
    """
    o, t, precision = config.optimizer, config.train, precision_of(config)
    steps, every, save_every, peak = t.steps, config.eval.every, config.checkpoint.every, o.lr
    assert steps is not None and every is not None and save_every is not None and peak is not None  # noqa: PT018
    judge = make_judge(config.eval, trainee, path, device) if config.eval.reward else None
    optimizer = build_optimizer(trainee.model, o.name, lr=peak, weight_decay=o.weight_decay, momentum=o.momentum)
    trained = sum(p.numel() for p in trainee.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainee.model.parameters())
    size = f"{total:,} parameters" + (
        f", {trained:,} of them trained (LoRA rank {config.lora.rank})" if trainee.lora else ""
    )
    with open_log(path) as log:
        log.write_config(as_dict(config))
        log.write_environment(environment(device))
        without_rank = not config.lora.rank and config.lora != LoRAOptions()
        for line in [
            *notes,
            *(["--lora.rank is 0: all weights are trained, other lora options have no effect"] * without_rank),
        ]:
            print(f"note: {line}")
        print(
            f"{path}: {config.model.name}, {size}, {precision} on {describe(device)}; {about}, {steps:,} steps",
            flush=True,
        )
        try:
            fit(
                log=log, model=trainee.model, device=device, write_weights=trainee.write, read_weights=trainee.read,
                optimizer=optimizer, scaler=GradScaler(device.type) if precision == "fp16" else None,
                micro_batch=micro_batch, loss_sum=loss_sum,
                learning_rate=lambda step: peak * schedule_factor(o.schedule, step, steps=steps, warmup_steps=o.warmup_steps),
                evaluate=evaluate, describe_rows=describe_rows, counted=counted, observed=observed, opening=opening,
                judge=judge, steps=steps, accumulate=t.accumulate, max_norm=t.grad_clip,
                eval_every=every, eval_at_start=config.eval.at_start, patience=config.eval.patience, checkpoint_every=save_every,
                keep=config.checkpoint.keep, diverge_after=t.diverge_after, resume=config.resume,
            )  # fmt: skip
        except BaseException as error:
            step = log.run.status.get("step", 0) if (path / "status.json").exists() else 0
            log.status("failed", step, f"{type(error).__name__}: {error}")
            raise
    return Run(path)


def make_judge(
    options: EvalOptions, trainee: Trainee, path: Path, device: torch.device
) -> Callable[[int], dict[str, Any]]:
    """step -> what the `reward` event of that step holds; the answers go to `answers/`.

    Raises: UserError if there is no such reward model or no prompt.
    """
    assert options.reward is not None
    scorer = load_scorer(options.reward, device=str(device), option="--eval.reward")
    prompts = load_prompts(options.prompts, option="--eval.prompts")
    print(f"note: scored by {scorer.description}")

    def judge(step: int) -> dict[str, Any]:
        with torch.compiler.set_stance("force_eager"):  # answers grow token by token: no shape comes twice
            answers = answer_prompts(
                trainee.gpt, trainee.tokenizer, prompts, GenerateOptions(max_new_tokens=options.max_new_tokens),
                scorer=scorer, samples=options.samples,
            )  # fmt: skip
        write_answers(path / "answers" / f"{step_name(step)}.jsonl", answers)
        told = {"scorer": scorer.name, "samples": options.samples}
        return reward_summary(answers, options.samples) | measures(answers) | told

    return judge
