"""Preference pairs to batches: a pair is one stretch `prompt | chosen | rejected`, and the prompt is computed once.

Both answers continue the prompt (`attention.Documents`): each sees the prompt and itself, neither sees the other, and
the positions of each follow on the prompt's. So a pair's log-probabilities and gradients are those of the two plain
sequences prompt + chosen and prompt + rejected, for the price of one prompt. Many pairs share a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.packing import Groups, pack
from tunesmith.data.pairstore import CutPair, PairStore, cut_pairs
from tunesmith.data.texts import PAD_STEP, SAMPLE, order_of, steady_width
from tunesmith.device import put
from tunesmith.errors import UsageError, UserError
from tunesmith.models.attention import Documents

Array = np.ndarray[Any, Any]
FILL_TO = 64  # where shapes are steady, the number of targets is a multiple of this


@dataclass(frozen=True)
class PairBatch:
    """Pairs end to end, on their device; sequences are counted chosen, rejected, chosen, rejected, ...

    input_ids: (1, N) int64. documents: three stretches a pair, the answers continuing the prompt.
    rows: (n,) int64, the tokens that predict an answer's tokens, sequence by sequence; the last token of a prompt is
        there twice. targets: (n,) int64, theirs. lengths: targets of each sequence; beyond their sum is filler.
    last: (2 * pairs,) int64, the last token of each sequence.
    pairs: numbers in the list of pairs that the batch was made from. sources: numbers in the data set.
    tokens: through the model, filler not counted. fill_to: the number of targets is a multiple of this.
    """

    input_ids: Tensor
    documents: Documents
    rows: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    last: Tensor
    pairs: tuple[int, ...]
    sources: tuple[int, ...]
    tokens: int
    fill_to: int = 1

    @property
    def count(self) -> int:
        """Pairs: what a preference loss is a mean over."""
        return len(self.pairs)

    @property
    def size(self) -> int:
        """Tokens through the model, filler counted."""
        return self.input_ids.numel()

    @property
    def extent(self) -> str:
        """The size in words."""
        return f"{self.count} {'pair' if self.count == 1 else 'pairs'} in {self.size:,} tokens"

    def halves(self) -> tuple[PairBatch, PairBatch] | None:
        """Two batches of whole pairs, cut where it is nearest to the middle; None for a single pair."""
        if self.count < 2:
            return None
        ends = list(accumulate(self.documents.lengths[: 3 * self.count]))[2::3]
        cut = min(range(1, self.count), key=lambda n: abs(2 * ends[n - 1] - self.tokens))
        return self._part(0, cut), self._part(cut, self.count)

    def _part(self, first: int, end: int) -> PairBatch:
        """The pairs [first, end) of the batch."""
        every = self.documents.lengths
        before, stretches = every[: 3 * first], list(every[3 * first : 3 * end])
        start, tokens = sum(before), sum(stretches)
        skipped, lengths = sum(self.lengths[: 2 * first]), self.lengths[2 * first : 2 * end]
        wanted = slice(skipped, skipped + sum(lengths))
        parents = [p for i in range(0, len(stretches), 3) for p in (-1, i, i)]
        width = steady_width(tokens, self.size, self.fill_to)
        longest = max(every)  # the model has positions for it
        for at in range(tokens, width, longest):
            stretches.append(min(longest, width - at))
            parents.append(-1)
        filler = -sum(lengths) % self.fill_to
        return PairBatch(
            input_ids=F.pad(self.input_ids[:, start : start + tokens], (0, width - tokens)),
            documents=Documents.from_rows([stretches], self.input_ids.device, parents),
            rows=F.pad(self.rows[wanted] - start, (0, filler)),
            targets=F.pad(self.targets[wanted], (0, filler)),
            lengths=lengths,
            last=self.last[2 * first : 2 * end] - start,
            pairs=self.pairs[first:end],
            sources=self.sources[first:end],
            tokens=tokens,
            fill_to=self.fill_to,
        )

    def to(self, device: torch.device) -> PairBatch:
        """The batch on `device`; onto a GPU the copies do not wait."""
        if device == self.input_ids.device:
            return self

        def move(t: Tensor) -> Tensor:
            return put(t, device)

        tensors = {k: move(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return PairBatch(**{**vars(self), **tensors, "documents": self.documents.moved(move)})


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

    def __getitem__(self, index: int) -> PairBatch:
        """Micro-batch number `index`, counted from 0 over the whole training."""
        return self._batch(*divmod(index, self.per_epoch))

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-self.rows_per_epoch // self.batch_size)

    def fixed(self, limit: int | None = None) -> Iterator[PairBatch]:
        """At most `limit` batches that are the same at every call; each pair once, and only here the last may be short."""
        return self._few(0, limit)

    def sample(self, limit: int) -> Iterator[PairBatch]:
        """As `fixed`, of pairs drawn anew from all there are: an estimate over a part of them that training does not favour."""
        return self._few(SAMPLE, limit)

    def _few(self, epoch: int, limit: int | None) -> Iterator[PairBatch]:
        return (self._batch(epoch, number) for number in range(self.per_epoch)[:limit])

    def _batch(self, epoch: int, number: int) -> PairBatch:
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

    def of(self, numbers: Sequence[int], tokens: int) -> Iterator[PairBatch]:
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

    def assemble(self, numbers: Sequence[int]) -> PairBatch:
        """The pairs of these numbers as one batch."""
        cuts = [self.pairs[i] for i in numbers]
        parts, ends = [self._parts(cut) for cut in cuts], [cut.ends for cut in cuts]
        batch = join_pairs(parts, ends, self.store.store.end_of_text, self.block_size, self._steady_shape)
        sources = tuple(cut.pair for cut in cuts)
        return replace(batch, pairs=tuple(numbers), sources=sources, fill_to=FILL_TO if self.steady else 1)

    def _steady_shape(self, tokens: int, targets: int) -> tuple[int, int]:
        """Width of the batch, and filler at the end of its targets."""
        if not self.steady:
            return tokens, 0
        unit = self.batch_size * self.block_size if self.batching == "packed" else PAD_STEP
        return -(-tokens // unit) * unit, -targets % FILL_TO


def join_pairs(
    parts: Sequence[tuple[Array, Array, Array]],
    ends: Sequence[tuple[bool, bool]],
    end_of_text: int,
    block_size: int,
    shape: Callable[[int, int], tuple[int, int]] = lambda tokens, targets: (tokens, 0),
) -> PairBatch:
    """Pairs end to end as one batch; `pairs` and `sources` count them from 0.

    Args:
        parts: prompt and the two answers of every pair, each (n,) int64; an answer may be empty.
        ends: whether the end-of-text token is the last target of each answer.
        block_size: longest stretch of filler.
        shape: (tokens, targets) -> width of the batch, filler at the end of its targets.
    """
    ids: list[Array] = []
    rows: list[Array] = []
    targets: list[Array] = []
    stretches: list[int] = []
    parents: list[int] = []
    lengths: list[int] = []
    last: list[int] = []
    end = np.array([end_of_text])
    at = 0
    for (prompt, *answers), ended in zip(parts, ends, strict=True):
        ids += [prompt, *answers]
        parents += [-1, len(stretches), len(stretches)]
        stretches += [len(prompt), *map(len, answers)]
        before, start = at + len(prompt) - 1, at + len(prompt)
        for answer, with_end in zip(answers, ended, strict=True):
            predicted = np.concatenate([answer, end]) if with_end else answer
            rows.append(np.append(before, np.arange(start, start + len(answer)))[: len(predicted)])
            targets.append(predicted)
            lengths.append(len(predicted))
            start += len(answer)
            last.append(start - 1 if len(answer) else before)
        at = start
    flat, wanted, expected = (np.concatenate(x) for x in (ids, rows, targets))
    width, filler = shape(at, len(wanted))
    flat = np.pad(flat, (0, width - at), constant_values=end_of_text)
    for start in range(at, width, block_size):  # filler, in stretches that the model has positions for
        stretches.append(min(block_size, width - start))
        parents.append(-1)
    return PairBatch(
        input_ids=torch.from_numpy(flat)[None],
        documents=Documents.from_rows([stretches], parents=parents),
        rows=torch.from_numpy(np.pad(wanted, (0, filler))),
        targets=torch.from_numpy(np.pad(expected, (0, filler))),
        lengths=tuple(lengths),
        last=torch.tensor(last),
        pairs=tuple(range(len(parts))),
        sources=tuple(range(len(parts))),
        tokens=at,
    )
