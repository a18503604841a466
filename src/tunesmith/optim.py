"""Optimizers and learning-rate schedules. A new one is a function and a line in its table."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda groups, lr, momentum: AdamW(groups, lr, fused=True),
    "adam": lambda groups, lr, momentum: Adam(groups, lr, fused=True),
    "sgd": lambda groups, lr, momentum: SGD(groups, lr, fused=True),
    "sgd-momentum": lambda groups, lr, momentum: SGD(groups, lr, momentum=momentum, fused=True),
    "sgd-nesterov": lambda groups, lr, momentum: SGD(groups, lr, momentum=momentum, nesterov=True, fused=True),
}
DEFAULT_WEIGHT_DECAY = {"adamw": 0.01}  # the others: 0


def build_optimizer(
    model: nn.Module, name: str, *, lr: float, weight_decay: float | None = None, momentum: float = 0.9
) -> Optimizer:
    """An optimizer over the trainable parameters of `model`.

    Adam and AdamW use betas (0.9, 0.999) and eps 1e-8, in torch's fused form. Weight decay acts on matrices only,
    never on biases and norms; adamw decouples it (Loshchilov & Hutter 2019), the others add it to the gradient.

    Args:
        name: a key of OPTIMIZERS.
        weight_decay: default 0.01 for adamw, 0 for the others.
    """
    decay = DEFAULT_WEIGHT_DECAY.get(name, 0.0) if weight_decay is None else weight_decay
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name]([g for g in groups if g["params"]], lr, momentum)


def schedule_factor(name: str, step: int, *, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate in force at optimizer step `step` (from 1 to `steps`).

    Linear warm-up from 0, then constant, linear to 0, or half a cosine to 0 at the last step.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return SCHEDULES[name](min(1.0, progress))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
