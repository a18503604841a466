"""The options of a training, checked and decided: what is wrong with them, and what every default means on this machine and data."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Sequence
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any, Literal, TypeVar

import torch

from tunesmith.data.cutting import block_size_of, resolve_block_size
from tunesmith.data.epochs import Batches
from tunesmith.device import Precision, resolve_compile, resolve_device, resolve_precision
from tunesmith.errors import UsageError, note
from tunesmith.options.configs import AnyConfig, with_options
from tunesmith.options.parse import describe_type, nearest_choice, option_types, parts_of
from tunesmith.train.optim import DEFAULT_WEIGHT_DECAY

Config = TypeVar("Config", bound=AnyConfig)
LORA_FACTOR = 10  # adapters want a larger rate than all weights do


AT_LEAST = {
    "data": {"block_size": 2, "max_rows": 1, "seed": 0, "split_seed": 0},
    "train": {"seed": 0, "steps": 1, "diverge_after": 0, "batch_size": 1, "accumulate": 1, "grad_clip": 0},
    "optimizer": {"lr": 0, "warmup_steps": 0, "weight_decay": 0},
    "eval": {"every": 1, "iters": 1, "patience": 1, "samples": 1, "max_new_tokens": 1},
    "checkpoint": {"every": 1, "keep": 0},
    "lora": {"rank": 0},
}
"""Options that are numbers -> their smallest value."""


def check_options(config: Config, of_method: Sequence[str] = ()) -> Config:
    """The configuration as `check_types` gives it.

    Raises: UsageError with every problem at once; `of_method` are those of the method's own options.
    """
    config = check_types(config)
    t, o, e, d = config.train, config.optimizer, config.eval, config.data
    problems = _too_small(config)
    if t.steps is not None and t.epochs is not None:
        problems.append("give --train.steps or --train.epochs, not both")
    if t.seed >= 2**64:
        problems.append(f"--train.seed is {t.seed}, expected less than 2**64")
    if t.epochs is not None and t.epochs <= 0:
        problems.append(f"--train.epochs is {t.epochs}, expected of_method than 0")
    shares = {
        "--model.dropout": config.model.dropout,
        "--lora.dropout": config.lora.dropout,
        "--optimizer.momentum": o.momentum,
    }
    problems += [
        f"{name} is {x}, expected 0 <= {name.split('.')[1]} < 1" for name, x in shares.items() if not 0 <= x < 1
    ]
    if o.name == "sgd-nesterov" and o.momentum == 0:
        problems.append("--optimizer.momentum is 0, but sgd-nesterov needs momentum; use sgd")
    if not 0 < d.holdout < 1:
        problems.append(f"--data.holdout is {d.holdout}, expected a share between 0 and 1")
    if t.optimizer_in_backward and (t.accumulate > 1 or t.grad_clip > 0):
        problems.append(
            "--train.optimizer_in_backward updates weights before the whole gradient is known: it needs "
            f"--train.accumulate 1 and --train.grad_clip 0 (now {t.accumulate} and {t.grad_clip:g})"
        )
    if e.reward is None and (e.prompts, e.samples, e.max_new_tokens) != (None, 1, 128):
        problems.append(
            "--eval.prompts, --eval.samples and --eval.max_new_tokens are for --eval.reward, which is not given"
        )
    problems += _without_effect(config)
    if config.resume_changes == "accept" and not config.resume:
        problems.append(
            "--resume_changes accept is for a resumed run: give --resume, and the run's directory with --out"
        )
    if problems := [*problems, *of_method]:
        raise UsageError("; ".join(problems))
    return config


def _too_small(config: Config) -> list[str]:
    """What is wrong with single numbers; what is not given, or "auto", is not."""
    problems = []
    for group, options in AT_LEAST.items():
        for name, low in options.items():
            value = getattr(getattr(config, group), name)
            if isinstance(value, int | float) and value < low:
                problems.append(f"--{group}.{name} is {value}, expected at least {low}")
    return problems


def check_types(config: Config) -> Config:
    """The configuration with Python's own numbers and texts for those of numpy and paths, as its files hold them.

    The command line and files are checked where they are read; Python passes anything.
    Raises: UsageError naming every option whose value is of another type than the option, or a float that is not finite.
    """
    problems = []
    for name, kind in option_types(type(config)).items():
        value = functools.reduce(getattr, name.split("."), config)
        if not any(_is_of(value, part) for part in parts_of(kind)):
            problems.append(f"--{name} is {value!r}, expected {describe_type(kind)}{nearest_choice(kind, value)}")
    if problems:
        raise UsageError("; ".join(problems))
    plain: Config = _plain(config)
    return plain


def _plain(value: Any) -> Any:
    """A value of an option, or options, in the types that YAML and JSON know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, bool | int) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _is_of(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, str | PathLike if kind is str else kind)


EPSILON = 1e-8  # of Adam and AdamW: beside it smaller gradients count for nothing
SMALLEST_CHANGE = 1e-12  # rates below it change no weight in float32
LORA_SCALES = (1e-4, 1e4)  # alpha / rank: the gradient of the adapters is proportional to it


