"""Preference pairs to batches: a pair is one stretch `prompt | chosen | rejected`, and the prompt is computed once.

Both answers continue the prompt (`attention.Documents`): each sees the prompt and itself, neither sees the other, and
the positions of each follow on the prompt's. So a pair's log-probabilities and gradients are those of the two plain
sequences prompt + chosen and prompt + rejected, for the price of one prompt. Many pairs share a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tunesmith.data.batch import PAD_STEP, Batch, documents_of_pairs
from tunesmith.data.epochs import SAMPLE, BatchLayout, epoch_plans, grouped
from tunesmith.data.pairstore import CutPair, PairStore, cut_pairs
from tunesmith.errors import UsageError, UserError

Array = np.ndarray[Any, Any]


class PairRows:
    """Preference pairs in rows that become one stretch in a batch.

    `packed`: a row is a group of whole pairs, up to block_size tokens (a longer pair is a group of its own), so the number of
    pairs in a batch varies, and the step's mean is over the pairs that it has. `padded`: a row is one pair, so a batch has
    exactly `batch_size`.
    """

    endless = False

    def __init__(self, store: PairStore, numbers: Sequence[int] | Array, layout: BatchLayout) -> None:
        """numbers: pairs of the store.

        Raises: UsageError for windows, which know no pairs; UserError if no pair is left to learn from.
        """
        if layout.batching == "windows":
            raise UsageError(
                "--data.batching windows cuts through dialogues and does not support pairs; use packed or padded"
            )
        if layout.block_size < 2 or layout.batch_size < 1:  # a prompt and an answer need a token each
            raise UsageError(
                f"block_size is {layout.block_size}, expected at least 2, and batch_size {layout.batch_size}, at least 1"
            )
        self.store, self.layout = store, layout
        self.pairs, self.cuts = cut_pairs(store, numbers, layout.block_size, layout.truncation)
        if not len(self.pairs):
            raise UserError(
                f"no pair of {store.store.source.name} ({store.store.split}) is left to learn from: {'; '.join(self.cuts.lines())}"
            )
        # By what goes through the model, prompt and both answers, while block_size bounds the prompt and one answer.
        self.plan = epoch_plans(self.pairs.lengths, layout)
        self.rows_per_epoch = len(self.plan(0))

    def __len__(self) -> int:
        """Pairs in an epoch."""
        return len(self.pairs)

    def cut_lines(self) -> list[str]:
        """What cutting to block_size did, for the user."""
        return self.cuts.lines()

    def batch(self, epoch: int, places: range) -> Batch:
        """The pairs of the rows at these places of an epoch."""
        rows = self.plan(epoch)[places.start : places.stop]
        return self.assemble([number for row in rows for number in row.tolist()])

    def used(self, micro_batches: int) -> list[int]:
        """Numbers of the pairs that the first `micro_batches` micro-batches hold."""
        return self._held(0, micro_batches)

    def sampled(self, limit: int) -> list[int]:
        """Numbers of the pairs that `Batches.sample` gives."""
        return self._held(SAMPLE, limit)

    def _held(self, epoch: int, micro_batches: int) -> list[int]:
        # After one epoch every pair has been seen, so later epochs add none and their plans need not be made.
        rows = min(micro_batches * self.layout.batch_size, self.rows_per_epoch)
        plan = self.plan(epoch)
        return sorted(plan.members[: plan.borders[rows]].tolist())

    def of(self, numbers: Sequence[int], tokens: int) -> Iterator[Batch]:
        """Batches of about `tokens` tokens that hold these pairs once, in the order that packs best."""
        for group in grouped(np.asarray(numbers, np.int64), self.pairs.lengths, tokens):
            yield self.assemble(group.tolist())  # order is free here: each pair's numbers are kept under its own key

    def longer_chosen(self, numbers: Sequence[int]) -> float:
        """Share of these pairs whose chosen answer has more tokens, equal ones counting half: what length alone would score."""
        # Of the answers as they were written, before any cut.
        lengths = self.store.lengths[self.pairs.pairs[list(numbers)]]
        chosen, rejected = lengths[:, 1], lengths[:, 2]
        return float(np.mean(np.where(chosen == rejected, 0.5, chosen > rejected)))

    def different_prompts(self, numbers: Sequence[int]) -> int:
        """How many prompts these pairs have, as they were written: what their figures rest on."""
        return len(np.unique(self.store.prompts(self.pairs.pairs[list(numbers)])))

    def key(self, number: int) -> bytes:
        """SHA-256 of exactly what a model computes for a pair: its tokens as cut, and which ends are targets."""
        cut = self.pairs[number]
        end = self.store.store.end_of_answer if any(cut.ends) else None
        # Of the tokens themselves, not of the pair's number or file: the same pair in another order, epoch or data set is known.
        # Where prompt and answers meet belongs to it, as the same tokens divided otherwise have other targets; the token that
        # ends an answer, only where it is one.
        digest = hashlib.sha256(repr((cut.prompt, cut.stops, cut.ends, end)).encode())
        for part in self._parts(cut):
            digest.update(part.astype("<i4").tobytes())  # the same bytes on every machine
        return digest.digest()

    def _parts(self, cut: CutPair) -> tuple[Array, Array, Array]:
        prompt, chosen, rejected = self.store.tokens(cut.pair)
        return prompt[cut.start :], chosen[: cut.stops[0]], rejected[: cut.stops[1]]

    def assemble(self, numbers: Sequence[int]) -> Batch:
        """The pairs of these numbers as one batch."""
        layout, unit = self.layout, 1
        # Where shapes are to be steady packed batches have one width, or twice that where pairs are longer than their rows.
        if layout.fill_to > 1:
            unit = layout.batch_size * layout.block_size if layout.batching == "packed" else PAD_STEP
        cuts = [self.pairs[i] for i in numbers]
        batch = join_pairs(
            [self._parts(cut) for cut in cuts],
            [cut.ends for cut in cuts],
            self.store.store.end_of_answer,
            layout.block_size,
            unit=unit,
            fill_to=layout.fill_to,
        )
        # Two numberings: `pairs` finds a pair's reference, `sources` its line in the file for a message.
        return replace(batch, pairs=tuple(numbers), sources=tuple(cut.pair for cut in cuts))


def join_pairs(
    parts: Sequence[tuple[Array, Array, Array]],
    ends: Sequence[tuple[bool, bool]],
    end_of_answer: int,
    block_size: int,
    *,
    unit: int = 1,
    fill_to: int = 1,
) -> Batch:
    """Pairs end to end as one batch; `pairs` and `sources` count them from 0.

    Args:
        parts: prompt and the two answers of every pair, each (n,) int64; an answer may be empty.
        ends: whether the end of an answer is the last target of each.
        end_of_answer: its id, and that of padding, which nobody learns.
        block_size: longest stretch of padding.
        unit, fill_to: the row is padded to a multiple of `unit` tokens, the targets are filled up to one of `fill_to`.
    """
    rows: list[Array] = []  # which tokens predict an answer's, counted over the whole row
    targets: list[Array] = []
    last: list[int] = []
    end = np.array([end_of_answer])
    at = 0  # where the pair begins
    for (prompt, *answers), ended in zip(parts, ends, strict=True):
        # The prompt's last token predicts how either answer begins, so its state is computed once and read twice by the head.
        before, start = at + len(prompt) - 1, at + len(prompt)
        for answer, with_end in zip(answers, ended, strict=True):
            # The end is only ever a target: it closes the answer, and nothing is computed from it. Without it (the answer was
            # cut, or never ended) the last token predicts nothing, and its row is left out.
            predicted = np.concatenate([answer, end]) if with_end else answer
            rows.append(np.append(before, np.arange(start, start + len(answer)))[: len(predicted)])
            targets.append(predicted)
            start += len(answer)
            last.append(start - 1 if len(answer) else before)  # an empty answer is scored by its prompt
        at = start
    # As in a row of texts, padding only has to be a token that the model has.
    padding = -at % unit
    input_ids = np.concatenate([*(part for pair in parts for part in pair), np.full(padding, end_of_answer)])
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
