"""Losses as pure tensor functions. They return sums; only `step.optimizer_step` divides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


class _HeadNLL(torch.autograd.Function):
    """Head and cross-entropy in one operation: logits exist for `chunk` tokens at a time, forward and backward.

    The gradients are made in the forward pass, while a chunk's probabilities are at hand (p - one_hot), so that the
    logits are computed once: three matrix products a chunk, as with full logits, and no second pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, count: int) -> Tensor:
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        h, w = (hidden.to(dtype), weight.to(dtype)) if dtype else (hidden, weight)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(h) if wants_hidden else None
        d_weight = torch.zeros_like(weight) if wants_weight else None
        total = hidden.new_zeros((), dtype=torch.float32 if hidden.dtype != torch.float64 else torch.float64)
        for start in range(0, len(h), chunk):
            part, target = h[start : start + chunk], targets[start : start + chunk, None]
            logits = (part @ w.t()).to(total.dtype)  # (chunk, V)
            log_z = logits.logsumexp(1, keepdim=True)
            real = max(0, count - start)  # the rest is filler
            total += (log_z - logits.gather(1, target))[:real].sum()
            if d_hidden is None and d_weight is None:
                continue
            p = logits.sub_(log_z).exp_()
            p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
            p[real:] = 0
            p = p.to(h.dtype)
            if d_hidden is not None:
                torch.mm(p, w, out=d_hidden[start : start + chunk])
            if d_weight is not None:
                if d_weight.dtype == p.dtype:
                    d_weight.addmm_(p.t(), part)
                else:
                    d_weight += p.t() @ part
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.hidden_dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        d_hidden = None if d_hidden is None else (d_hidden.to(ctx.hidden_dtype) * grad.to(ctx.hidden_dtype))
        return d_hidden, None if d_weight is None else d_weight.mul_(grad), None, None, None


def head_nll_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 256, count: int | None = None
) -> Tensor:
    """Sum of -log p(target) over tokens, without ever holding the full logits.

    Args:
        hidden: (N, C), states of the tokens that carry loss.
        weight: (V, C), the head.
        targets: (N,) int64 in [0, V); leave unsupervised tokens out before.
        chunk: tokens whose logits exist at one time. 256 costs no time on a CPU and keeps the block near 50 MB at
            GPT-2's vocabulary.
        count: how many of the N tokens count; the rest, at the end, is filler for a steady shape. Default: all.
    Returns: scalar, float32 (float64 for float64 inputs), nats. Backward may be called once.
    """
    return _HeadNLL.apply(hidden, weight, targets, chunk, len(targets) if count is None else count)  # type: ignore[no-any-return,no-untyped-call]


@torch.no_grad()
def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 256) -> Tensor:
    """-log p(target) of every token, for evaluation: (N,) float32, nats. Arguments as in `head_nll_sum`."""
    parts = []
    for start in range(0, len(hidden), chunk):
        logits = (hidden[start : start + chunk] @ weight.t()).float()
        target = targets[start : start + chunk, None]
        parts.append((logits.logsumexp(1, keepdim=True) - logits.gather(1, target))[:, 0])
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
