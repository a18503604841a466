"""Preference pairs to batches: a pair is one stretch `prompt | chosen | rejected`, and the prompt is computed once.

Both answers continue the prompt (`attention.Documents`): each sees the prompt and itself, neither sees the other, and
the positions of each follow on the prompt's. So a pair's log-probabilities and gradients are those of the two plain
sequences prompt + chosen and prompt + rejected, for the price of one prompt. Many pairs share a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tunesmith.data.batch import PAD_STEP, Batch, documents_of_pairs
from tunesmith.data.packing import Groups, pack
from tunesmith.data.pairstore import CutPair, PairStore, cut_pairs
from tunesmith.data.texts import SAMPLE, order_of
from tunesmith.errors import UsageError, UserError

Array = np.ndarray[Any, Any]
FILL_TO = 64  # where shapes are steady, the number of targets is a multiple of this


class PairBatches:
    """Micro-batches of pairs by number: `batches[i]` is the same whenever it is asked for, so a run resumes anywhere.

    `packed`: a micro-batch is `batch_size` groups of whole pairs, each filling up to block_size tokens (a longer pair is
    a group of its own), so the number of pairs varies and the step's mean is over the pairs that it has. `padded`: it is
    exactly `batch_size` pairs. Each epoch has its own order, drawn from (seed, epoch), and holds each pair once: its last
    batch is short where rows are left over.
    """

    def __init__(
        self,
        store: PairStore,
        rows: Sequence[int] | Array,
        *,
        batching: str,
        block_size: int,
        batch_size: int,
        truncation: str = "auto",
        seed: int = 0,
        steady: bool = False,
    ) -> None:
        """Arguments as the options of the same names.

        steady: fill the batches up to a few shapes, for kernels that are made for a shape (compiled ones, bf16 on a CPU).
        Raises: UsageError for windows, which know no pairs; UserError if no pair is left to learn from.
        """
        if batching == "windows":
            raise UsageError(
                "--data.batching windows cuts through dialogues and does not support pairs; use packed or padded"
            )
        if block_size < 2 or batch_size < 1:
            raise UsageError(
                f"block_size is {block_size}, expected at least 2, and batch_size {batch_size}, at least 1"
            )
        self.store, self.batching, self.block_size, self.batch_size = store, batching, block_size, batch_size
        self.seed, self.steady = seed, steady
        self.pairs, self.cuts = cut_pairs(store, rows, block_size, truncation)
        if not len(self.pairs):
            raise UserError(
                f"no pair of {store.store.source.name} ({store.store.split}) is left to learn from: {'; '.join(self.cuts.lines())}"
            )
        self.rows_per_epoch = len(self._plan(0))

    def __len__(self) -> int:
        """Pairs in an epoch."""
        return len(self.pairs)

    @lru_cache(maxsize=8)  # noqa: B019 (they live as long as their run): of train two epochs and SAMPLE, of validation one
    def _plan(self, epoch: int) -> Groups:
        """Groups of pair numbers, in the epoch's order."""
        rng = order_of(self.seed, epoch)
        order = rng.permutation(len(self.pairs))
        if self.batching == "padded":
            return Groups.of_one(order)
        groups = self._grouped(order, self.block_size)
        return groups.taken(rng.permutation(len(groups)))

    def _grouped(self, numbers: Sequence[int] | Array, size: int) -> Groups:
        """Pairs packed into groups of at most `size` tokens."""
        order = np.asarray(numbers, np.int64)
        packed = pack(np.minimum(self.pairs.lengths[order], size), size)
        return Groups(order[packed.members], packed.borders)

    def __getitem__(self, index: int) -> Batch:
        """Micro-batch number `index`, counted from 0 over the whole training."""
        return self._batch(*divmod(index, self.per_epoch))

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-self.rows_per_epoch // self.batch_size)

    def fixed(self, limit: int | None = None) -> Iterator[Batch]:
        """At most `limit` batches that are the same at every call; each pair once, and only here the last may be short."""
        return self._few(0, limit)

    def sample(self, limit: int) -> Iterator[Batch]:
        """As `fixed`, of pairs drawn anew from all there are: an estimate over a part of them that training does not favour."""
        return self._few(SAMPLE, limit)

    def _few(self, epoch: int, limit: int | None) -> Iterator[Batch]:
        return (self._batch(epoch, number) for number in range(self.per_epoch)[:limit])

    def _batch(self, epoch: int, number: int) -> Batch:
        start = number * self.batch_size
        return self.assemble([i for row in self._plan(epoch)[start : start + self.batch_size] for i in row.tolist()])

    def used(self, micro_batches: int) -> list[int]:
        """Numbers of the pairs that the first `micro_batches` micro-batches hold."""
        return self._held(0, micro_batches)

    def sampled(self, limit: int) -> list[int]:
        """Numbers of the pairs that `sample` gives."""
        return self._held(SAMPLE, limit)

    def _held(self, epoch: int, micro_batches: int) -> list[int]:
        rows = min(micro_batches * self.batch_size, self.rows_per_epoch)  # an epoch holds every pair
        plan = self._plan(epoch)
        return sorted(plan.members[: plan.borders[rows]].tolist())

    def of(self, numbers: Sequence[int], tokens: int) -> Iterator[Batch]:
        """Batches of about `tokens` tokens that hold these pairs once, in whatever order packs best."""
        for group in self._grouped(numbers, tokens):
            yield self.assemble(group.tolist())

    def longer_chosen(self, numbers: Sequence[int]) -> float:
        """Share of these pairs whose chosen answer has more tokens, equal ones counting half: what length alone would score."""
        lengths = self.store.lengths[self.pairs.pairs[list(numbers)]]
        chosen, rejected = lengths[:, 1], lengths[:, 2]
        return float(np.mean(np.where(chosen == rejected, 0.5, chosen > rejected)))

    def key(self, number: int) -> bytes:
        """SHA-256 of exactly what a model computes for a pair: its tokens as cut, and which ends are targets."""
        cut = self.pairs[number]
        end = self.store.store.end_of_text if any(cut.ends) else None
        digest = hashlib.sha256(repr((cut.prompt, cut.stops, cut.ends, end)).encode())
        for part in self._parts(cut):
            digest.update(part.astype("<i4").tobytes())
        return digest.digest()

    def _parts(self, cut: CutPair) -> tuple[Array, Array, Array]:
        prompt, chosen, rejected = self.store.tokens(cut.pair)
        return prompt[cut.start :], chosen[: cut.stops[0]], rejected[: cut.stops[1]]

    def assemble(self, numbers: Sequence[int]) -> Batch:
        """The pairs of these numbers as one batch."""
        cuts = [self.pairs[i] for i in numbers]
        parts, ends = [self._parts(cut) for cut in cuts], [cut.ends for cut in cuts]
        unit, fill_to = 1, 1
        if self.steady:
            unit = self.batch_size * self.block_size if self.batching == "packed" else PAD_STEP
            fill_to = FILL_TO
        batch = join_pairs(parts, ends, self.store.store.end_of_text, self.block_size, unit=unit, fill_to=fill_to)
        return replace(batch, pairs=tuple(numbers), sources=tuple(cut.pair for cut in cuts))


