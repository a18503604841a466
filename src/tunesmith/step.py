"""One optimizer step over micro-batches: the only place where a loss is divided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from tunesmith.optim import OneByOne
from tunesmith.outofmemory import in_micro_batch


class Counted(Protocol):
    """A micro-batch that knows how many terms its summed loss has."""

    @property
    def count(self) -> int: ...


B = TypeVar("B", bound=Counted)


@dataclass(frozen=True)
class StepStats:
    """What a step saw. loss: nats per supervised token (or per pair); grad_norm: before clipping.

    updated: False if loss or gradient was not finite; the weights are then as before.
    observed: means over the whole step of what the loss function gave beside the loss.
    """

    loss: float
    count: int
    grad_norm: float
    updated: bool
    observed: tuple[float, ...] = ()


def optimizer_step(
    model: nn.Module,
    micro_batches: Sequence[B],
    loss_sum: Callable[[B], Tensor],
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
    in_backward = isinstance(optimizer, OneByOne) and optimizer.in_backward
    assert not in_backward or (len(micro_batches) == 1 and max_norm == 0 and scaler is None)
    count = sum(batch.count for batch in micro_batches)  # host numbers: no device sync
    total = torch.zeros(())
    for number, batch in enumerate(micro_batches):
        with in_micro_batch(number):
            sums = loss_sum(batch).reshape(-1)
            scaled = sums[0] / count
            total = total.to(sums.device) + sums.detach()
            if in_backward and not torch.isfinite(scaled):
                break
            (scaler.scale(scaled) if scaler else scaled).backward()  # type: ignore[no-untyped-call]
    if scaler:
        scaler.unscale_(optimizer)  # type: ignore[arg-type]
    norm = optimizer.take_norm() if isinstance(optimizer, OneByOne) and in_backward else clip(model, max_norm)
    seen = torch.cat([norm.double()[None], total.double() / count]).tolist()  # the one sync of a step
    grad_norm, mean, *observed = seen
    updated = bool(torch.isfinite(torch.tensor([mean, grad_norm])).all())
    if scaler:
        scaler.step(optimizer)  # type: ignore[arg-type]  # skips the update by itself where a gradient overflowed, and lowers the scale
        scaler.update()
    elif updated:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepStats(mean, count, grad_norm, updated, tuple(observed))


def clip(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of `model` to a norm of at most `max_norm` (0: leave them); returns their norm before, a scalar."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not any(g.dtype is torch.bfloat16 for g in gradients):
        return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))
    # torch would round the norms of bfloat16 gradients to three digits
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
