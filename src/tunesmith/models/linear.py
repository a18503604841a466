"""The model's matrix products. On a CPU they run in oneDNN's kernels, without gradients on packed weights where asked.

torch's own float32 product on a CPU is MKL's, and MKL uses AVX2 only on a processor that is not Intel's. oneDNN uses what
is there: 0.45 of the time at 1,024 rows with AVX512, 0.9 with AVX2, and 0.4 to 0.75 of it at the 1 to 40 rows of
generation where the weight lies as its kernels read it (one thread each; docs/performance.md).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS = 40  # rows that packed weights are laid out for; the layout is the same from 2 to 1,024


class Linear(nn.Linear):
    """As nn.Linear, which it is, to a rounding error.

    On a CPU in float32, from 2 rows on, a row's result has the same bits no matter which rows are beside it, with or without
    gradients, packed or not: a policy equals its reference, an answer alone the same answer in a batch.
    """

    packed: Tensor | None = (
        None  # the weight once more, in oneDNN's own layout; see `packed_weights` and `pack_for_good`
    )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if _autocast(x) or (x.dtype is self.weight.dtype and not _suits_onednn(x)):
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return _Product.apply(x, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]
        packed = self.packed  # read once: another thread may be leaving `packed_weights`
        return _product(x, self.weight if packed is None else packed, self.bias)


class _Product(torch.autograd.Function):
    """x W^T + b with its gradients. A weight kept in another type than x's is converted while it is used, each time anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen weight has no use for x
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = _product(dy, weight.t()) if for_x else None
        dw = _product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if for_weight else None
        return dx, dw, rows.sum(0) if for_bias else None


def cast_once(x: Tensor) -> Tensor:
    """What several layers are to read, in autocast's type where that is on: each would make and keep a copy of its own."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if _autocast(x) else x


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, without gradients: (n, in) and (out, in) -> (n, out)."""
    return F.linear(x, weight) if _autocast(x) else _product(x, weight)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dtype is not x.dtype:
        weight = weight.to(x.dtype)
    if not _suits_onednn(x):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _suits_onednn(x: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and x.is_cpu
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _has_onednn()
    )


def _has_onednn() -> bool:
    """Whether torch's operator is there and switched on (`torch.backends.mkldnn.flags`)."""
    return _finds_operator() and bool(torch.backends.mkldnn.enabled)


@functools.cache
def _finds_operator() -> bool:
    known = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # measured on these only
    return known and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def packable(model: nn.Module) -> list[Linear]:
    """The layers of `model` that can run on packed weights: none where oneDNN has no part in it."""
    if not _has_onednn():
        return []
    layers = (m for m in model.modules() if isinstance(m, Linear))
    return [m for m in layers if m.packed is None and m.weight.is_cpu and m.weight.dtype is torch.float32]


@contextlib.contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, passes without gradients read packed copies of the weights, one of each. No weight may change inside."""
    layers = packable(model)
    try:
        for m in layers:
            m.packed = _pack(m.weight)
        yield
    finally:
        for m in layers:
            m.packed = None


def pack_for_good(model: nn.Module) -> None:
    """Pack the weights and free the plain ones: no copy stays, and from now on the layers can only compute, in float32.

    They cannot be trained, moved or saved any more.
    """
    model.requires_grad_(False)
    for m in packable(model):
        m.packed = _pack(m.weight)
        m.weight = nn.Parameter(m.weight.new_empty(0), requires_grad=False)


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)  # type: ignore[no-any-return]
