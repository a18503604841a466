"""Options of `tunesmith plan`: those of the training command, and those of the plan itself. No torch here."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlanOptions:
    """Memory and time of a training run, before running it. No data is read, no weights are loaded."""

    device: str = "auto"
    """auto, cpu, cuda: this machine, timed by a probe; or a card, from its data sheet: p100, v100, t4, l4, rtx3090, rtx4090, a100, h100,
    h200."""
    fit: str | None = None
    """Available memory, such as 16GB, or `device`: find the fastest setting that fits and gives the same result."""
    fit_inexact: bool = False
    """With fit: also try settings that change the result slightly: bf16 weights, 8-bit optimizer state, no clipping."""
    text_tokens: int = 170
    """Mean tokens per dialogue, or per pair with preference pairs, as `tunesmith data` reports."""
    supervised: float = 0.5
    """Share of the tokens that carry loss, as `tunesmith data` reports; with loss on all tokens it is 1."""
    out: str | None = None
    """Also write the plan to this JSON file."""


def plan_options(training: type[Any]) -> type[Any]:
    """The options of a training command and those of its plan, in one class."""
    title = f"Memory and time before running it; no data is read, no weights are loaded: {training.__doc__}"
    named = {"__module__": training.__module__, "__doc__": title}  # where the names in its annotations are known
    return dataclasses.make_dataclass(
        f"Plan{training.__name__}", (), bases=(PlanOptions, training), namespace=named, frozen=True
    )
