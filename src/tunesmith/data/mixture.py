"""Several data sets as one: their names and weights, and which row of which comes when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.errors import UsageError

Array = np.ndarray[Any, Any]
Part = tuple[str, float | None]


def parse_sets(name: str) -> list[Part]:
    """Names and weights of `a.jsonl*0.7,hh:helpful-base*0.3`; one part for a plain name, and for a file that is called so.

    Raises: UsageError for a weight that is no positive number, or where some sets have one and others none.
    """
    if not ("," in name or "*" in name) or _exists(name):
        return [(name, None)]
    parts = [_parse_part(part.strip(), name) for part in name.split(",") if part.strip()]
    weights = [weight for _, weight in parts]
    if None in weights and any(w is not None for w in weights):
        raise UsageError(f"--data.name {name}: give every set a weight (a.jsonl*0.7), or none")
    return parts


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a long list cannot be a file's name
        return False


def _parse_part(part: str, whole: str) -> Part:
    if "*" not in part or _exists(part):
        return part, None
    name, _, weight = part.rpartition("*")
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf") or not name.strip():
        raise UsageError(f"--data.name {whole}: {part!r} is not NAME*WEIGHT with a weight above 0")
    return name.strip(), value


def shares(counts: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """How many rows of each set: all, or as many as the weights allow until the first set runs out; no row twice.

    >>> shares([100, 1000], [0.5, 0.5]), shares([100, 1000], [None, None])
    ([100, 100], [100, 1000])
    """
    given = [w for w in weights if w is not None]
    if not given:
        return list(counts)
    total = min(n / w for n, w in zip(counts, given, strict=True))
    return [min(n, max(1, round(total * w))) for n, w in zip(counts, given, strict=True)]


def mixed(counts: Sequence[int], wanted: Sequence[int], seed: int) -> Iterator[tuple[int, int]]:
    """(set, row) of the mixture in its order, a function of its arguments alone.

    Of each set `wanted` of its `counts` rows are drawn; they keep their order, and the sets are shuffled into each other.
    """
    rng = np.random.default_rng(seed)
    chosen = [map(int, np.sort(rng.permutation(n)[:k])) for n, k in zip(counts, wanted, strict=True)]
    for part in rng.permutation(np.repeat(np.arange(len(wanted), dtype=np.int16), wanted)):
        yield int(part), next(chosen[part])
