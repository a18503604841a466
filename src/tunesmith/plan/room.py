"""Before the first step: the memory that this training will need and what is available, with settings that fit if it does not."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch

from tunesmith.data.epochs import Batches
from tunesmith.device import available_memory, resident_memory
from tunesmith.errors import UsageError
from tunesmith.models.family import Config
from tunesmith.options.configs import AnyConfig, with_options
from tunesmith.plan.cards import CONTEXT
from tunesmith.plan.planning import Place, as_options, candidates, fastest_that_fits, is_exact, make_setting
from tunesmith.plan.workload import Rows

COMPILER_MODULES = 70e6  # bytes of torch._dynamo, which torch's optimizers load with their first use


def memory_lines(config: AnyConfig, shape: Config, train: Batches[Any]) -> list[str]:
    """What to say about memory before a training starts; nothing if the device does not report what is available.

    config: resolved; train: the batches that it trains on. Called when the weights are on the device and the data are read:
    what the process has already counts as its own, whatever it is for.
    """
    place = _place(torch.device(config.train.device))
    if place is None:
        return []
    if train.per_epoch is not None:  # a step takes no more rows than there are
        rows = min(config.train.batch_size, train.rows_per_epoch)
        config = with_options(config, {"train.batch_size": rows})
    try:
        asked = make_setting(config, shape, Rows(), place, {})
    except UsageError as error:
        return [f"memory: no prediction, because it is not counted for {error}"]
    if place.cpu:  # the weights are in memory already, and are counted
        place = dataclasses.replace(place, base=max(0.0, place.base - asked.memory.parameters))
        asked = dataclasses.replace(asked, place=place)
    words = f"memory: about {_gb(asked.total)} predicted, {_gb(place.memory)} available"
    if asked.total <= place.memory:
        return [words]
    every = candidates(asked, inexact=True)
    if fitting := fastest_that_fits(every, place.memory):
        return [
            f"warning: {words}, so it may not fit. It does with {as_options(fitting.changes)} ({_gb(fitting.total)}"
            f"{'' if is_exact(fitting.changes) else ', with a slightly different result'}); tunesmith plan --fit shows what that costs"
        ]
    least = min(every, key=lambda s: s.total)
    return [
        f"warning: {words}, so it may not fit, and neither does the leanest setting ({as_options(least.changes)}, {_gb(least.total)}): "
        + (
            "lower --model.block_size, or choose a smaller shape"
            if asked.method.new_model
            else "lower --data.block_size, train adapters (--lora.rank), or choose a smaller model"
        )
    ]


def _place(device: torch.device) -> Place | None:
    """The device as a plan knows it, `memory` with what this process holds; None where it does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return Place(str(device), None, False, CONTEXT + free + torch.cuda.memory_reserved(device), CONTEXT)
    available = available_memory() if device.type == "cpu" else None
    if available is None:
        return None
    resident = resident_memory()
    to_come = COMPILER_MODULES if "torch._dynamo" not in sys.modules else 0.0
    return Place(str(device), None, True, available + resident, resident + to_come)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
