"""The head and what a loss takes of it: log-probabilities of the targets, and losses of these, without the full logits.

Losses return sums; only `step.optimizer_step` divides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.device import Precision, autocast
from tunesmith.models.attention import Documents
from tunesmith.models.gpt2 import GPT
from tunesmith.models.linear import product
from tunesmith.models.lora import head_parts

LowRank = tuple[Tensor, Tensor]
"""(N, r) and (V, r), of which the first times the second transposed is added to the logits: an adapter on the head."""

Outer = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""What a loss does with log-probabilities: (those of one group (n,), the group's number) -> its sum, d sum / d logps (n,)."""


class _HeadLoss(torch.autograd.Function):
    """Head, log-softmax and a loss on the targets' log-probabilities in one operation, without the full logits.

    The targets come in groups, and a loss is a sum over groups. Logits exist for `chunk` tokens at a time. The gradients
    are made in the forward pass, while a chunk's probabilities are at hand (d logp / d logits = one_hot - p), so that
    the logits are computed once: three matrix products a chunk, as with full logits. Only a group of more than `chunk`
    tokens, whose loss is known when its last logits are gone, has them computed a second time.
    """

    @staticmethod
    def forward(
        ctx: Any, targets: Tensor, groups: Sequence[tuple[int, int]], chunk: int, outer: Outer, *terms: Tensor
    ) -> Tensor:
        x32, w32 = terms[::2], terms[1::2]
        kind = x32[0].device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x32[0].dtype
        x, w = [t.to(dtype) for t in x32], [t.to(dtype) for t in w32]
        exact = torch.promote_types(torch.float32, x32[0].dtype)  # sums over chunks would lose bits in bf16
        wanted = ctx.needs_input_grad[4:]
        d_x = [torch.zeros_like(t) if need else None for t, need in zip(x, wanted[::2], strict=True)]
        d_w = [torch.zeros_like(t, dtype=exact) if need else None for t, need in zip(w32, wanted[1::2], strict=True)]
        total = x[0].new_zeros((), dtype=torch.float64 if x[0].dtype == torch.float64 else torch.float32)

        def look(a: int, b: int) -> tuple[Tensor, Tensor]:
            """Log-probabilities of the targets a to b, (b - a,), and all probabilities, (b - a, V), in the logits' place."""
            logits = product(x[0][a:b], w[0])
            for more_x, more_w in zip(x[1:], w[1:], strict=True):
                logits.addmm_(more_x[a:b], more_w.t())
            logits = logits.to(total.dtype)
            target, top = logits.gather(1, targets[a:b, None]), logits.amax(1, keepdim=True)
            p = logits.sub_(top).exp_()
            z = p.sum(1, keepdim=True)
            return (target - top - z.log())[:, 0], p.div_(z) if any(wanted) else p

        def learn(a: int, b: int, p: Tensor, d_logps: Tensor) -> None:
            target = targets[a:b, None]
            p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))  # p - one_hot
            p, weights = p.to(dtype), -d_logps.to(dtype)[:, None]
            for i, (part, matrix) in enumerate(zip(x, w, strict=True)):
                if (into := d_x[i]) is not None:
                    torch.mul(product(p, matrix.t()), weights, out=into[a:b])
                if (into := d_w[i]) is not None:
                    scaled = part[a:b] * weights
                    if into.dtype == dtype:
                        into.addmm_(p.t(), scaled)
                    else:
                        into += p.t() @ scaled

        def visit(lo: int, hi: int, number: int) -> Tensor:
            """The loss of a group; when it returns, no logits are left."""
            parts = [(a, min(a + chunk, hi)) for a in range(lo, hi, chunk)]
            if len(parts) == 1:
                logps, p = look(lo, hi)
                loss, d_logps = outer(logps, number)
                if any(wanted):
                    learn(lo, hi, p, d_logps)
                return loss
            loss, d_logps = outer(torch.cat([look(a, b)[0] for a, b in parts]), number)
            for a, b in parts if any(wanted) else []:
                learn(a, b, look(a, b)[1], d_logps[a - lo : b - lo])
            return loss

        for number, (lo, hi) in enumerate(groups):
            total += visit(lo, hi, number)
        ctx.made = d_x, d_w, [t.dtype for t in x32]
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.made is None:
            raise RuntimeError(
                "the gradients of this loss are computed once: compute the loss again before a second backward"
            )
        d_x, d_w, dtypes = ctx.made
        ctx.made = None  # autograd adds to a gradient in its place only where nobody else holds it
        d_x = [None if d is None else d.to(to) * grad.to(to) for d, to in zip(d_x, dtypes, strict=True)]
        for i, d in enumerate(d_w):
            d_w[i] = None if d is None else d.mul_(grad)
        return None, None, None, None, *(d for pair in zip(d_x, d_w, strict=True) for d in pair)


def _head_loss(
    hidden: Tensor,
    weight: Tensor,
    low_rank: LowRank | None,
    targets: Tensor,
    groups: Sequence[tuple[int, int]],
    chunk: int,
    outer: Outer,
) -> Tensor:
    terms = (hidden, weight, *(low_rank or ()))
    return _HeadLoss.apply(targets, groups, chunk, outer, *terms)  # type: ignore[no-any-return,no-untyped-call]