def _without_effect(config: AnyConfig) -> list[str]:
    """Settings with which a training would run and learn nothing, or nothing but rounding."""
    o, t, lora, problems = config.optimizer, config.train, config.lora, []
    if o.lr is not None and 0 < o.lr < SMALLEST_CHANGE:
        problems.append(
            f"--optimizer.lr is {o.lr:g}: no weight in float32 changes by so little; for none to change give 0"
        )
    if 0 < t.grad_clip < EPSILON:
        problems.append(
            f"--train.grad_clip is {t.grad_clip:g}: a gradient clipped to that is lost in rounding; 0 = no clipping"
        )
    if lora.alpha is not None and not lora.alpha > 0:
        problems.append(f"--lora.alpha is {lora.alpha:g}, expected more than 0")
    elif lora.alpha is not None and lora.rank and not LORA_SCALES[0] <= lora.alpha / lora.rank <= LORA_SCALES[1]:
        problems.append(
            f"--lora.alpha is {lora.alpha:g} at --lora.rank {lora.rank}: what adapters add is scaled by alpha / rank, here "
            f"{lora.alpha / lora.rank:g}, and would not be learned; usual is 2"
        )
    return problems


def resolve_data(config: Config, positions: int) -> Config:
    """The configuration with the block size decided for a model that can read `positions` tokens."""
    block_size = resolve_block_size(config.data.block_size, positions, config.model.name)
    return with_options(config, {"data.block_size": block_size})


def resolve_machine(config: Config, width: int, learning_rate: float) -> Config:
    """The configuration, its data resolved, with every default decided that depends on the machine or on other options.

    learning_rate: the method's, for all weights.
    """
    t, o, lora = config.train, config.optimizer, config.lora
    device = resolve_device(t.device)
    precision = resolve_precision(t.precision, device, width)
    if precision == "fp16" and (t.optimizer_in_backward or t.weights == "bf16"):
        raise UsageError(
            "--train.precision fp16 scales the loss and may have to skip an update, which works with neither "
            "--train.optimizer_in_backward nor --train.weights bf16; use bf16 or fp32"
        )
    if t.allocator == "lean" and device.type != "cpu":
        raise UsageError(
            f"--train.allocator lean is for a CPU's memory; on {device} torch has its own allocator: leave it out"
        )
    rate, decay = learning_rate * (LORA_FACTOR if lora.rank else 1), DEFAULT_WEIGHT_DECAY.get(o.name, 0.0)
    decided = {
        "train.device": str(device),
        "train.precision": precision,
        "train.compile": resolve_compile(t.compile, device),
        "train.cuda_graphs": resolve_cuda_graphs(config, device, precision),
        "train.activation_checkpointing": False if t.activation_checkpointing == "auto" else t.activation_checkpointing,
        "optimizer.lr": rate if o.lr is None else o.lr,
        "optimizer.weight_decay": decay if o.weight_decay is None else o.weight_decay,
    }
    return with_options(config, decided | ({"lora.alpha": lora.alpha_or_default} if lora.rank else {}))


RECORDS_ON = ("cuda",)
SMALL_BATCH = 8192  # tokens in a micro-batch up to which launching kernels is taken to hold a card up; not measured


def resolve_cuda_graphs(config: AnyConfig, device: torch.device, precision: Precision) -> bool:
    """Whether steps are recorded and replayed; auto: where they can be and a batch is small.

    Raises: UsageError where it was asked for and cannot be, with all reasons.
    """
    t, d = config.train, config.data
    changing, moving = d.batching != "windows", t.weights == "bf16" and not config.lora.rank
    again = t.activation_checkpointing is True
    against = {
        f"--train.device is {device}, and graphs need a CUDA device": device.type not in RECORDS_ON,
        f"--data.batching {d.batching} changes lengths and counts from step to step (windows does not)": changing,
        "--train.precision fp16 has the host check its loss scale": precision == "fp16",
        "--train.optimizer_in_backward decides on the host, before backward": t.optimizer_in_backward,
        "--train.weights bf16 moves the optimizer's state to new memory at every update": moving,
        "--optimizer.name adamw8bit cannot skip an update by itself": config.optimizer.name == "adamw8bit",
        "--train.activation_checkpointing true reads the random state inside the step": again,
    }
    reasons = [reason for reason, holds in against.items() if holds]
    if t.cuda_graphs is True and reasons:
        raise UsageError(f"--train.cuda_graphs true: {'; '.join(reasons)}. Use false, or auto")
    return not reasons and (
        t.cuda_graphs is True or (t.cuda_graphs == "auto" and t.batch_size * block_size_of(d) <= SMALL_BATCH)
    )


