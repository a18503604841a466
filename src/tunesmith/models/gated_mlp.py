"""The MLP with a gate: down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202: SwiGLU with SiLU, GeGLU with GELU)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.models.linear import Linear, cast_once
from tunesmith.models.recompute import Chain

Activation = Literal["silu", "gelu_tanh"]


class GatedMLP(nn.Module):
    """Three linear layers. gate_proj, up_proj: (width, inner); down_proj: (inner, width)."""

    def __init__(self, width: int, inner: int, *, activation: Activation = "silu", bias: bool = False) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, norm: nn.Module, chain: Chain) -> Tensor:
        """(..., C) -> (..., C), of what `norm` makes of x."""
        y: Tensor = chain(self._gated, chain(norm, x, self._opened), self.down_proj)
        return y

    def _opened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = cast_once(x)
        return self.gate_proj(x), self.up_proj(x)

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return gated(gate, up, self.activation)


def gated(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """act(gate) * up; keeps its two arguments for backward, where plain operations would keep act(gate) too."""
    if torch.compiler.is_compiling():
        return _activated(gate, activation) * up
    return _Gated.apply(gate, up, activation)  # type: ignore[no-any-return, no-untyped-call]


def _activated(gate: Tensor, activation: Activation) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activated(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        d_up = _activated(gate, ctx.activation).mul_(dy)
        d_gate = torch.mul(dy, up)
        if ctx.activation == "silu":
            torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        else:
            torch.ops.aten.gelu_backward.grad_input(d_gate, gate, approximate="tanh", grad_input=d_gate)
        return d_gate, d_up, None