def join_pairs(
    parts: Sequence[tuple[Array, Array, Array]],
    ends: Sequence[tuple[bool, bool]],
    end_of_text: int,
    block_size: int,
    *,
    unit: int = 1,
    fill_to: int = 1,
) -> Batch:
    """Pairs end to end as one batch; `pairs` and `sources` count them from 0.

    Args:
        parts: prompt and the two answers of every pair, each (n,) int64; an answer may be empty.
        ends: whether the end-of-text token is the last target of each answer.
        block_size: longest stretch of padding.
        unit, fill_to: the row is padded to a multiple of `unit` tokens, the targets are filled up to one of `fill_to`.
    """
    rows: list[Array] = []
    targets: list[Array] = []
    last: list[int] = []
    end = np.array([end_of_text])
    at = 0
    for (prompt, *answers), ended in zip(parts, ends, strict=True):
        before, start = at + len(prompt) - 1, at + len(prompt)
        for answer, with_end in zip(answers, ended, strict=True):
            predicted = np.concatenate([answer, end]) if with_end else answer
            rows.append(np.append(before, np.arange(start, start + len(answer)))[: len(predicted)])
            targets.append(predicted)
            start += len(answer)
            last.append(start - 1 if len(answer) else before)
        at = start
    padding = -at % unit
    input_ids = np.concatenate([*(part for pair in parts for part in pair), np.full(padding, end_of_text)])
    return Batch.filled(
        torch.from_numpy(input_ids)[None],
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate(targets)),
        fill_to=fill_to,
        documents=documents_of_pairs([len(part) for pair in parts for part in pair], padding, block_size),
        sources=tuple(range(len(parts))),
        padding=(padding,),
        pairs=tuple(range(len(parts))),
        lengths=tuple(map(len, targets)),
        last=torch.tensor(last),
    )
