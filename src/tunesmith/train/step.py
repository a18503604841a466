"""One optimizer step over micro-batches: the only place where a loss is divided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from tunesmith.data.batch import Batch
from tunesmith.outofmemory import in_micro_batch
from tunesmith.train.optim import OneByOne


@dataclass(frozen=True)
class StepStats:
    """What a step saw. loss: nats per supervised token (or per pair).

    grad_norm: before clipping; of updates in backward put together from each parameter's own, 0 where the loss was not finite.
    updated: False if loss or gradient was not finite; the weights are then as before.
    observed: means over the whole step of what the loss function gave beside the loss.
    """

    loss: float
    count: int
    grad_norm: float
    updated: bool
    observed: tuple[float, ...] = ()

    def read(self) -> StepStats:
        """Itself: nothing is outstanding."""
        return self


def optimizer_step(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    loss_sum: Callable[[Batch], Tensor],
    optimizer: Optimizer | OneByOne,
    *,
    max_norm: float = 0.0,
    scaler: GradScaler | None = None,
) -> StepStats:
    """Forward, backward, clip, update (algorithms 1 and 3 of the paper).

    Every micro-batch's loss sum is divided by the count of the *whole step*, so any split of the same examples gives
    the same gradient: (x1 + x2) / (n1 + n2), not the mean of x1 / n1 and x2 / n2.

    Args:
        loss_sum: micro-batch -> float32 scalar, summed and never averaged; or a vector (1 + k,) whose first entry is
            that and whose others are sums over the same examples, only to be observed.
        max_norm: largest gradient norm; 0 = no clipping.
        scaler: loss scaling for fp16.
        optimizer: where it updates in backward, there is one micro-batch and neither clipping nor a scaler; only a loss
            that is not finite then leaves the weights as before.
    Raises: OutOfMemory if a micro-batch does not fit; gradients may then be left, but nothing has moved
        (unless the optimizer updates in backward).
    """
    numbers = _gradients(model, micro_batches, loss_sum, optimizer, max_norm, scaler)
    # The one wait for the device in a step: all numbers come in one tensor, and the update may depend on them.
    grad_norm, mean, *observed = numbers.tolist()
    updated = bool(_finite(torch.tensor([mean, grad_norm])))
    if scaler:
        scaler.step(optimizer)  # type: ignore[arg-type]  # skips the update by itself where a gradient overflowed, and lowers the scale
        scaler.update()
    elif updated:  # a moment of Adam that took in one NaN would hold it for the rest of the run
        optimizer.step()
    # None and not zeros: the next backward then writes its gradients, where it would otherwise read, add and write.
    optimizer.zero_grad(set_to_none=True)
    return StepStats(mean, _count(micro_batches), grad_norm, updated, tuple(observed))


@dataclass(frozen=True)
class DeviceStats:
    """What a step on the device saw, still there. numbers: (3 + k,) float64: halted, gradient norm, loss, k observed."""

    numbers: Tensor
    count: int


def step_on_device(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    loss_sum: Callable[[Batch], Tensor],
    optimizer: Optimizer,
    *,
    max_norm: float,
    halted: Tensor,
) -> DeviceStats:
    """The same step with nothing for the host to wait for: whether to update is decided on the device.

    Args:
        optimizer: one of torch's fused ones, which read `found_inf` (see `optim.decides_on_device`).
        halted: scalar float32 on the device, 0 at first. A loss or gradient that is not finite makes it 1; from then on
            no step moves weights or state, so that steps launched before the host has seen the bad one do no harm.
    Raises: as `optimizer_step`.
    """
    numbers = _gradients(model, micro_batches, loss_sum, optimizer, max_norm)
    # In place, as a recorded step knows only the address; and a maximum, as a verdict once given must hold: the host reads it
    # a step later, when more steps have been launched, and each of them finds it here.
    halted.copy_(torch.maximum(halted, (~_finite(numbers[:2])).to(halted.dtype)))
    optimizer.found_inf = halted  # type: ignore[attr-defined]  # where GradScaler puts its verdict too
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]  # for this update only
    optimizer.zero_grad(set_to_none=True)
    return DeviceStats(torch.cat([halted.double()[None], numbers]), _count(micro_batches))


class Unread:
    """What a step on the device saw, on its way to the host."""

    def __init__(self, stats: DeviceStats) -> None:
        numbers, self.count = stats.numbers, stats.count
        # The copy goes into pinned memory, or it would wait; and it goes now, because a recording's next replay writes its
        # numbers to the same place.
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._host.copy_(numbers, non_blocking=True)
        self._copied = torch.cuda.current_stream(numbers.device).record_event() if numbers.is_cuda else None

    def read(self) -> StepStats:
        """Waits for this step, not for what was launched after it."""
        if self._copied is not None:
            self._copied.synchronize()
        halted, grad_norm, mean, *observed = self._host.tolist()
        return StepStats(mean, self.count, grad_norm, not halted, tuple(observed))


def _gradients(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    loss_sum: Callable[[Batch], Tensor],
    optimizer: Optimizer | OneByOne,
    max_norm: float,
    scaler: GradScaler | None = None,
) -> Tensor:
    """Forward, backward, clip: gradients are left, clipped. Returns (2 + k,) float64: their norm before, loss, k observed."""
    in_backward = isinstance(optimizer, OneByOne) and optimizer.in_backward
    assert not in_backward or (len(micro_batches) == 1 and max_norm == 0 and scaler is None)
    # Counted before the first forward, so that each micro-batch's gradients arrive with their final weight, and its graph can
    # be freed before the next one's is made: a step needs the memory of its largest micro-batch.
    count = _count(micro_batches)
    total: Tensor | None = None  # stays on the device, as do the sums it is made of
    for number, batch in enumerate(micro_batches):
        with in_micro_batch(number):
            sums = loss_sum(batch).reshape(-1)  # the loss, and what is only observed
            scaled = sums[0] / count
            total = sums.detach() if total is None else total + sums.detach()
            # Backward would move the weights at once. Asking costs a wait, so only this mode asks here.
            if in_backward and not torch.isfinite(scaled):
                break
            (scaler.scale(scaled) if scaler else scaled).backward()  # type: ignore[no-untyped-call]
    assert total is not None
    if scaler:  # before clipping: the norm that is clipped and logged is that of the true gradients
        scaler.unscale_(optimizer)  # type: ignore[arg-type]
    norm = optimizer.take_norm() if isinstance(optimizer, OneByOne) and in_backward else clip(model, max_norm)
    return torch.cat([norm.double()[None].to(total.device), total.double() / count])


def _count(micro_batches: Sequence[Batch]) -> int:
    """Terms of the whole step's loss: host numbers, for which no device is waited."""
    return sum(batch.count for batch in micro_batches)


def _finite(numbers: Tensor) -> Tensor:
    """Whether all are numbers that float32 has: a scalar."""
    return torch.isfinite(numbers.float()).all()


def clip(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of `model` to a norm of at most `max_norm` (0: leave them); returns their norm before, a scalar."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not any(g.dtype is torch.bfloat16 for g in gradients):
        # The norm is logged, and decides whether to update, even where nothing is clipped.
        return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))
    # torch would take each norm in the gradient's own type, which in bfloat16 has three digits.
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
