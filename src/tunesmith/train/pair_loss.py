"""Preference pairs judged by a policy (DPO) or a reward model: losses to train on, estimates to report.

Sums and means are over pairs. A policy's log-probabilities are float32 sums over an answer's tokens, end included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.data.batch import Batch
from tunesmith.device import Precision, autocast
from tunesmith.models.head import head_chunk, sequence_loss_sum, states_and_head, sum_sequences, target_logps
from tunesmith.models.model import Model
from tunesmith.models.modes import evaluation_mode
from tunesmith.models.reward_head import RewardModel
from tunesmith.train.choice import Sums
from tunesmith.train.halving import within_memory
from tunesmith.train.losses import bradley_terry_loss, dpo_loss
from tunesmith.train.methods.preferences import OBSERVED

Reference = Callable[[Batch], Tensor]
"""Log-probabilities of a batch's answers under the reference: (pairs, 2) float32, chosen and rejected, no gradient."""


@dataclass(frozen=True)
class PreferenceLoss:
    """Settings of `losses.dpo_loss`."""

    beta: float = 0.1
    loss: str = "sigmoid"
    label_smoothing: float = 0.0

    def __call__(self, policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and rewards of the pairs; both arguments (pairs, 2), chosen and rejected."""
        return dpo_loss(*policy.unbind(1), *reference.unbind(1), **vars(self))


@torch.no_grad()
def answer_logps(model: Model, batch: Batch, precision: Precision = "fp32") -> Tensor:
    """Log-probabilities of the chosen and the rejected answers under `model`: (pairs, 2) float32, nats."""
    # Summed, not averaged: DPO's margin is that of whole answers, and a mean would take their lengths out of it.
    return sum_sequences(target_logps(model, batch, precision), batch.lengths).view(-1, 2)


def dpo_loss_sum(
    model: Model, batch: Batch, reference: Tensor, settings: PreferenceLoss, precision: Precision = "fp32"
) -> Tensor:
    """Algorithm 4 of the paper for one micro-batch: (5,) sums over its pairs of the loss and of OBSERVED.

    reference: (pairs, 2), what the frozen model gives for the same answers. Only the loss carries a gradient.
    """
    with autocast(batch.input_ids.device, precision):
        hidden, weight, low_rank = states_and_head(model, batch)
        loss, policy = sequence_loss_sum(
            hidden,
            weight,
            batch.targets,
            batch.lengths,
            # `which` are the pairs of one group: its loss is needed while its logits exist, before the next group's.
            lambda logps, which: settings(logps, reference[which])[0],
            low_rank=low_rank,
            chunk=head_chunk(precision),
        )
    # A second time, for the rewards and without a graph: it is about two numbers a pair, nothing beside the head.
    _, chosen, rejected = settings(policy, reference)
    return _sums(loss, chosen, rejected)


def reward_loss_sum(model: RewardModel, batch: Batch, precision: Precision = "fp32") -> Tensor:
    """Bradley-Terry for one micro-batch: (5,) sums over its pairs of the loss and of OBSERVED (rewards are the scores)."""
    scores = pair_scores(model, batch, precision)
    chosen, rejected = scores.unbind(1)
    return _sums(bradley_terry_loss(chosen, rejected).sum(), chosen.detach(), rejected.detach())


def pair_scores(model: RewardModel, batch: Batch, precision: Precision = "fp32") -> Tensor:
    """Scores of the chosen and the rejected answers, each after its prompt: (pairs, 2) float32."""
    assert batch.last is not None
    # The score is read where the answer ends; it has seen the prompt and this answer, and nothing of the other.
    with autocast(batch.input_ids.device, precision):
        return model(batch.input_ids, batch.documents, rows=batch.last).view(-1, 2)  # type: ignore[no-any-return]


def _sums(loss: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    # One tensor, so that a step reads all of it in its one wait for the device. A tie counts as wrong, for a model that gives
    # both answers the same has not preferred one.
    better = (chosen > rejected).to(chosen.dtype)
    return torch.stack([loss, *(t.sum() for t in (better, chosen - rejected, chosen, rejected))])


def estimate_dpo(
    model: Model,
    batches: Iterable[Batch],
    reference: Reference,
    settings: PreferenceLoss,
    precision: Precision = "fp32",
    kept: list[Any] | None = None,
) -> tuple[dict[str, float], Sums]:
    """Means over pairs on fixed batches, and the loss pair by pair. The means: `loss`, OBSERVED, and

    drift_chosen, drift_rejected: log-ratio of policy to reference, nats per answer; how far the policy has moved.
    sft_loss: the policy's loss on the chosen answers, nats per token.
    A batch that does not fit into memory is computed in pieces. kept: as of `halving.within_memory`.
    """
    device = model.device

    def look(batch: Batch) -> tuple[Tensor, int]:
        batch = batch.to(device)
        policy, base = answer_logps(model, batch, precision), reference(batch)
        losses, chosen, rejected = settings(policy, base)
        better = (chosen > rejected).to(losses.dtype)
        drift = policy - base
        # Nothing is read here, so that a GPU works through all batches without a wait. The last row is not a mean over pairs
        # but over tokens, as the loss of `sft` on the same answers is.
        columns = torch.stack([losses, better, chosen - rejected, chosen, rejected, *drift.t(), -policy[:, 0]])
        return columns, sum(batch.lengths[::2])

    with evaluation_mode(model):
        pieces = [piece for pieces in within_memory(batches, look, kept) for piece in pieces]
    # In float64: a mean over thousands of pairs, of which the same rows are compared from estimate to estimate.
    table, tokens = torch.cat([columns for columns, _ in pieces], 1).double(), sum(n for _, n in pieces)  # (8, pairs)
    *means, _ = table.mean(1).tolist()
    names = ("loss", *OBSERVED, "drift_chosen", "drift_rejected")  # in the order of the columns
    named = dict(zip(names, means, strict=True)) | {"sft_loss": table[-1].sum().item() / tokens}
    # Pair by pair, each a part of its own: whether two checkpoints differ is judged by the pairs that they share.
    return named, [(loss, 1) for loss in table[0].tolist()]


def all_pair_scores(
    model: RewardModel, batches: Iterable[Batch], precision: Precision = "fp32", kept: list[Any] | None = None
) -> Tensor:
    """`pair_scores` of all batches one after the other, without gradients: (pairs, 2). kept: as of `halving.within_memory`."""
    device = model.device

    def score(batch: Batch) -> Tensor:
        return pair_scores(model, batch.to(device), precision)

    with evaluation_mode(model):
        # The order of pairs survives the halving: pieces of a batch come one after the other.
        return torch.cat([scores for pieces in within_memory(batches, score, kept) for scores in pieces])


def estimate_reward(
    model: RewardModel, batches: Iterable[Batch], precision: Precision = "fp32", kept: list[Any] | None = None
) -> tuple[dict[str, float], Sums]:
    """Means over pairs on fixed batches, `loss` and OBSERVED, and the loss pair by pair. kept: as of `halving.within_memory`."""
    # The means of an estimate in float64, as in `estimate_dpo`; a step sums in the scores' own type.
    chosen, rejected = all_pair_scores(model, batches, precision, kept).double().unbind(1)
    losses = bradley_terry_loss(chosen, rejected)
    means = (_sums(losses.sum(), chosen, rejected) / len(losses)).tolist()
    return dict(zip(("loss", *OBSERVED), means, strict=True)), [(loss, 1) for loss in losses.tolist()]
