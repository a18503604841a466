"""Loss estimates and perplexity over fixed rows. Returns records, writes nothing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from tunesmith.batching import Batch
from tunesmith.device import Precision, autocast
from tunesmith.gpt import GPT
from tunesmith.lora import head_parts
from tunesmith.losses import head_nll_sum


@dataclass(frozen=True)
class LossEstimate:
    """loss: nats per supervised token, every token weighing the same; tokens: how many; perplexity: exp(loss).

    parts: the same batch by batch, (summed loss, tokens), for comparisons on the same batches.
    """

    loss: float
    tokens: int
    parts: tuple[tuple[float, int], ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; training or evaluation mode as it was afterwards."""
    was_training = model.training
    if was_training:  # walking through all modules twice a generated token would be felt
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            model.train()


def nll_sum(model: GPT, batch: Batch, precision: Precision = "fp32") -> torch.Tensor:
    """Summed -log p of a batch's targets: scalar float32, nats. Trunk and head run only where a target needs them."""
    with autocast(batch.input_ids.device, precision):
        hidden = model(batch.input_ids, batch.documents, rows=batch.rows)
        weight, low_rank = head_parts(model.lm_head, hidden)
        chunk = head_chunk(precision)
        return head_nll_sum(hidden, weight, batch.targets, low_rank=low_rank, chunk=chunk, count=batch.count)


def head_chunk(precision: Precision) -> int:
    """Tokens whose logits are made at a time: as many as cost nothing."""
    return 256 if precision == "fp32" else 1024


def estimate_loss(model: GPT, batches: Iterable[Batch], precision: Precision = "fp32") -> LossEstimate:
    """Mean loss over `batches` (algorithm 2 of the paper), weighted by tokens.

    Raises: ValueError if the batches hold no target.
    """
    device = model.wte.weight.device
    with evaluation_mode(model):
        parts = [(nll_sum(model, batch.to(device), precision).item(), batch.count) for batch in batches]
    count = sum(n for _, n in parts)
    if not count:
        raise ValueError("no target in any batch")
    return LossEstimate(sum(nats for nats, _ in parts) / count, count, tuple(parts))
