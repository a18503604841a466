"""A training step recorded as a CUDA graph and replayed: the host launches one thing a step and not a thousand kernels.

Worth it where a batch is so small that the device waits for its kernels, as at the paper's batch of 1 x 1,024 tokens.
A recording is kernels with the addresses and host numbers that they were launched with. So everything that changes
from step to step lies on the device at an address that stays: inputs are copied into the recording's own, the learning
rate is a tensor, and whether to update is decided there (`step.step_on_device`). What a step takes from the host beside
that (shapes, counts) is its signature, and a recording is for one signature.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tunesmith.capture import capture, reason_of
from tunesmith.data.batch import Batch
from tunesmith.train.step import DeviceStats

Record = Callable[[Callable[[], DeviceStats]], Callable[[], DeviceStats]]
"""Work that is recorded, not done -> what does it once more on the same memory, at every call."""

WARM_UP = 3  # plain steps of one signature before it is recorded: by then kernels are chosen, compiled and loaded


@dataclass(frozen=True)
class Recording:
    """What is replayed. inputs: the micro-batches that it reads."""

    signature: object
    inputs: Sequence[Batch]
    replay: Callable[[], DeviceStats]


class RecordedStep:
    """`step`, recorded when WARM_UP steps in a row had one signature, and replayed for batches of that signature.

    Every step is a training step, those of the warm-up too. A step with another signature is done plainly; if WARM_UP
    of them follow each other, they are recorded in place of the former. Where recording fails nothing has been done by
    it: one line says so, and all steps are plain from then on.

    Args:
        step: micro-batches without nested tensors -> what it saw, without a wait for the device.
        optimizer: its learning rate becomes a tensor here, float32, so that it can change under a recording.
    """

    def __init__(
        self,
        step: Callable[[Sequence[Batch]], DeviceStats],
        optimizer: Optimizer,
        record: Record,
        device: torch.device,
        say: Callable[[str], None] = print,
    ) -> None:
        self.step, self.optimizer, self.record, self.say = step, optimizer, record, say
        self.recording: Recording | None = None
        self.failed = False
        self.last: object = None  # signature of the step before, if that was plain
        self.repeats = 0  # how many plain steps before it had the same
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)

    def __call__(self, micro_batches: Sequence[Batch]) -> DeviceStats:
        signature = [signature_of(batch) for batch in micro_batches]
        if self.recording is None or self.recording.signature != signature:
            self.repeats, self.last = self.repeats + 1 if signature == self.last else 0, signature
            if self.failed or self.repeats < WARM_UP or not self._recorded(signature, micro_batches):
                return self.step(micro_batches)
        assert self.recording is not None
        self.last = None
        for held, batch in zip(self.recording.inputs, micro_batches, strict=True):
            for name, tensor in own_tensors(held).items():
                tensor.copy_(getattr(batch, name), non_blocking=True)
        return self.recording.replay()

    def _recorded(self, signature: object, micro_batches: Sequence[Batch]) -> bool:
        """Make the recording; False where that failed."""
        self.recording = None  # its memory is free for the next
        try:
            inputs = [with_own_tensors(batch) for batch in micro_batches]
            with capturable(self.optimizer):
                replay = self.record(lambda: self.step(inputs))
        except Exception as error:
            self.failed = True
            why = reason_of(error)
            self.say(f"note: steps are not recorded as a CUDA graph ({why}); their kernels are launched one at a time")
        else:
            self.recording = Recording(signature, inputs, replay)
        self.optimizer.zero_grad(set_to_none=True)  # gradients of a recording that failed were never computed
        return not self.failed


def signature_of(batch: Any) -> dict[str, Any]:
    """What a step takes from the host of a batch: shape and type of its tensors, and every number as it is."""
    return {k: (v.shape, v.dtype) if isinstance(v, Tensor) else v for k, v in vars(batch).items()}


def own_tensors(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch by name, without those of objects in it."""
    return {k: v for k, v in vars(batch).items() if isinstance(v, Tensor)}


def with_own_tensors(batch: Batch) -> Batch:
    """A copy of a batch with tensors that nobody else has."""
    copied = copy.copy(batch)
    vars(copied).update({k: v.clone() for k, v in own_tensors(batch).items()})
    return copied


@contextlib.contextmanager
def capturable(optimizer: Optimizer) -> Iterator[None]:
    """Inside, torch lets the optimizer be recorded. Fused ones always can be; said outside, torch warns of the cost to others."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def recorder(device: torch.device) -> Record:
    """Records on a CUDA device, each recording in memory of its own."""

    def record(work: Callable[[], DeviceStats]) -> Callable[[], DeviceStats]:
        return capture(work, device, torch.cuda.graph_pool_handle(), rehearse=False)

    return record