def batches_of_step(step: int, accumulate: int, per_epoch: int | None) -> range:
    """The numbers of a step's micro-batches. step: from 1. An epoch's last step takes what is left of it.

    >>> [list(batches_of_step(step, 2, 3)) for step in (1, 2, 3)]
    [[0, 1], [2], [3, 4]]
    """
    if per_epoch is None:
        return range((step - 1) * accumulate, step * accumulate)
    epoch, number = divmod(step - 1, -(-per_epoch // accumulate))
    first = epoch * per_epoch + number * accumulate
    return range(first, min(first + accumulate, (epoch + 1) * per_epoch))


def steps_of(epochs: float, train: Batches[Any], accumulate: int) -> int:
    """Steps in so many epochs, a part of one rounded up. Of windows, an epoch is as many as the stream has blocks."""
    whole = 0 if train.per_epoch is None else int(epochs)
    rest = (epochs - whole) * train.rows_per_epoch / (train.batch_size * accumulate)
    return whole * -(-(train.per_epoch or 0) // accumulate) + math.ceil(rest - 1e-9)


def resolve_length(config: Config, train: Batches[Any], validation: Batches[Any], *, warmup: int = 0) -> Config:
    """The configuration with every default decided that depends on the data: steps and intervals.

    Estimates come 40 times over the training, but on small data not so often that with the most batches they would take
    longer than the training itself (a forward pass is a third of a step).
    """
    t, o = config.train, config.optimizer
    per_step = t.batch_size * t.accumulate
    if per_step > train.rows_per_epoch:
        note(_more_than_there_is(per_step, train, t.accumulate, config.data.block_size))
    steps = t.steps or max(1, steps_of(1.0 if t.epochs is None else t.epochs, train, t.accumulate))
    if o.warmup_steps is not None:
        warmup = o.warmup_steps
    elif steps <= warmup:
        warmup = steps // 10
    splits = [-(-b.rows_per_epoch // b.batch_size) for b in (train, validation)]
    estimate = sum(min(config.eval.iters or MOST_ITERS, batches) for batches in splits)
    every = config.eval.every or max(1, steps // 40, min(steps, estimate // (3 * config.train.accumulate)))
    iters = config.eval.iters or default_iters(config, steps, every, splits)
    decided = {"train.steps": steps, "train.epochs": None, "optimizer.warmup_steps": warmup}
    decided |= {"eval.every": every, "eval.iters": iters, "checkpoint.every": config.checkpoint.every or every}
    config = with_options(config, decided)
    if not config.resume:  # of an older run it may be; a change of it is checked when the run is compared
        check_warmup(config)
    return config


def check_warmup(config: AnyConfig) -> None:
    """Raises: UsageError if a resolved configuration warms up for longer than it trains."""
    warmup, steps = config.optimizer.warmup_steps or 0, config.train.steps or 0
    if warmup > steps:
        raise UsageError(
            f"--optimizer.warmup_steps {warmup:,} is more than the training's {steps:,} steps, so the rate would never reach "
            f"--optimizer.lr: lower it (a tenth of the steps is {max(1, steps // 10):,}), or train longer"
        )


MOST_ITERS = 200  # batches of a split in an estimate, where eval.iters is left out
ESTIMATES_SHARE = 1 / 5  # of the time that the steps take


def default_iters(config: AnyConfig, steps: int, every: int, splits: Sequence[int]) -> int:
    """Batches of each split in an estimate, so that all estimates together stay under a fifth of the steps' time; 1 to 200.

    Counted in forward passes, not measured, so that a resumed run and another machine estimate on the same rows: a batch of
    a step is three, with LoRA two (`passes_of`). Not counted: eval.reward, DPO's sft_data, a reference
    computed in every step.

    splits: how many batches each has.
    """
    room = ESTIMATES_SHARE * steps * passes_of(config) / (config.eval.at_start + -(-steps // every))
    most = min(MOST_ITERS, max(splits))
    return max((n for n in range(1, most + 1) if sum(min(n, batches) for batches in splits) <= room), default=1)


def passes_of(config: AnyConfig) -> int:
    """What a step takes, in forward passes over a micro-batch: backward is two more, with frozen weights about one."""
    return config.train.accumulate * (2 if config.lora.rank else 3)


def _more_than_there_is(per_step: int, train: Batches[Any], accumulate: int, block_size: Any) -> str:
    """What becomes of a step that is larger than the data."""
    smaller = "--train.accumulate or --train.batch_size" if accumulate > 1 else "--train.batch_size"
    asked = f"a step takes {per_step:,} rows of {block_size} tokens, but the data fill only {train.rows_per_epoch:,}"
    if train.per_epoch is None:
        return f"{asked}: every step reads them about {per_step / train.rows_per_epoch:.3g} times; lower {smaller} to read them once"
    return (
        f"{asked}: every step uses all of them, each once, and is an epoch; lower {smaller} to get more steps per epoch"
    )


def as_dict(config: AnyConfig) -> dict[str, Any]:
    """What config.yaml holds: the groups of options. Outside them stands only where the run is written and whether it goes on."""
    return {key: value for key, value in dataclasses.asdict(config).items() if isinstance(value, dict)}
