"""Optimizers and learning-rate schedules. A new one is a function and a line in its table."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tunesmith.errors import UserError


def _adamw8bit(groups: list[dict[str, Any]], lr: float) -> Optimizer:
    """AdamW with both moments in 8 bits, block by block (Dettmers et al. 2022, arXiv 2110.02861), as torchao has it."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            "--optimizer.name adamw8bit keeps its state with torchao, which is not installed: pip install 'tunesmith[8bit]', or use adamw"
        )
    if not groups[0]["params"][0].is_cuda and not shutil.which(os.environ.get("CXX", "c++")):
        raise UserError(
            "--optimizer.name adamw8bit compiles its update, and there is no C++ compiler here; install one, or use adamw"
        )
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))  # at import torchao warns of GPU kernels that nobody asked for
    try:
        from torchao.optim import AdamW8bit
    finally:
        logging.disable(before)
    warnings.filterwarnings("ignore", "OptimState8bit does not implement", UserWarning)
    optimizer: Optimizer = AdamW8bit(groups, lr)
    return optimizer


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda groups, lr, momentum: AdamW(groups, lr, fused=True),
    "adam": lambda groups, lr, momentum: Adam(groups, lr, fused=True),
    "sgd": lambda groups, lr, momentum: SGD(groups, lr, fused=True),
    "sgd-momentum": lambda groups, lr, momentum: SGD(groups, lr, momentum=momentum, fused=True),
    "sgd-nesterov": lambda groups, lr, momentum: SGD(groups, lr, momentum=momentum, nesterov=True, fused=True),
    "adamw8bit": lambda groups, lr, momentum: _adamw8bit(groups, lr),
}
DEFAULT_WEIGHT_DECAY = {"adamw": 0.01, "adamw8bit": 0.01}  # the others: 0


def build_optimizer(
    model: nn.Module, name: str, *, lr: float, weight_decay: float | None = None, momentum: float = 0.9
) -> Optimizer:
    """An optimizer over the trainable parameters of `model`.

    Adam and AdamW use betas (0.9, 0.999) and eps 1e-8, in torch's fused form. Weight decay acts on matrices only,
    never on biases and norms; adamw and adamw8bit decouple it (Loshchilov & Hutter 2019), the others add it to the gradient.

    Args:
        name: a key of OPTIMIZERS.
        weight_decay: default 0.01 for adamw and adamw8bit, 0 for the others.
    Raises: UserError if what adamw8bit needs is not installed.
    """
    decay = DEFAULT_WEIGHT_DECAY.get(name, 0.0) if weight_decay is None else weight_decay
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name]([g for g in groups if g["params"]], lr, momentum)


def state_parts(value: Tensor) -> dict[str, Tensor]:
    """A tensor of an optimizer's state as plain tensors by name: itself under "", or the parts that an 8-bit one is made of."""
    names = ("codes", "scale", "qmap")
    return {f".{name}": getattr(value, name) for name in names} if hasattr(value, "qmap") else {"": value}


