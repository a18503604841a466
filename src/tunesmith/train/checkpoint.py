"""Checkpoints: a model directory plus everything needed to go on bit for bit, written all at once or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from tunesmith.errors import UserError
from tunesmith.files.run import Run, step_name
from tunesmith.files.weights import write_safetensors
from tunesmith.jsontext import json_object
from tunesmith.train.optim import OneByOne, state_parts, whole_state

STATE = "training_state"


def save_checkpoint(
    run: Run,
    step: int,
    write_weights: Callable[[Path], None],
    optimizer: Optimizer | OneByOne,
    progress: dict[str, Any],
    scaler: GradScaler | None,
) -> Path:
    """Write `checkpoints/step-XXXXXXXX`: what `write_weights` puts into a directory, and `training_state/`.

    The directory is written under another name, flushed to disk and renamed, so that a process killed at any moment
    leaves either no checkpoint of this step or a whole one.

    progress: JSON-able position in the data, best step and so on; comes back from `load_state`.
    Raises: OSError (disk full, read-only, ...); nothing half-written stays behind.
    """
    root = run.path / "checkpoints"
    aside, final = root / f".writing-{step_name(step)}", root / step_name(step)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write_weights(aside)
        (aside / STATE).mkdir()
        tensors, scalars = _flatten(optimizer) if step else ({}, {})  # before the first step it is all zeros
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        write_safetensors(tensors, aside / STATE / "optimizer.safetensors")
        state = {"step": step, "optimizer": scalars, "scaler": scaler.state_dict() if scaler else None, **progress}
        (aside / STATE / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in aside.rglob("*"):
            _flush(path)
        _remove(final)
        aside.rename(final)
        _flush(root)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def stored_state(directory: Path) -> dict[str, Any]:
    """What a checkpoint says of its training beside the tensors. Raises: OSError, ValueError."""
    return json_object(directory / STATE / "state.json")


def load_state(
    directory: Path, read_weights: Callable[[Path], None], optimizer: Optimizer | OneByOne, scaler: GradScaler | None
) -> dict[str, Any]:
    """Put weights, optimizer, random state and loss scale back as they were; returns the step and `progress`.

    Raises: UserError naming the file that is missing or broken.
    """
    try:
        state = stored_state(directory)
        tensors = load_file(directory / STATE / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{directory} cannot be resumed from ({error}); delete it to continue from the previous checkpoint"
        ) from None
    read_weights(directory)
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    _restore(optimizer, tensors, state.pop("optimizer"))
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return state


def _flatten(optimizer: Optimizer | OneByOne) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for number, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            for key, part in state_parts(value).items() if isinstance(value, Tensor) else ():
                tensors[f"{number}.{name}{key}"] = part.detach().cpu().contiguous()
            if not isinstance(value, Tensor):
                scalars.setdefault(str(number), {})[name] = value
    return tensors, scalars


def _restore(
    optimizer: Optimizer | OneByOne, tensors: Mapping[str, Tensor], scalars: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put state back in the very type it had: torch's own loading would round it to that of a bf16 parameter."""
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    by_place: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        which, name, *part = key.split(".")
        by_place.setdefault((int(which), name), {})[f".{part[0]}" if part else ""] = tensor
    for (number, name), parts in by_place.items():
        p, group = parameters[number]
        stays = name == "step" and not group.get("fused")
        moved = {key: tensor if stays else tensor.to(p.device) for key, tensor in parts.items()}
        optimizer.state.setdefault(p, {})[name] = whole_state(moved)
    for which, values in scalars.items():
        optimizer.state.setdefault(parameters[int(which)][0], {}).update(values)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(run: Run, keep: int, best: Collection[int | None]) -> None:
    """Remove all but the last `keep` checkpoints and the best ones, and what a killed process left unfinished.

    The newest stays whatever `keep` is: a run that stops goes on from it.
    """
    checkpoints = run.checkpoints()
    last = {step for step, _ in checkpoints[-max(keep, 1) :]}
    for step, path in checkpoints:
        if step not in last and step not in best:
            _remove(path)
    for unfinished in (run.path / "checkpoints").glob(".*-step-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint under another name, so that a process killed midway leaves nothing that looks like one."""
    aside = path.with_name(f".removing-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
