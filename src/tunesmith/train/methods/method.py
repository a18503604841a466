"""What differs between the ways to train, as one record that commands, plan and study read.

No torch at import, here or in the file of a method: a study reads these records, and so does the command line. What a
method computes imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LossSum = Callable[[Any], "Tensor"]
"""A batch -> its summed loss and what is observed beside it, as `step.optimizer_step` takes it."""


def _nothing(_: Any) -> list[str]:
    return []


def _as_it_is(config: Any) -> Any:
    return config


@dataclass(frozen=True)
class StepWork:
    """What a step of a method computes beside forward and backward of the model that learns.

    copies: sets of weights on the training's device. frozen_passes: forward passes of a frozen model in every micro-batch.
    ahead: in words, what is computed before the first step.
    """

    copies: int = 1
    frozen_passes: int = 0
    ahead: str = ""


@dataclass(frozen=True)
class Method:
    """One way to train. Functions take its own configuration, which is resolved unless they say otherwise.

    command: what the command line calls it. config: the class of its options. title: what a report calls it.
    new_model: it begins with random weights and its own shape; the others begin with a model.
    pairs: it learns from preference pairs, two answers to a prompt; its loss is a mean over pairs, the others' over tokens.
    scored: the model has a score in place of its head.
    check: problems of the options that only it has; the configuration is as given.
    resolve: decides the defaults of those options.
    loss_sum: the loss of a model on its device (a language model, or the reward model around it), as the training has it.
    step_work: what its steps compute besides.
    cheaper: option -> a value with which the same training takes less memory, and how it does.
    """

    command: str
    config: type[Any]
    title: str
    loss_sum: Callable[[Any, Any], LossSum]
    new_model: bool = False
    pairs: bool = False
    scored: bool = False
    check: Callable[[Any], Sequence[str]] = _nothing
    resolve: Callable[[Any], Any] = _as_it_is
    step_work: Callable[[Any], StepWork] = field(default=lambda _: StepWork())
    cheaper: Callable[[Any], Mapping[str, tuple[Any, str]]] = field(default=lambda _: {})