def head_nll_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    low_rank: LowRank | None = None,
    chunk: int = 256,
    count: int | None = None,
) -> Tensor:
    """Sum of -log p(target) over tokens, without ever holding the full logits.

    Args:
        hidden: (N, C), states of the tokens that carry loss.
        weight: (V, C), the head.
        targets: (N,) int64 in [0, V); leave unsupervised tokens out before.
        low_rank: what an adapter on the head adds to it.
        chunk: tokens whose logits exist at one time. 256 costs no time on a CPU and keeps the block near 50 MB at
            GPT-2's vocabulary.
        count: how many of the N tokens count; the rest, at the end, is filler for a steady shape. Default: all.
    Returns: scalar, float32 (float64 for float64 inputs), nats. Backward may be called once.
    """
    real = len(targets) if count is None else count
    groups = [(a, min(a + chunk, len(targets))) for a in range(0, len(targets), chunk)]

    def outer(logps: Tensor, number: int) -> tuple[Tensor, Tensor]:
        counted = max(0, real - groups[number][0])
        weights = torch.full_like(logps, -1.0)
        weights[counted:] = 0.0
        return -logps[:counted].sum(), weights

    return _head_loss(hidden, weight, low_rank, targets, groups, chunk, outer)


def sequence_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lengths: Sequence[int],
    losses: Callable[[Tensor, slice], Tensor],
    *,
    low_rank: LowRank | None = None,
    size: int = 2,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """Sum of losses that depend on the log-probabilities of whole sequences, `size` of them each (a pair: 2).

    Args:
        hidden, weight, targets, low_rank, chunk: as in `head_nll_sum`; the sequences' targets lie one after the other,
            filler at the end.
        lengths: targets of each sequence, on the host.
        losses: (logps (k, size) float32, which k examples as a slice) -> (k,) losses, differentiable.
    Returns: the sum, a scalar, and logps (examples, size) without gradient; both float32 (float64 for float64 inputs),
        nats. Backward may be called once.
    """
    examples, groups = _group([sum(lengths[i : i + size]) for i in range(0, len(lengths), size)], chunk)
    found: list[Tensor] = []

    def outer(logps: Tensor, number: int) -> tuple[Tensor, Tensor]:
        which = examples[number]
        own = list(lengths[which.start * size : which.stop * size])
        sums = sum_sequences(logps, own).view(-1, size)
        found.append(sums)
        with torch.enable_grad():
            leaf = sums.detach().requires_grad_()
            loss = losses(leaf, which).sum()
            (slope,) = torch.autograd.grad(loss, leaf)  # (k, size)
        slopes = [one.expand(n) for one, n in zip(slope.flatten().unbind(), own, strict=True)]
        return loss.detach(), torch.cat(slopes)  # repeat_interleave would make a GPU wait for the host

    return _head_loss(hidden, weight, low_rank, targets, groups, chunk, outer), torch.cat(found)


def _group(sizes: Sequence[int], limit: int) -> tuple[list[slice], list[tuple[int, int]]]:
    """Consecutive examples in groups of at most `limit` tokens, or of one example: which they are, and their tokens."""
    borders, taken = [0], 0
    for i, n in enumerate(sizes):
        if taken and taken + n > limit:
            borders.append(i)
            taken = 0
        taken += n
    borders.append(len(sizes))
    ends = [0, *accumulate(sizes)]
    return [slice(a, b) for a, b in pairwise(borders)], [(ends[a], ends[b]) for a, b in pairwise(borders)]


def sum_sequences(logps: Tensor, lengths: Sequence[int]) -> Tensor:
    """(N,) values of consecutive sequences to their sums (len(lengths),); what is left at the end is filler."""
    return torch.stack([part.sum() for part in torch.split(logps[: sum(lengths)], list(lengths))])


@torch.no_grad()
def token_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, low_rank: LowRank | None = None, chunk: int = 256
) -> Tensor:
    """-log p(target) of every token, for evaluation: (N,) float32 (or float64), nats. Arguments as in `head_nll_sum`."""
    parts = []
    for start in range(0, len(targets), chunk):
        logits = product(hidden[start : start + chunk], weight)
        if low_rank is not None:
            logits = logits + low_rank[0][start : start + chunk] @ low_rank[1].t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        target = targets[start : start + chunk, None]
        parts.append((logits.logsumexp(1, keepdim=True) - logits.gather(1, target))[:, 0])
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


# ---- of a batch ---------------------------------------------------------------------------------------------------


class Targets(Protocol):
    """Batches whose targets are predicted by the states in some of their rows."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def documents(self) -> Documents | None: ...
    @property
    def rows(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...


def states_and_head(model: GPT, batch: Targets) -> tuple[Tensor, Tensor, LowRank | None]:
    """What a loss takes of a batch: hidden states of its targets (n, C), the head's weight (V, C), and what an adapter adds."""
    hidden, tied = model.states_and_head(batch.input_ids, batch.documents, rows=batch.rows)
    return hidden, *head_parts(model.lm_head, hidden, tied)


def head_chunk(precision: Precision) -> int:
    """Tokens whose logits are made at a time: as many as cost nothing."""
    return 256 if precision == "fp32" else 1024


@torch.no_grad()
def target_logps(model: GPT, batch: Targets, precision: Precision = "fp32") -> Tensor:
    """Log-probability of every target of a batch, in the order of `batch.targets`: (n,) float32, nats."""
    with autocast(batch.input_ids.device, precision):
        hidden, weight, low_rank = states_and_head(model, batch)
        return -token_nll(hidden, weight, batch.targets, low_rank=low_rank, chunk=head_chunk(precision))
