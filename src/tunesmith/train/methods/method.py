"""What differs between the ways to train, as one record that commands, plan and study read.

No torch at import, here or in the file of a method: a study reads these records, and so does the command line. What a
method computes imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.models.family import Config
    from tunesmith.train.splits import Data
    from tunesmith.train.task import LossSum, Prepared, Task
    from tunesmith.train.trainee import Trainee


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
    """One way to train. Its functions take its own configuration, resolved unless they say otherwise.

    command: what the command line calls it. config: the class of its options. title: what a report calls it.
    learning_rate: the peak with which all weights are trained where none is given. warmup: steps, where none are given; a
        tenth of a run that is no longer than that.
    loss_sum: the loss of a model on its device (a language model, or the reward model around it), as the training has it and a plan
        times it.
    task: the run as the loop reads it: its loss, its estimates, its words.
    pairs: it learns from preference pairs, two answers to a prompt; its loss is a mean over pairs, the others' over tokens.
    scored: the model has a score in place of its head.
    observed: names of what `loss_sum` gives beside the loss.
    held_to_start: what the model was at the start matters to every step, so a resumed run must find the same weights.
    new_shape: of a new model: the configuration as given -> with the shape's numbers, and the shape. None: a run begins
        with a model that there is.
    check: problems of the options that only it has; the configuration is as given, with the shape's numbers.
    resolve: decides the defaults of those options.
    data: what it trains on; None: the rows of data.name, whole.
    step_work: what its steps compute besides.
    cheaper: option -> a value with which the same training takes less memory, and how it does.
    """

    command: str
    config: type[Any]
    title: str
    learning_rate: float
    loss_sum: Callable[[Any, Any], LossSum]
    task: Callable[[Prepared], Task]
    pairs: bool = False
    scored: bool = False
    observed: tuple[str, ...] = ()
    held_to_start: bool = False
    warmup: int = 0
    new_shape: Callable[[Any], tuple[Any, Config]] | None = None
    check: Callable[[Any], Sequence[str]] = lambda config: ()
    resolve: Callable[[Any], Any] = lambda config: config
    data: Callable[[Any, Trainee], Data] | None = None
    step_work: Callable[[Any], StepWork] = lambda config: StepWork()
    cheaper: Callable[[Any], Mapping[str, tuple[Any, str]]] = lambda config: {}

    @property
    def new_model(self) -> bool:
        """Whether it begins with random weights and a shape of its own."""
        return self.new_shape is not None

    @property
    def counted(self) -> str:
        """What the log calls the number of examples that the loss is a mean over."""
        return "pairs" if self.pairs else "target_tokens"
