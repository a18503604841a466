"""What values of the two answers of many pairs come to: how often the chosen one is ahead, by how much, and what length alone reaches."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tunesmith.data.pairstore import PairStore
from tunesmith.judge.measures import interval_record, like_length
from tunesmith.stats import clustered_share, ratio_interval

Array = np.ndarray[Any, Any]


def preference_record(values: Array, store: PairStore, numbers: Array, by: str) -> tuple[dict[str, Any], list[str]]:
    """Accuracy and margin of (pairs, 2) values, beside what length alone would reach; and what of the pairs repeats others.

    numbers: (pairs,) of the pairs in their store. One that stands there twice counts once; those of one prompt are a cluster.
    """
    once = np.array(store.store.firsts(numbers, 3)) == numbers
    repeats = len(numbers) - int(once.sum())
    notes = [f"{repeats:,} of the {len(numbers):,} pairs repeat another one; each counts once"] * bool(repeats)
    values, numbers = values[once], numbers[once]
    lengths = store.lengths[numbers]
    better = values[:, 0] > values[:, 1]
    chosen, rejected = lengths[:, 1], lengths[:, 2]
    like = np.array([like_length(a, b) for a, b in zip(chosen, rejected, strict=True)])
    longer = np.where(chosen == rejected, 0.5, chosen > rejected)
    prompts = store.prompts(numbers)
    if (different := int(prompts.max()) + 1) < len(values):
        notes.append(
            f"the {len(values):,} pairs have {different:,} different prompts; the intervals take the pairs of one prompt as one unit"
        )

    def by_prompt(of_pairs: Array, pairs: Array) -> tuple[list[float], list[float]]:
        """Of each prompt the sum of a value of its pairs, and how many they are; pairs: (pairs,) bool, which ones count."""
        counts = np.bincount(prompts[pairs])
        return np.bincount(prompts[pairs], of_pairs[pairs])[counts > 0].tolist(), counts[counts > 0].tolist()

    every = np.ones(len(values), bool)
    margin = ratio_interval(*by_prompt(values[:, 0] - values[:, 1], every))
    record = {
        "pairs": len(values),
        "by": by,
        "accuracy": interval_record(clustered_share(*by_prompt(better, every))),
        "margin": interval_record(dataclasses.replace(margin, n=len(values))),
        "longer_chosen": interval_record(clustered_share(*by_prompt(longer, every))),
    }
    alike_only = clustered_share(*by_prompt(better, like)) if like.any() else None
    return record | {"accuracy_at_like_length": alike_only and interval_record(alike_only)}, notes
