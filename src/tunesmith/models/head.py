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
from tunesmith.models.linear import product
from tunesmith.models.lora import head_parts
from tunesmith.models.model import Model

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
        chunks = _Chunks(targets, terms, ctx.needs_input_grad[4:])
        total = chunks.x[0].new_zeros((), dtype=chunks.exact)
        # One group after the other, and each done when the next begins: its logits, its loss and what it gives to the gradients.
        for number, (start, stop) in enumerate(groups):
            total += chunks.group_loss(number, start, stop, chunk, outer)
        # Not save_for_backward, which would go on holding the tensors that backward gives away.
        ctx.made = chunks.d_x, chunks.d_w, [t.dtype for t in terms[::2]]
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
        # In place, for a copy would be one more matrix of the head's size. The price is that there is no second backward.
        for i, d in enumerate(d_w):
            d_w[i] = None if d is None else d.mul_(grad)
        return None, None, None, None, *(d for pair in zip(d_x, d_w, strict=True) for d in pair)


class _Chunks:
    """What the chunks of one pass share: inputs in the arithmetic's type, and the gradients that every chunk adds to.

    terms: x (N, C) and w (V, C) whose product is the logits; with an adapter, its (N, r) and (V, r) too, for more logits.
    learns: which of them need a gradient: none in an estimate, and not the head itself with LoRA.
    """

    def __init__(self, targets: Tensor, terms: Sequence[Tensor], learns: Sequence[bool]) -> None:
        x, w = terms[::2], terms[1::2]
        kind = x[0].device.type
        self.targets, self.any_learns = targets, any(learns)
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x[0].dtype
        # Half precision ends at the logits: a sum over the vocabulary's exponentials needs more digits, and so does one over
        # many tokens' losses. The head's gradient is a sum over chunks, which in bf16 would lose what a chunk adds.
        self.exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        sums = torch.promote_types(torch.float32, x[0].dtype)
        # Converted once for all chunks. Under autocast, or over bf16 weights, that is a second head while the loss is made.
        self.x, self.w = [t.to(self.dtype) for t in x], [t.to(self.dtype) for t in w]
        self.d_x = [torch.zeros_like(t) if need else None for t, need in zip(self.x, learns[::2], strict=True)]
        self.d_w = [torch.zeros_like(t, dtype=sums) if need else None for t, need in zip(w, learns[1::2], strict=True)]

    def group_loss(self, number: int, start: int, stop: int, chunk: int, outer: Outer) -> Tensor:
        """The loss of group `number`, which has the targets start to stop. When it returns, no logits are left."""
        parts = [(a, min(a + chunk, stop)) for a in range(start, stop, chunk)]
        if len(parts) == 1:
            logps, p = self.softmax(start, stop)
            loss, d_logps = outer(logps, number)
            if self.any_learns:
                self.add_gradients(start, stop, p, d_logps)
            return loss
        # What a token weighs depends on the whole group, and to keep its logits until then would be to keep the full logits.
        # So they are computed twice: four products a chunk where a group of one chunk takes three.
        loss, d_logps = outer(torch.cat([self.softmax(a, b)[0] for a, b in parts]), number)
        for a, b in parts if self.any_learns else []:
            self.add_gradients(a, b, self.softmax(a, b)[1], d_logps[a - start : b - start])
        return loss

    def softmax(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets a to b, (b - a,), and all probabilities, (b - a, V), in the logits' place."""
        logits = product(self.x[0][a:b], self.w[0])
        for low_x, low_w in zip(self.x[1:], self.w[1:], strict=True):
            logits.addmm_(low_x[a:b], low_w.t())  # in place: base and adapter never have a block of logits each
        logits = logits.to(self.exact)
        # Written out, not logsumexp: each step overwrites the block, and its exponentials are already the gradient's p.
        target, top = logits.gather(1, self.targets[a:b, None]), logits.amax(1, keepdim=True)
        p = logits.sub_(top).exp_()  # no exponent is above 0, so none overflows
        z = p.sum(1, keepdim=True)
        return (target - top - z.log())[:, 0], p.div_(z) if self.any_learns else p  # an estimate saves this pass

    def add_gradients(self, a: int, b: int, p: Tensor, d_logps: Tensor) -> None:
        """Add what the targets a to b give to the gradients; p is used up. d_logps: (b - a,), d loss / d logps."""
        target = self.targets[a:b, None]
        # p - one_hot, without a one_hot of that size, and with its -1 made on the device
        p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
        p, weights = p.to(self.dtype), -d_logps.to(self.dtype)[:, None]
        for i, (x, w) in enumerate(zip(self.x, self.w, strict=True)):
            # A token's weight is put on its C numbers, on the far side of either product: its V logits are many more.
            if (d_x := self.d_x[i]) is not None:
                torch.mul(product(p, w.t()), weights, out=d_x[a:b])
            if (d_w := self.d_w[i]) is not None:
                scaled = x[a:b] * weights
                if d_w.dtype == self.dtype:
                    # The product itself adds, so there is no second (V, C) matrix, 0.15 GB of GPT-2's. This one stays with MKL.
                    d_w.addmm_(p.t(), scaled)
                else:
                    d_w += p.t() @ scaled  # a product in half cannot add to float32: here there is one, in half


def _head_loss(
    hidden: Tensor,
    weight: Tensor,
    low_rank: LowRank | None,
    targets: Tensor,
    groups: Sequence[tuple[int, int]],
    chunk: int,
    outer: Outer,
) -> Tensor:
    # An adapter on the head comes as two more terms. Merged into the weight it would be one more matrix of the head's size in
    # every step, and autograd would have to find its gradient in one of that size.
    terms = (hidden, weight, *(low_rank or ()))
    if (
        not torch.is_grad_enabled()
    ):  # `needs_input_grad` does not ask: an estimate would make the head's gradients, at twice its time
        terms = tuple(t.detach() for t in terms)
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
    # A token's loss depends on no other token, so chunks can be the groups, and no logits are computed twice.
    groups = [(a, min(a + chunk, len(targets))) for a in range(0, len(targets), chunk)]

    def outer(logps: Tensor, number: int) -> tuple[Tensor, Tensor]:
        counted = max(0, real - groups[number][0])
        weights = torch.full_like(logps, -1.0)
        weights[counted:] = 0.0  # filler goes through the products, for their shape, and comes out as 0
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
    # Filler is in no group: no logits are made for it, and its gradient keeps the zeros that it began with.
    sums_of_groups: list[Tensor] = []  # for what is logged beside the loss, so that no second forward is needed

    def outer(logps: Tensor, number: int) -> tuple[Tensor, Tensor]:
        which = examples[number]
        own = list(lengths[which.start * size : which.stop * size])
        sums = sum_sequences(logps, own).view(-1, size)
        sums_of_groups.append(sums)
        # Inside the operation autograd is off. On again here it differentiates any loss of these few numbers; from them on
        # the chain rule is written out: every token of a sequence has the slope of the sequence's sum.
        with torch.enable_grad():
            leaf = sums.detach().requires_grad_()
            loss = losses(leaf, which).sum()
            (slope,) = torch.autograd.grad(loss, leaf)  # (k, size)
        slopes = [one.expand(n) for one, n in zip(slope.flatten().unbind(), own, strict=True)]
        return loss.detach(), torch.cat(slopes)  # repeat_interleave would make a GPU wait for the host

    return _head_loss(hidden, weight, low_rank, targets, groups, chunk, outer), torch.cat(sums_of_groups)


def _group(sizes: Sequence[int], limit: int) -> tuple[list[slice], list[tuple[int, int]]]:
    """Consecutive examples in groups of at most `limit` tokens, or of one example: which they are, and their tokens."""
    borders, taken = [0], 0
    for i, n in enumerate(sizes):
        # An example is never cut at a chunk's end: its logits would be computed twice, as those of a longer one are.
        if taken and taken + n > limit:
            borders.append(i)
            taken = 0
        taken += n
    borders.append(len(sizes))
    ends = [0, *accumulate(sizes)]
    return [slice(a, b) for a, b in pairwise(borders)], [(ends[a], ends[b]) for a, b in pairwise(borders)]


def sum_sequences(logps: Tensor, lengths: Sequence[int]) -> Tensor:
    """(N,) values of consecutive sequences to their sums (len(lengths),); what is left at the end is filler."""
    # Lengths are host numbers, so nothing waits for a GPU. A kernel a sequence is little beside the head's products.
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
        logits = logits if logits.dtype == torch.float64 else logits.float()  # as in training, see _HeadLoss
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


def states_and_head(model: Model, batch: Targets) -> tuple[Tensor, Tensor, LowRank | None]:
    """What a loss takes of a batch: hidden states of its targets (n, C), the head's weight (V, C), and what an adapter adds."""
    # Only the states of `rows` leave the last block: its projection, its MLP and the head are skipped for every token whose
    # prediction carries no loss. (Its attention is not: those tokens are still read by the others.)
    hidden, tied = model.states_and_head(batch.input_ids, batch.documents, rows=batch.rows)
    return hidden, *head_parts(model.lm_head, hidden, tied)


def head_chunk(precision: Precision) -> int:
    """Tokens whose logits are made at a time: as many as cost nothing.

    At GPT-2's vocabulary 256 in float32 are 51 MB; 1,024 in half, each with its float32 copy, 0.31 GB.
    """
    return 256 if precision == "fp32" else 1024


@torch.no_grad()
def target_logps(model: Model, batch: Targets, precision: Precision = "fp32") -> Tensor:
    """Log-probability of every target of a batch, in the order of `batch.targets`: (n,) float32, nats."""
    with autocast(batch.input_ids.device, precision):
        hidden, weight, low_rank = states_and_head(model, batch)
        return -token_nll(hidden, weight, batch.targets, low_rank=low_rank, chunk=head_chunk(precision))
