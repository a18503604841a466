"""Losses of preference pairs as pure tensor functions, one value a pair; losses of tokens are in `models.head`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def _sigmoid(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    """-log sigmoid(beta * margin); smoothed, the pair counts as flipped with that probability (Mitchell 2023, eq. 3)."""
    # logsigmoid and not the log of a sigmoid, here as below: that is log 0 in float32 from a scaled margin of -89 on.
    kept, flipped = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -(1 - smoothing) * kept - smoothing * flipped


def _ipo(margin: Tensor, beta: float, _smoothing: float) -> Tensor:
    """(margin - 1 / (2 beta))^2, with summed log-probabilities as in the paper (Azar et al. 2023, arXiv 2310.12036, eq. 17)."""
    # A margin has a size to reach, not only a sign: beyond 1 / (2 beta) it is pulled back. Log-probabilities averaged
    # over tokens, which some use here, would give the same beta another meaning.
    return (margin - 1 / (2 * beta)).square()


def _hinge(margin: Tensor, beta: float, _smoothing: float) -> Tensor:
    """max(0, 1 - beta * margin) (Zhao et al. 2023, SLiC-HF, arXiv 2305.10425, normalised as in RSO, arXiv 2309.06657)."""
    # Exactly 0 for a pair that is far enough apart, which then has no gradient at all.
    return (1 - beta * margin).relu()


def _robust(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    """Unbiased where a share `smoothing` of the pairs is flipped (Chowdhury et al. 2024, arXiv 2403.00409, eq. 12)."""
    # The sign before `flipped` is what differs from smoothing. It makes the loss unbounded below: it may well be negative.
    kept, flipped = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return (-(1 - smoothing) * kept + smoothing * flipped) / (1 - 2 * smoothing)


DPO_LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sigmoid": _sigmoid,
    "ipo": _ipo,
    "hinge": _hinge,
    "robust": _robust,
}
# The losses that read label_smoothing. For the others it has to be 0: an option that is set and not read is an error.
SMOOTHED = ("sigmoid", "robust")


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-pair preference loss of a policy held to a reference, unreduced; `sigmoid` is DPO.

    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)

    Args:
        policy_chosen_logps: (B,) float32, nats; sum over the chosen response's tokens, end token included.
        policy_rejected_logps, reference_chosen_logps, reference_rejected_logps: same shape, dtype and unit; the
            reference ones carry no gradient.
        beta: > 0, nats^-1. Larger keeps the policy closer to the reference.
        loss: a key of DPO_LOSSES.
        label_smoothing: in [0, 0.5), assumed share of flipped pairs; only for `sigmoid` and `robust`.
    Returns: losses (B,), chosen_rewards (B,), rejected_rewards (B,): beta x log-ratio, detached.
    Raises: ValueError if shapes differ, or beta, loss or label_smoothing is outside of the above.
    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7; the others at their functions.
    """
    # Shapes that differ would be broadcast, (B,) against (B, 1) to (B, B), and give a loss that looks well.
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    if len({t.shape for t in logps}) > 1:
        raise ValueError(f"log-probabilities differ in shape: {[tuple(t.shape) for t in logps]}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}, expected more than 0 and finite")
    if loss not in DPO_LOSSES:
        raise ValueError(f"unknown loss {loss!r}; expected one of {', '.join(DPO_LOSSES)}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss not in SMOOTHED):
        allowed = "0 <= label_smoothing < 0.5" if loss in SMOOTHED else "0 for this loss"
        raise ValueError(f"label_smoothing is {label_smoothing} with loss {loss}, expected {allowed}")
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    losses = DPO_LOSSES[loss](chosen - rejected, beta, label_smoothing)
    # The implicit rewards are only observed: with a gradient they would hold the graph until they are logged.
    return losses, beta * chosen.detach(), beta * rejected.detach()


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected), unreduced: (B,) from two (B,) (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1)."""
    return -F.logsigmoid(chosen_scores - rejected_scores)
