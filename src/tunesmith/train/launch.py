"""How a step of a configuration is given to the device, and when the host may read what it saw.

On a GPU the host reads a step after it has launched the next one, so that the device never waits: what such a step saw
stays on the device until then, and so does the decision whether it moves the weights (`step.step_on_device`). Elsewhere, and
where the host must decide, a step is over before the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from tunesmith.data.batch import Batch
from tunesmith.data.cutting import block_size_of
from tunesmith.device import describe
from tunesmith.options.configs import AnyConfig, precision_of
from tunesmith.train.clock import Mark, mark
from tunesmith.train.halving import Halved, Halving, step_in_memory
from tunesmith.train.methods.table import method_of
from tunesmith.train.optim import OneByOne, decides_on_device, set_learning_rate
from tunesmith.train.step import DeviceStats, StepStats, Unread, optimizer_step, step_on_device
from tunesmith.train.step_graph import RecordedStep, recorder
from tunesmith.train.task import LossSum
from tunesmith.train.trainee import make_optimizer

READ_LATE_ON = ("cuda",)  # devices that would have nothing to do while the host reads a step's numbers


Readable = StepStats | Unread
"""A step that was launched; `read` waits for it where the device is still at it."""


@dataclass(frozen=True)
class Launched:
    """A step that the device was given and that the host has not looked at yet. number: from 1.

    began: the end of the step before where the device went on to this one at once, else the moment of the launch.
    """

    number: int
    batches: Sequence[Batch]
    lr: float
    began: Mark
    ended: Mark
    result: Readable


@dataclass(frozen=True)
class Launcher:
    """What takes the steps of a training.

    take_step: micro-batches -> `step.optimizer_step` of them, or a step that is read later.
    ahead: a step may be launched before the one before it is read. What is logged, saved and decided stays the same, because
        `take_step` then leaves the weights alone after a step that was not finite.
    halving: what to do with a micro-batch that does not fit into memory.
    """

    device: torch.device
    optimizer: Optimizer | OneByOne
    scaler: GradScaler | None
    take_step: Callable[[Sequence[Batch]], Readable]
    ahead: bool
    halving: Halving

    def now(self) -> Mark:
        """The moment at which the steps launched so far are over: a step that is read at once is, for the host."""
        return mark(self.device if self.ahead else torch.device("cpu"))

    def launch(
        self, number: int, batches: Sequence[Batch], lr: float, began: Mark, on_halved: Callable[[Halved], None]
    ) -> Launched:
        """Take a step, or put it behind those that the device is still at. Raises: as `halving.step_in_memory`."""
        set_learning_rate(self.optimizer, lr)
        result = step_in_memory(batches, self.take_step, self.optimizer, self.halving, on_halved, self.device)
        return Launched(number, batches, lr, began, self.now(), result)


def make_launcher(config: AnyConfig, model: nn.Module, loss_sum: LossSum, device: torch.device) -> Launcher:
    """The launcher of a resolved configuration, its optimizer's state made. Raises: as `trainee.make_optimizer`."""
    optimizer = make_optimizer(model, config)
    scaler = GradScaler(device.type) if precision_of(config) == "fp16" else None
    halving, max_norm = halving_of(config, device), config.train.grad_clip
    if device.type not in READ_LATE_ON or scaler or not decides_on_device(optimizer):
        at_once = partial(
            optimizer_step, model, loss_sum=loss_sum, optimizer=optimizer, max_norm=max_norm, scaler=scaler
        )
        return Launcher(device, optimizer, scaler, at_once, False, halving)
    assert isinstance(optimizer, Optimizer)
    halted = torch.zeros((), device=device)  # one for the whole run: what was launched after a bad step must see it
    step: Callable[[Sequence[Batch]], DeviceStats] = partial(
        step_on_device, model, loss_sum=loss_sum, optimizer=optimizer, max_norm=max_norm, halted=halted
    )
    if config.train.cuda_graphs is True:
        step = RecordedStep(step, optimizer, recorder(device), device)
    return Launcher(device, optimizer, scaler, lambda micro_batches: Unread(step(micro_batches)), True, halving)


def halving_of(config: AnyConfig, device: torch.device) -> Halving:
    """What is done when a micro-batch does not fit, and what would help where that is not enough."""
    t, new_model = config.train, method_of(config).new_model
    lora = f", LoRA rank {config.lora.rank}" if config.lora.rank else ""
    weights = f" with {t.weights} weights" if t.weights != "fp32" else ""
    allocator = f", allocator {t.allocator}" * (t.allocator != "fast")
    ways = {
        "--train.activation_checkpointing true": t.activation_checkpointing is not True,
        f"a {'--model' if new_model else '--data'}.block_size below {block_size_of(config.data):,}": True,
        "--lora.rank 8": not (new_model or lora),
        "--train.allocator lean": device.type == "cpu" and not allocator,
    }
    setup = (
        f"{config.model.name}{lora}, {precision_of(config)}{weights} on {describe(device)}, "
        f"activation_checkpointing {str(t.activation_checkpointing).lower()}{allocator}"
    )
    smaller = ", ".join(way for way, helps in ways.items() if helps)
    return Halving(setup, smaller, t.batch_size, repeatable=not t.optimizer_in_backward)
