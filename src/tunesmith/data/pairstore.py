"""Preference pairs as tokens, and what is used of those that are longer than a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from tunesmith.data.tokenstore import TokenStore
from tunesmith.errors import UsageError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PairStore:
    """The preference pairs of one split as tokens; made of a TokenStore of the form `pairs`."""

    store: TokenStore

    def __len__(self) -> int:
        return len(self.store) // 3

    def tokens(self, pair: int) -> tuple[Array, Array, Array]:
        """Prompt, chosen and rejected answer of a pair; each (n,) int64. The end of an answer is not among them."""
        cuts = self.store.offsets[3 * pair : 3 * pair + 4]
        prompt, chosen, rejected = (self.store.tokens[a:b].astype(np.int64) for a, b in pairwise(cuts))
        return prompt, chosen, rejected

    @property
    def lengths(self) -> Array:
        """(pairs, 3) int64: tokens of prompt, chosen and rejected."""
        return self.store.lengths.reshape(-1, 3)

    def prompts(self, numbers: Array) -> Array:
        """(n,) int64: which prompt each of these pairs has, counted from 0; equal tokens are one prompt."""
        return np.unique(self.store.firsts(numbers, 3, 1), return_inverse=True)[1]

    def place(self, pair: int) -> str:
        """`file:line` of a pair."""
        return self.store.place(3 * pair)


@dataclass(frozen=True)
class CutPair:
    """What is used of a pair: the prompt from `start` on, and the beginnings of the answers up to `stops`.

    Where a stop is the answer's length, its end is learned too, as its last target.
    """

    pair: int
    start: int
    prompt: int  # tokens used
    stops: tuple[int, int]
    ends: tuple[bool, bool]

    def __len__(self) -> int:
        return self.prompt + sum(self.stops)


@dataclass(frozen=True)
class CutPairs:
    """Many of them, as arrays; one is made an object when it is asked for.

    pairs, starts, prompts: (n,) int64. stops: (n, 2) int64. ends: (n, 2) bool.
    """

    pairs: Array
    starts: Array
    prompts: Array
    stops: Array
    ends: Array

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> CutPair:
        stops, ends = self.stops[index].tolist(), self.ends[index].tolist()
        row, start, prompt = (int(column[index]) for column in (self.pairs, self.starts, self.prompts))
        return CutPair(row, start, prompt, (stops[0], stops[1]), (ends[0], ends[1]))

    def __iter__(self) -> Iterator[CutPair]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> Array:
        """(n,) int64, tokens of each."""
        lengths: Array = self.prompts + self.stops.sum(1)
        return lengths


@dataclass
class PairCuts:
    """What cutting the pairs to a block size did, by kind, with the first few places."""

    block_size: int
    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str) -> None:
        """Count one pair."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(places := self.places.setdefault(kind, [])) < 3:
            places.append(place)

    def lines(self) -> list[str]:
        """One line a kind, for the user."""
        return [
            f"{n:,} {'pair' if n == 1 else 'pairs'}: {kind} at block_size {self.block_size:,} "
            f"({', '.join(self.places[kind])}{', ...' if n > 3 else ''})"
            for kind, n in self.counts.items()
        ]


def cut_pairs(
    store: PairStore, rows: Sequence[int] | Array, block_size: int, rule: str = "auto"
) -> tuple[CutPairs, PairCuts]:
    """Pairs whose two sequences, prompt + answer, have at most `block_size` tokens, and what had to be done for it.

    rule: keep_end (and auto): the prompt loses its beginning, the answers stay whole, and a pair with an answer that
        is too long by itself is left out; keep_start: each sequence is cut at its end, as many courses do, and a pair
        whose answers are then the same is left out; drop: long pairs are left out.
    """
    if rule == "split":
        raise UsageError("--data.truncation split is for plain texts; for pairs use keep_end, keep_start or drop")
    cuts, numbers = PairCuts(block_size), np.asarray(rows, np.int64)
    lengths = store.lengths[numbers]
    starts, prompts, stops = np.zeros(len(numbers), np.int64), lengths[:, 0].copy(), lengths[:, 1:].copy()
    kept = np.ones(len(numbers), np.bool_)
    # A loop over the long pairs alone, which are few: the rest keep what the arrays began with, whole prompt and whole answers.
    for i in np.flatnonzero(prompts + stops.max(1) > block_size).tolist():
        row = int(numbers[i])
        kind, cut = _cut_pair(store, row, lengths[i].tolist(), block_size, rule)
        cuts.add(kind, store.place(row))
        if cut is None:
            kept[i] = False
        else:
            starts[i], prompts[i], stops[i] = cut
    ends = stops == lengths[:, 1:]  # of an answer that was cut the model is not taught that it ends there
    return CutPairs(numbers[kept], starts[kept], prompts[kept], stops[kept], ends[kept]), cuts


def _cut_pair(
    store: PairStore, row: int, lengths: Sequence[int], block_size: int, rule: str
) -> tuple[str, tuple[int, int, tuple[int, int]] | None]:
    """What happens to a pair that is too long, and its start, tokens of the prompt and stops; None: it is left out."""
    prompt, chosen, rejected = lengths
    if rule == "drop":
        return "too long, left out", None
    if rule == "keep_start":
        stops = (min(chosen, block_size - prompt), min(rejected, block_size - prompt))
        _, a, b = store.tokens(row)
        # Cut to the same tokens, a pair says that a text is better than itself: the two gradients cancel, and it only counts.
        same_end = (stops[0] == chosen) == (stops[1] == rejected)
        if prompt >= block_size or (same_end and np.array_equal(a[: stops[0]], b[: stops[1]])):
            return "answers become identical, left out", None
        return "the end of an answer lost", (0, prompt, stops)
    over = prompt + max(chosen, rejected) - block_size
    if prompt - over < 1:
        return "an answer leaves no room for the prompt, left out", None
    return "the beginning of the prompt lost", (over, prompt - over, (chosen, rejected))
