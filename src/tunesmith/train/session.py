"""A training run from resolved options to run directory: where it goes, how a step is taken, what is printed before it begins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

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
from tunesmith.files.bases import base_at
from tunesmith.files.lock import default_directory, run_directory
from tunesmith.files.run import Run, RunLog, open_log
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.training import (
    LoRAOptions,
)
from tunesmith.progress import STOP
from tunesmith.train.loop import Readable, fit
from tunesmith.train.method import B, Task
from tunesmith.train.moved import as_they_lie
from tunesmith.train.optim import OneByOne, decides_on_device, schedule_factor
from tunesmith.train.prefetch import made_ahead
from tunesmith.train.recorded import RecordedStep, recorder
from tunesmith.train.resolve import Command, as_dict, batches_of_step, iters_of, passes_of, precision_of
from tunesmith.train.resuming import Config, Origin, as_begun
from tunesmith.train.splitting import Splitting
from tunesmith.train.step import Seen, Unread, optimizer_step, step_on_device
from tunesmith.train.trainee import AnyConfig, Trainee, make_optimizer


@contextlib.contextmanager
def begin(config: Config, command: Command) -> Iterator[tuple[Config, Path]]:
    """The configuration (of a resumed run, with what was decided when it began) and the run's directory, now locked for us.

    Sets up the process: allocator and seeds. What a resumed run's options name is looked for where it lies now.
    Raises: UserError if `out` is taken or being written, there is nothing to resume, or the allocator is not available.
    """
    if not set_allocator(config.train.allocator) and config.train.allocator == "lean":
        raise UsageError(
            "--train.allocator lean needs glibc's allocator, which is missing here or left unchanged by "
            "TUNESMITH_ALLOCATOR=system: leave the option out, or unset the variable"
        )
    default = default_directory(command, config.model.name, [name for name, _ in parse_sets(config.data.name)])
    with STOP.catching(), run_directory(config.out, default, config.resume) as path:
        seed_everything(config.train.seed)
        with base_at(config.model.base if not isinstance(config, PretrainConfig) else None):
            yield as_begun(as_they_lie(config, Run(path)), Run(path).config) if config.resume else config, path


def run_training(
    config: AnyConfig,
    path: Path,
    trainee: Trainee,
    device: torch.device,
    origin: Origin,
    task: Task[B],
) -> Run:
    """Print what will be done and do it; the run's status says how it ended. origin: what the run is made from."""
    o, t, precision = config.optimizer, config.train, precision_of(config)
    steps, every, save_every, peak, warmup = t.steps, config.eval.every, config.checkpoint.every, o.lr, o.warmup_steps
    assert steps is not None and every is not None and save_every is not None  # noqa: PT018
    assert peak is not None and warmup is not None  # noqa: PT018
    numbers = partial(batches_of_step, accumulate=t.accumulate, per_epoch=task.per_epoch)
    optimizer = make_optimizer(trainee.model, config)
    scaler = GradScaler(device.type) if precision == "fp16" else None
    take_step, ahead = stepper(config, trainee.model, optimizer, scaler, task.loss_sum, device)
    trained = sum(p.numel() for p in trainee.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainee.model.parameters())
    size = f"{total:,} parameters" + (
        f", {trained:,} of them trained (LoRA rank {config.lora.rank})" if trainee.lora else ""
    )
    with open_log(path) as log, made_ahead(task.micro_batch, device) as batch_number:
        log.write_environment(environment(device))
        without_rank = not config.lora.rank and config.lora != LoRAOptions()
        for line in [
            *origin.notes,
            *task.notes,
            *(["--lora.rank is 0: all weights are trained, and the other lora options have no effect"] * without_rank),
        ]:
            print(f"note: {line}")
        iters = iters_of(config)
        begins = (
            f"{path}: {config.model.name}, {size}, {precision} on {describe(device)}; {task.about}, {steps:,} steps, "
            f"estimates every {every:,} on {iters:,} {'batch' if iters == 1 else 'batches'} of a split"
        )
        print("\n".join([begins, *task.memory]), flush=True)
        try:
            fit(
                log=log, device=device, write_weights=trainee.write, read_weights=trainee.read, optimizer=optimizer, scaler=scaler,
                micro_batch=batch_number, take_step=take_step, ahead=ahead, splitting=splitting_of(config, device),
                learning_rate=lambda step: peak * schedule_factor(o.schedule, step, steps=steps, warmup_steps=warmup),
                evaluate=task.evaluate, train_loss=task.train_loss, describe_rows=task.describe_rows, counted=task.counted,
                observed=task.observed, opening=task.opening,
                settle=partial(write_origin, log, origin, config), reward_at=task.reward_at, steps=steps, numbers=numbers,
                eval_every=every, eval_at_start=config.eval.at_start,
                eval_cost=2 * iters_of(config) / passes_of(config), patience=config.eval.patience, checkpoint_every=save_every,
                keep=config.checkpoint.keep, diverge_after=t.diverge_after, resume=config.resume,
            )  # fmt: skip
        except KeyboardInterrupt as error:
            if (path / "status.json").exists():
                log.ended_at_once(str(error) or "SIGINT")
            raise
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
