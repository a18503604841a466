"""How the next token is drawn: temperature, top-k, top-p, from a random stream for each prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import UsageError

NUCLEUS = 256  # candidates looked at first


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; see `generate`. sample: number of the draw, for several answers to one prompt."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    seed: int = 1234
    sample: int = 0

    def check(self) -> None:
        """Raises: UsageError with every value that is out of range."""
        problems = []
        if not _is(self.temperature, Real) or not self.temperature >= 0:  # not a number neither
            problems.append(f"temperature is {self.temperature!r}, expected 0 (greedy) or more")
        if not _is(self.top_p, Real) or not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p!r}, expected 0 < top_p <= 1")
        if not _is(self.top_k, Integral) or self.top_k < 0:
            problems.append(f"top_k is {self.top_k!r}, expected 0 (all) or more")
        if not _is(self.seed, Integral) or self.seed < 0:
            problems.append(f"seed is {self.seed!r}, expected 0 or more")
        if problems:
            raise UsageError("; ".join(problems))


def check_counts(**counts: Any) -> None:
    """Raises: UsageError for one that is no whole number of at least 1."""
    wrong = [
        f"{name} is {n!r}, expected a whole number of at least 1"
        for name, n in counts.items()
        if not _is(n, Integral) or n < 1
    ]
    if wrong:
        raise UsageError("; ".join(wrong))


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def stream_of(sampling: Sampling, sample: int, prompt: Sequence[int], n: int) -> np.ndarray[Any, Any]:
    """n numbers in [0, 1) that depend on the seed, the sample's number and the prompt's own tokens."""
    digest = hashlib.sha256(np.array(prompt, np.int64).tobytes()).digest()
    return np.random.default_rng([sampling.seed, sampling.sample + sample, *digest]).random(n)


def sample_tokens(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One token a row by inverting the cumulative distribution at `uniform`.

    Args:
        logits: (B, V). uniform: (B,) float64 in [0, 1).
    Returns: (B,) int64. With top_p, the smallest set of most likely tokens whose mass reaches top_p is kept and the
        rest has probability 0.
    """
    if sampling.temperature == 0:
        return logits.argmax(1)
    p = (logits.double() / sampling.temperature).softmax(1)
    if sampling.top_k:
        best, order = p.topk(min(p.shape[1], sampling.top_k))  # sorted, most likely first
        return _from_nucleus(best / best.sum(1, keepdim=True), order, uniform, sampling.top_p)
    if sampling.top_p == 1:
        return _invert(p, uniform)
    tokens = torch.empty(len(p), dtype=torch.int64, device=p.device)
    rows, width = torch.arange(len(p), device=p.device), min(p.shape[1], NUCLEUS)
    while len(
        rows
    ):  # sorting everything costs more than the model does: only rows with a flat distribution look further
        best, order = (p if len(rows) == len(p) else p[rows]).topk(width)
        whole = (best.sum(1) >= sampling.top_p) | (width == p.shape[1])
        if len(rows) == len(p) and whole.all():  # the rule; choosing rows would wait for a GPU five times
            return _from_nucleus(best, order, uniform, sampling.top_p)
        tokens[rows[whole]] = _from_nucleus(best[whole], order[whole], uniform[rows[whole]], sampling.top_p)
        rows, width = rows[~whole], min(p.shape[1], 16 * width)
    return tokens


def _from_nucleus(best: Tensor, order: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """A token a row. best: (B, n), probabilities in falling order; order: (B, n), whose they are."""
    kept = best * (best.cumsum(1) - best < top_p)
    return order.gather(1, _invert(kept, uniform)[:, None])[:, 0]


def _invert(p: Tensor, uniform: Tensor) -> Tensor:
    """Smallest index whose cumulative mass exceeds `uniform` of the total. p: (B, n), not necessarily normalised."""
    cumulative = p.cumsum(1)
    found = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    last = p.shape[1] - 1 - (p > 0).flip(1).byte().argmax(1)  # rounding must not choose a token of mass 0
    return torch.minimum(found, last)