def whole_state(parts: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `state_parts`."""
    if "" in parts:
        return parts[""]
    from torchao.optim.subclass_8bit import OptimState8bit

    codes, scale, qmap = (parts[f".{name}"] for name in ("codes", "scale", "qmap"))
    state: Tensor = OptimState8bit(codes, scale, qmap, signed=bool(qmap.min() < 0), dtype=torch.float32)
    return state


def set_learning_rate(optimizer: Optimizer | OneByOne, lr: float) -> None:
    """Put `lr` in force, for all parameters."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # compiled updates read it from there
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def decides_on_device(optimizer: Optimizer | OneByOne) -> bool:
    """Whether its updates are torch's fused ones: they leave everything as it is where `found_inf`, on the device, is 1."""
    return isinstance(optimizer, Adam | SGD) and all(group["fused"] for group in optimizer.param_groups)


SLICE = 2**22  # numbers of a bfloat16 parameter that are in float32 at a time


class OneByOne:
    """An optimizer made to update one parameter at a time, so that what an update needs exists for one of them only.

    in_backward: each parameter is updated as soon as backward has its gradient, which is freed at once (as in Lv et al. 2023,
        arXiv 2306.09782). The weights are those of the usual order, to the bit; but the norm of the whole gradient is known
        too late to clip by it or to leave out a step.
    Parameters in bfloat16 are updated in float32, state included, and rounded stochastically: rounded to the nearest, most
        changes by a small learning rate would be lost; so, none are in the mean.
    """

    def __init__(self, optimizer: Optimizer, *, in_backward: bool) -> None:
        self.optimizer, self.in_backward = optimizer, in_backward
        self.group = {p: number for number, g in enumerate(optimizer.param_groups) for p in g["params"]}
        self.norms: list[Tensor] = []
        if in_backward:
            for p in self.group:
                p.register_post_accumulate_grad_hook(self._update_now)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        return self.optimizer.state

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """Update what has a gradient."""
        for p in self.group:
            if p.grad is not None:
                self._update(p)

    def take_norm(self) -> Tensor:
        """Norm of the gradients since the last call, with `in_backward`: scalar float32."""
        norm = torch.linalg.vector_norm(torch.stack(self.norms)) if self.norms else torch.zeros(())
        self.norms = []
        return norm

    def _update_now(self, p: Tensor) -> None:
        assert p.grad is not None
        self.norms.append(torch.linalg.vector_norm(p.grad, dtype=torch.promote_types(p.dtype, torch.float32)))
        self._update(p)
        p.grad = None

    def allocate_state(self) -> None:
        """Make the whole state now, as it is before the first step.

        Made in the first step, it would lie where that step's activations were, and those of the second find no place.
        """
        zeros: dict[torch.dtype, Tensor] = {}  # one block that all gradients of 0 share
        for p in sorted(self.group, key=torch.numel, reverse=True):
            if p.dtype not in zeros:
                zeros[p.dtype] = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
            p.grad = zeros[p.dtype][: p.numel()].view(p.shape)
            nothing = torch.zeros(()) if isinstance(self.param_groups[0]["lr"], Tensor) else 0.0
            self._update(p, lr=nothing, weight_decay=0.0)
            p.grad = None
            if "step" in self.state.get(p, {}):
                self.state[p]["step"].zero_()

    @torch.no_grad()
    def _update(self, p: Tensor, **settings: Any) -> None:
        if p.dtype is not torch.bfloat16:
            self._step(p, p, settings)
            return
        assert p.grad is not None
        held = self.state.pop(p, {})
        apart = bool(held) and not any(hasattr(value, "qmap") for value in held.values())
        rows = max(1, SLICE * len(p) // p.numel()) if apart else len(p)
        for piece in (slice(start, start + rows) for start in range(0, len(p), rows)):
            exact = p[piece].float()
            exact.grad = p.grad[piece].float()
            if (
                apart
            ):  # what is kept for every number goes by rows; the step's number would be counted up with each piece
                self.state[exact] = {k: v[piece] if v.shape == p.shape else v.clone() for k, v in held.items()}
            elif held:
                self.state[exact] = held
            self._step(exact, p, settings)
            p[piece] = round_stochastically(exact)
            made = self.state.pop(exact, {})
        if apart:
            self.state[p] = {k: v if v.shape == p.shape else made[k] for k, v in held.items()}
        elif made:
            self.state[p] = made
        p.grad = None

    def _step(self, exact: Tensor, p: Tensor, settings: dict[str, Any]) -> None:
        """One step of the optimizer that sees `exact` only, as a parameter of p's group."""
        whole = self.optimizer.param_groups
        self.optimizer.param_groups = [{**whole[self.group[p]], "params": [exact], **settings}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = whole


def round_stochastically(x: Tensor) -> Tensor:
    """float32 to one of the two bfloat16 around each number, so that the mean is the number itself: same shape.

    Draws 16 bits a number from torch's global random state.
    """
    noise = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = noise.view(torch.int16)[: x.numel()].view(x.shape).to(torch.int32) & 0xFFFF
    return ((x.contiguous().view(torch.int32) + bits) & -0x10000).view(torch.float32).to(torch.bfloat16)


def schedule_factor(name: str, step: int, *, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate in force at optimizer step `step` (from 1 to `steps`).

    Linear warm-up from 0, whose last step has the peak (without one the first step has it); then constant, linear to 0, or
    half a cosine to 0. The rate would be 0 one step after the last: a step at 0 would be a step for nothing.
    """
    if step < warmup_steps:
        return step / warmup_steps
    peak = max(1, warmup_steps)
    return SCHEDULES[name]((step - peak) / (steps + 1 - peak))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
