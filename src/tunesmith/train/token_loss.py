"""The loss of supervised tokens: summed for a step, estimated over fixed rows, answer by answer. Writes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.batch import Batch
from tunesmith.data.encoding import END, IGNORE_INDEX
from tunesmith.data.epochs import Batches
from tunesmith.data.texts import TextRows
from tunesmith.device import Precision, autocast
from tunesmith.models.head import head_chunk, head_nll_sum, states_and_head, token_nll
from tunesmith.models.model import Model
from tunesmith.models.modes import evaluation_mode
from tunesmith.train.halving import within_memory


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
        return math.exp(self.loss) if self.loss < 700 else math.inf  # float64 ends at exp(709.8), where Python raises


@dataclass(frozen=True)
class AnswerLoss:
    """One answer of a dialogue. turn: 1 for the dialogue's first; tokens: targets, the end included; nats: their summed loss.

    row: of the data set, so that the answers of a dialogue can be told to belong together.
    """

    row: int
    turn: int
    tokens: int
    nats: float


def nll_sum(model: Model, batch: Batch, precision: Precision = "fp32") -> Tensor:
    """Summed -log p of a batch's targets: scalar float32, nats. Trunk and head run only where a target needs them."""
    # The head is inside too: its products are in half precision, and the loss goes back to float32 at the logits.
    with autocast(batch.input_ids.device, precision):
        hidden, weight, low_rank = states_and_head(model, batch)
        chunk = head_chunk(precision)
        return head_nll_sum(hidden, weight, batch.targets, low_rank=low_rank, chunk=chunk, count=batch.count)


def target_nll(model: Model, batch: Batch, precision: Precision = "fp32") -> Tensor:
    """-log p of each of a batch's targets: (count,) float32, nats. Without gradients."""
    with evaluation_mode(model), autocast(batch.input_ids.device, precision):
        hidden, weight, low_rank = states_and_head(model, batch)
        # The filler is computed, for the shape's sake, and cut off.
        return token_nll(hidden, weight, batch.targets, low_rank=low_rank, chunk=head_chunk(precision))[: batch.count]


def answer_losses(model: Model, batches: Batches[TextRows], precision: Precision = "fp32") -> list[AnswerLoss]:
    """The loss of every answer in packed `batches` whose loss is on the assistant's turns, in the order of the batches.

    An answer that was cut counts with what is left of it; turns are those of the whole dialogue.
    """
    device, rows, answers = model.device, batches.rows, []
    store = rows.store
    # In whole batches, as pieces and targets are matched by their order: one that does not fit is not split here.
    for batch, pieces in zip(batches.fixed(), rows.fixed_pieces(), strict=True):
        # In float64 before anything is added: these are summed by answer, by turn and over all the data.
        nll = target_nll(model, batch.to(device), precision).double().cpu().numpy()
        at = 0  # targets of the batch that the pieces so far account for
        for piece in pieces:
            flags = store.flags[int(store.offsets[piece.row]) :][: piece.stop]
            # Answers that end before the piece begins were cut off or are in another piece; they count in the turn's number.
            turn = 1 + int(np.count_nonzero(flags[: piece.start] & END))
            _, targets = store.row(piece.row, rows.loss_on, piece.start, piece.stop)
            # An answer's last target carries END: what follows the last one is the answer inside which the piece was cut, or nothing.
            learned = targets != IGNORE_INDEX
            ends = np.flatnonzero(flags[piece.start :][learned] & END) + 1
            targets = targets[learned]
            for answer in np.split(nll[at : at + len(targets)], ends):
                if len(answer):
                    answers.append(AnswerLoss(piece.row, turn, len(answer), float(answer.sum())))
                    turn += 1
            at += len(targets)
        assert at == batch.count  # else losses would have gone to the wrong answers
    return answers


def estimate_loss(
    model: Model, batches: Iterable[Batch], precision: Precision = "fp32", kept: list[Any] | None = None
) -> LossEstimate:
    """Mean loss over `batches` (algorithm 2 of the paper), weighted by tokens. kept: as of `halving.within_memory`.

    A batch that does not fit into memory is computed in pieces. Raises: ValueError if the batches hold no target.
    """
    device = model.device

    def sums(batch: Batch) -> tuple[torch.Tensor, int]:
        return nll_sum(model, batch.to(device), precision), batch.count  # the count is a host number

    with evaluation_mode(model):
        results = list(within_memory(batches, sums, kept))
    # The sums stay on the device until the last batch is launched: one wait for a GPU in all, not one a batch.
    on_device = [nats for pieces in results for nats, _ in pieces]
    nats = torch.stack(on_device).tolist() if on_device else []
    each = iter(nats)
    # Pieces are put together again, so that the parts are those of the same batches whatever did not fit.
    parts = [(sum(next(each) for _ in pieces), sum(n for _, n in pieces)) for pieces in results]
    count = sum(n for _, n in parts)
    if not count:
        raise ValueError("no target in any batch")
    # Of all tokens: in a mean of the batches' means, those of a short batch would weigh more.
    return LossEstimate(sum(nats) / count, count, tuple(parts))
