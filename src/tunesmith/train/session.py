"""A training run in its directory: what is printed before it begins, and what its files say of how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from tunesmith.device import describe, environment
from tunesmith.files.run import Run, RunLog, open_log
from tunesmith.options.configs import AnyConfig, iters_of, precision_of
from tunesmith.train.course import Timetable, timetable_of
from tunesmith.train.launch import make_launcher
from tunesmith.train.loop import fit
from tunesmith.train.prefetch import made_ahead
from tunesmith.train.resolve import as_dict
from tunesmith.train.resuming import Origin
from tunesmith.train.task import Task
from tunesmith.train.trainee import Trainee


def run_training(
    config: AnyConfig, path: Path, trainee: Trainee, device: torch.device, origin: Origin, task: Task
) -> Run:
    """Say what will be done and do it; the run's status says how it ended.

    Args:
        config: every default decided, by `resolve` and the command.
        path: the run's directory, locked for this process.
        origin: what the run is made from.
    """
    launcher = make_launcher(config, trainee.model, task.loss_sum, device)
    timetable = timetable_of(config, task.per_epoch)
    with open_log(path) as log, made_ahead(task.micro_batch, device) as micro_batch:
        log.write_environment(environment(device))
        notes = [*origin.notes, *task.notes]
        if not config.lora.rank and config.lora != type(config.lora)():
            notes.append("--lora.rank is 0: all weights are trained, and the other lora options have no effect")
        for line in notes:
            print(f"note: {line}")
        about = opening_line(config, path, trainee, device, timetable, task.about)
        print("\n".join([about, *task.memory]), flush=True)
        with failure_in_status(log):
            task = dataclasses.replace(task, micro_batch=micro_batch)
            settle = partial(write_origin, log, origin, config)
            fit(log, task, timetable, launcher, trainee, resume=config.resume, settle=settle)
    return Run(path)


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
