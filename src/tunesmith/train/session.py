"""A training from its resolved options to its run: where it goes, how a step is taken, what is said before it begins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from tunesmith.data.cutting import block_size_of
from tunesmith.data.mixture import parse_sets
from tunesmith.device import (
    describe,
    environment,
    seed_everything,
    set_allocator,
)
from tunesmith.errors import UsageError
from tunesmith.files.names import base_at
from tunesmith.files.run import Run, RunLog, default_directory, open_log, run_directory
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.training import (
    LoRAOptions,
)
from tunesmith.train.choice import Sums
from tunesmith.train.loop import MicroBatch, Readable, fit
from tunesmith.train.moved import as_they_lie
from tunesmith.train.optim import OneByOne, decides_on_device, schedule_factor
from tunesmith.train.prefetch import made_ahead
from tunesmith.train.recorded import RecordedStep, recorder
from tunesmith.train.resolve import Command, as_dict, precision_of
from tunesmith.train.resuming import Config, Origin, as_begun
from tunesmith.train.splitting import Splitting
from tunesmith.train.step import Seen, Unread, optimizer_step, step_on_device
from tunesmith.train.trainee import AnyConfig, Trainee, make_optimizer


@contextlib.contextmanager
def begin(config: Config, command: Command) -> Iterator[tuple[Config, Path]]:
    """The configuration, of a resumed run with what was decided when it began, and the directory that is now ours alone.

    The process is made ready: allocator and seeds. Of a resumed run what its options name is looked for where it lies now.
    Raises: UserError if `out` is taken or being written, there is nothing to resume, or the allocator cannot be had.
    """
    if not set_allocator(config.train.allocator) and config.train.allocator == "lean":
        raise UsageError(
            "--train.allocator lean is a setting of glibc, which is not here or which TUNESMITH_ALLOCATOR=system keeps as it is: "
            "leave it out, or unset that"
        )
    default = default_directory(command, config.model.name, [name for name, _ in parse_sets(config.data.name)])
    with run_directory(config.out, default, config.resume) as path:
        seed_everything(config.train.seed)
        with base_at(config.model.base if not isinstance(config, PretrainConfig) else None):
            yield as_begun(as_they_lie(config, Run(path)), Run(path).config) if config.resume else config, path


B = TypeVar("B", bound=MicroBatch)


def run_training(
    config: AnyConfig,
    path: Path,
    trainee: Trainee,
    device: torch.device,
    *,
    origin: Origin,
    micro_batch: Callable[[int], B],
    loss_sum: Callable[[B], Tensor],
    evaluate: Callable[[], tuple[dict[str, float], Sums]],
    describe_rows: Callable[[Sequence[B]], str],
    counted: str,
    about: str,
    notes: Sequence[str],
    observed: Sequence[str] = (),
    opening: Sequence[tuple[str, dict[str, Any]]] = (),
    reward_at: Callable[[int], dict[str, Any]] | None = None,
) -> Run:
    """Say what will be done and do it; the run's status tells how it ended. Arguments as in `fit`.

    origin: what the run is made from. about: the data in words. notes: what the user should know before the first step.
    """
    o, t, precision = config.optimizer, config.train, precision_of(config)
    steps, every, save_every, peak = t.steps, config.eval.every, config.checkpoint.every, o.lr
    assert steps is not None and every is not None and save_every is not None and peak is not None  # noqa: PT018
    optimizer = make_optimizer(trainee.model, config)
    scaler = GradScaler(device.type) if precision == "fp16" else None
    take_step, ahead = stepper(config, trainee.model, optimizer, scaler, loss_sum, device)
    trained = sum(p.numel() for p in trainee.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainee.model.parameters())
    size = f"{total:,} parameters" + (
        f", {trained:,} of them trained (LoRA rank {config.lora.rank})" if trainee.lora else ""
    )
    with open_log(path) as log, made_ahead(micro_batch, device) as batch_number:
        log.write_environment(environment(device))
        without_rank = not config.lora.rank and config.lora != LoRAOptions()
        for line in [
            *origin.notes,
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
                log=log, device=device, write_weights=trainee.write, read_weights=trainee.read, optimizer=optimizer, scaler=scaler,
                micro_batch=batch_number, take_step=take_step, ahead=ahead, splitting=splitting_of(config, device),
                learning_rate=lambda step: peak * schedule_factor(o.schedule, step, steps=steps, warmup_steps=o.warmup_steps),
                evaluate=evaluate, describe_rows=describe_rows, counted=counted, observed=observed, opening=opening,
                settle=partial(write_origin, log, origin, config), reward_at=reward_at, steps=steps, accumulate=t.accumulate,
                eval_every=every, eval_at_start=config.eval.at_start, patience=config.eval.patience, checkpoint_every=save_every,
                keep=config.checkpoint.keep, diverge_after=t.diverge_after, resume=config.resume,
            )  # fmt: skip
        except BaseException as error:
            step = log.run.status.get("step", 0) if (path / "status.json").exists() else 0
            log.status("failed", step, f"{type(error).__name__}: {error}")
            raise
    return Run(path)


def write_origin(log: RunLog, origin: Origin, config: AnyConfig) -> None:
    """Store what the run is made from, and log what was changed where it goes on."""
    log.write_config(origin.config(as_dict(config)))
    log.write_inputs(origin.inputs)
    for change in origin.events():
        log.record("changed", origin.step, **change)


READ_LATE_ON = ("cuda",)  # devices that would have nothing to do while the host reads a step's numbers


def stepper(
    config: AnyConfig,
    model: nn.Module,
    optimizer: Optimizer | OneByOne,
    scaler: GradScaler | None,
    loss_sum: Callable[[B], Tensor],
    device: torch.device,
) -> tuple[Callable[[Sequence[B]], Readable], bool]:
    """What takes a step of a resolved configuration, and whether the next one may be launched before it is read."""
    max_norm = config.train.grad_clip

    def plain(micro_batches: Sequence[B]) -> Readable:
        return optimizer_step(model, micro_batches, loss_sum, optimizer, max_norm=max_norm, scaler=scaler)

    if device.type not in READ_LATE_ON or scaler or not decides_on_device(optimizer):
        return plain, False
    assert isinstance(optimizer, Optimizer)
    halted = torch.zeros((), device=device)
    launch: Callable[[Sequence[B]], Seen] = partial(
        step_on_device, model, loss_sum=loss_sum, optimizer=optimizer, max_norm=max_norm, halted=halted
    )
    if config.train.cuda_graphs is True:
        launch = RecordedStep(launch, optimizer, recorder(device), device)
    return lambda micro_batches: Unread(launch(micro_batches)), True


def splitting_of(config: AnyConfig, device: torch.device) -> Splitting:
    """What is done when a micro-batch does not fit, and what would help where that is not enough."""
    t, tuning = config.train, not isinstance(config, PretrainConfig)
    checkpointing = f", activation_checkpointing {str(t.activation_checkpointing).lower()}"
    lora = f", LoRA rank {config.lora.rank}" if tuning and config.lora.rank else ""
    smaller = [f"a {'--data' if tuning else '--model'}.block_size below {block_size_of(config.data):,}"]
    if t.activation_checkpointing is not True:
        smaller.insert(0, "--train.activation_checkpointing true")
    if tuning and not lora:
        smaller.append("--lora.rank 8")
    weights = f" with {t.weights} weights" if t.weights != "fp32" else ""
    allocator = f", allocator {t.allocator}" * (t.allocator != "fast")
    if device.type == "cpu" and not allocator:
        smaller.append("--train.allocator lean")
    setup = (
        f"{config.model.name}{lora}, {precision_of(config)}{weights} on {describe(device)}{checkpointing}{allocator}"
    )
    return Splitting(setup, ", ".join(smaller), t.batch_size, repeatable=not t.optimizer_in_backward)
