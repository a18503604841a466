"""A training run from resolved options to run directory: where it goes, when what happens in it, what is printed before it begins."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.chosen_template import AUTO, chat_template
from tunesmith.data.mixture import parse_sets
from tunesmith.device import describe, environment, seed_everything, set_allocator
from tunesmith.errors import UsageError
from tunesmith.files.bases import base_at
from tunesmith.files.lock import default_directory, run_directory
from tunesmith.files.run import Run, RunLog, open_log
from tunesmith.options.training import LoRAOptions
from tunesmith.progress import STOP
from tunesmith.train.course import Timetable
from tunesmith.train.launch import make_launcher
from tunesmith.train.loop import fit
from tunesmith.train.methods.method import Method
from tunesmith.train.moved import as_they_lie
from tunesmith.train.optim import schedule_factor
from tunesmith.train.prefetch import made_ahead
from tunesmith.train.resolve import as_dict, batches_of_step, iters_of, passes_of, precision_of
from tunesmith.train.resuming import Origin, as_begun
from tunesmith.train.task import Task
from tunesmith.train.trainee import AnyConfig, Trainee


@contextlib.contextmanager
def begin(config: Any, method: Method) -> Iterator[tuple[Any, Path]]:
    """The configuration (of a resumed run, with what was decided when it began) and the run's directory, now locked for us.

    Sets up the process: allocator and seeds. What a resumed run's options name is looked for where it lies now.
    Raises: UserError if `out` is taken or being written, there is nothing to resume, or the allocator is not available.
    """
    if not set_allocator(config.train.allocator) and config.train.allocator == "lean":
        raise UsageError(
            "--train.allocator lean needs glibc's allocator, which is missing here or left unchanged by "
            "TUNESMITH_ALLOCATOR=system: leave the option out, or unset the variable"
        )
    default = default_directory(method.command, config.model.name, [name for name, _ in parse_sets(config.data.name)])
    with STOP.catching(), run_directory(config.out, default, config.resume) as path:
        seed_everything(config.train.seed)
        if config.resume:
            config = as_begun(as_they_lie(config, Run(path)), Run(path).config)
        base, template = (None, AUTO) if method.new_model else (config.model.base, config.chat.template)
        with base_at(base), chat_template(template):
            yield config, path


def run_training(
    config: AnyConfig, path: Path, trainee: Trainee, device: torch.device, origin: Origin, task: Task
) -> Run:
    """Say what will be done and do it; the run's status says how it ended.

    Args:
        config: every default decided, by `resolve` and the command.
        path: the run's directory, from `begin`.
        origin: what the run is made from.
    """
    launcher = make_launcher(config, trainee.model, task.loss_sum, device)
    timetable = timetable_of(config, task.per_epoch)
    with open_log(path) as log, made_ahead(task.micro_batch, device) as micro_batch:
        log.write_environment(environment(device))
        for line in [*origin.notes, *task.notes, *without_rank(config.lora)]:
            print(f"note: {line}")
        about = opening_line(config, path, trainee, device, timetable, task.about)
        print("\n".join([about, *task.memory]), flush=True)
        with failure_in_status(log):
            fit(
                log,
                dataclasses.replace(task, micro_batch=micro_batch),
                timetable,
                launcher,
                trainee,
                resume=config.resume,
                settle=partial(write_origin, log, origin, config),
            )
    return Run(path)


def timetable_of(config: AnyConfig, per_epoch: int | None) -> Timetable:
    """When what happens in a run of this resolved configuration. per_epoch: micro-batches; None where epochs have no ends."""
    o, t, e = config.optimizer, config.train, config.eval
    steps, peak, warmup_steps = t.steps, o.lr, o.warmup_steps
    assert steps is not None and peak is not None and warmup_steps is not None  # noqa: PT018
    assert e.every is not None and config.checkpoint.every is not None  # noqa: PT018
    return Timetable(
        steps=steps,
        numbers=partial(batches_of_step, accumulate=t.accumulate, per_epoch=per_epoch),
        learning_rate=lambda step: peak * schedule_factor(o.schedule, step, steps=steps, warmup_steps=warmup_steps),
        eval_every=e.every,
        eval_at_start=e.at_start,
        eval_iters=iters_of(config),
        eval_cost=2 * iters_of(config) / passes_of(config),
        checkpoint_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        patience=e.patience,
        diverge_after=t.diverge_after,
    )


def without_rank(lora: LoRAOptions) -> list[str]:
    """A note where options of LoRA are given and nothing is adapted; a pretraining has those that change nothing."""
    idle = not lora.rank and lora != LoRAOptions()
    return ["--lora.rank is 0: all weights are trained, and the other lora options have no effect"] * idle


def opening_line(
    config: AnyConfig, path: Path, trainee: Trainee, device: torch.device, timetable: Timetable, about: str
) -> str:
    """What is trained where, on what and for how long. about: the data in words."""
    parameters, iters = list(trainee.model.parameters()), iters_of(config)
    total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    adapters = f", {trained:,} of them trained (LoRA rank {config.lora.rank})" if trainee.lora else ""
    return (
        f"{path}: {config.model.name}, {total:,} parameters{adapters}, {precision_of(config)} on {describe(device)}; "
        f"{about}, {timetable.steps:,} steps, estimates every {timetable.eval_every:,} on {iters:,} "
        f"{'batch' if iters == 1 else 'batches'} of a split"
    )


@contextlib.contextmanager
def failure_in_status(log: RunLog) -> Iterator[None]:
    """Leave in status.json why the training inside broke off, be it an error or a second signal. Raises: the same."""
    begun = log.path / "status.json"  # a run that fails before the loop begins has none yet
    try:
        yield
    except KeyboardInterrupt as error:
        if begun.exists():
            log.ended_at_once(str(error) or "SIGINT")
        raise
    except BaseException as error:
        step = log.run.status.get("step", 0) if begun.exists() else 0
        log.status("failed", step, f"{type(error).__name__}: {error}")
        raise


def write_origin(log: RunLog, origin: Origin, config: AnyConfig) -> None:
    """Store what the run is made from, and log what was changed where it goes on."""
    log.write_config(origin.config(as_dict(config)))
    log.write_inputs(origin.inputs)
    for change in origin.events():
        log.record("changed", origin.step, **change)
