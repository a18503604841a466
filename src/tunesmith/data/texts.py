"""Rows of tokens to batches: packing, random windows or padding, in a seeded order that any step can be asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from tunesmith.data.batch import PAD_STEP, Batch
from tunesmith.data.cutting import Piece, Truncation, cut_rows, taught
from tunesmith.data.packing import Groups, pack
from tunesmith.data.tokenstore import IGNORE_INDEX, TokenStore
from tunesmith.errors import UsageError, UserError
from tunesmith.models.attention import Documents

Array = np.ndarray[Any, Any]
LossOn = Literal["assistant", "all"]
SAMPLE = -1  # in place of an epoch's number: the order in which rows are drawn for estimates of the training loss


def order_of(seed: int, number: int) -> np.random.Generator:
    """What an epoch's order, or a window, is drawn from; SAMPLE has a stream of its own, so that it says nothing about them."""
    return np.random.default_rng((seed, 0, 1) if number == SAMPLE else (seed, number))


def resolve_loss_on(loss_on: str, batching: str) -> LossOn:
    """What `auto` means: the paper's windows put loss on all tokens, whole dialogues on the assistant's."""
    if loss_on == "auto":
        return "all" if batching == "windows" else "assistant"
    return "all" if loss_on == "all" else "assistant"


class Stream:
    """Every text, the end-of-text token, the next text: one long line of tokens, of which parts are read when wanted."""

    def __init__(self, store: TokenStore, rows: Array) -> None:
        self.store, self.rows = store, rows
        self.borders = np.append(0, np.cumsum(store.lengths[rows] + 1))  # where each text begins

    def __len__(self) -> int:
        return int(self.borders[-1])

    def part(self, start: int, stop: int) -> Array:
        """Tokens [start, stop): (stop - start,) int64."""
        first, last = np.searchsorted(self.borders, (start, stop - 1), side="right") - 1
        store, parts = self.store, list[Any]()
        for row in self.rows[first : last + 1].tolist():
            parts += [store.tokens[store.offsets[row] : store.offsets[row + 1]], [store.end_of_text]]
        begin = start - int(self.borders[first])
        return np.concatenate(parts).astype(np.int64)[begin : begin + stop - start]


class Batches:
    """Micro-batches by number: `batches[i]` is the same whenever it is asked for, so a run resumes at any step.

    Each epoch has its own order, drawn from (seed, epoch), and holds each row once: its last batch is short where rows are
    left over. Windows are drawn at random for ever; no batch of them is short. Estimates of the training loss have rows of
    their own (`sample`): those of the first batches are learned first, and would make the loss look lower than it is.
    """

    def __init__(
        self,
        store: TokenStore,
        rows: Sequence[int] | Array,
        *,
        batching: str,
        block_size: int,
        batch_size: int,
        loss_on: str,
        truncation: str = "auto",
        seed: int = 0,
        shuffle: bool = True,
        fill_to: int = 1,
    ) -> None:
        """Arguments as the options of the same names. shuffle: False keeps one fixed order (evaluation).

        fill_to: the number of tokens that carry loss is filled up to a multiple of this, so that kernels which are
            made for a shape (compiled ones, bf16 on a CPU) are made a few times only. For their sake the short last
            batch of an epoch gets empty rows too.

        Raises: UserError if nothing is left to learn from, or the windows are longer than the data.
        """
        self.store, self.batching, self.block_size, self.batch_size = store, batching, block_size, batch_size
        self.loss_on = resolve_loss_on(loss_on, batching)
        self.seed, self.shuffle, self.fill_to = seed, shuffle, fill_to
        if block_size < 1 or batch_size < 1:
            raise UsageError(f"block_size is {block_size} and batch_size {batch_size}; both must be at least 1")
        self.truncations: list[Truncation] = []
        if batching == "windows":
            if self.loss_on != "all":
                raise UsageError(
                    "--data.batching windows cuts through dialogues and puts loss on all tokens; use packed with --data.loss_on assistant"
                )
            self.stream = Stream(store, np.asarray(rows, np.int64))
            self.rows_per_epoch = max(1, len(self.stream) // block_size)
            if len(self.stream) <= block_size:
                raise UserError(
                    f"{len(self.stream):,} tokens are too few for windows of {block_size:,}; lower --data.block_size"
                )
            return
        cut, self.truncations = cut_rows(store, rows, block_size, truncation)
        self.pieces = cut if self.loss_on == "all" else cut.taken(np.flatnonzero(taught(store, cut)))
        if not len(self.pieces):
            raise UserError(
                f"no row of {store.source.name} ({store.split}) is left to learn from: {len(cut)} have no target at block_size {block_size}"
            )
        self.rows_per_epoch = len(self._plan(0))

    @lru_cache(maxsize=8)  # noqa: B019 (they live as long as their run): of train two epochs and SAMPLE, of validation one
    def _plan(self, epoch: int) -> Groups:
        """The rows of an epoch in order, each a group of numbers of pieces."""
        rng = order_of(self.seed, epoch)
        order = rng.permutation(len(self.pieces)) if self.shuffle else np.arange(len(self.pieces))
        if self.batching == "padded":
            return Groups.of_one(order)
        packed = pack(self.pieces.lengths[order], self.block_size)
        rows = Groups(order[packed.members], packed.borders)
        return rows.taken(rng.permutation(len(rows))) if self.shuffle else rows

    def _row(self, epoch: int, place: int) -> list[Piece]:
        """The pieces of one row of an epoch."""
        return [self.pieces[i] for i in self._plan(epoch)[place].tolist()]

    def __getitem__(self, index: int) -> Batch:
        """Micro-batch number `index`, counted from 0 over the whole training."""
        epoch, number = divmod(index, self.per_epoch) if self.per_epoch else (0, index)
        return self._batch(epoch, number)

    @property
    def per_epoch(self) -> int | None:
        """Batches in an epoch; None for windows, whose epochs have no ends."""
        return None if self.batching == "windows" else -(-self.rows_per_epoch // self.batch_size)

    def fixed(self, limit: int | None = None) -> Iterator[Batch]:
        """At most `limit` batches that are the same at every call: each row once, and only here the last may be short."""
        return self._few(0, limit)

    def sample(self, limit: int) -> Iterator[Batch]:
        """As `fixed`, of rows drawn anew from all there are: an estimate over a part of the rows that training does not favour."""
        return self._few(SAMPLE, limit)

    def _few(self, epoch: int, limit: int | None) -> Iterator[Batch]:
        batches = -(-self.rows_per_epoch // self.batch_size)
        return (self._batch(epoch, number, whole=False) for number in range(batches)[:limit])

    def _batch(self, epoch: int, number: int, *, whole: bool = True) -> Batch:
        """Batch `number` of an epoch. whole: windows beyond the epoch's rows too."""
        rows, start = self.rows_per_epoch, number * self.batch_size
        if self.batching == "windows":
            stop = start + self.batch_size
            return self._windows(range(start, stop if whole else min(stop, rows)), epoch)
        wanted = [self._row(epoch, place) for place in range(start, min(start + self.batch_size, rows))]
        if self.fill_to > 1:
            wanted += [[]] * (min(self.batch_size, rows) - len(wanted))
        return self._assemble(wanted)

    def fixed_pieces(self) -> Iterator[list[Piece]]:
        """The pieces of each batch of `fixed`, in the order in which they stand there."""
        for start in range(0, self.rows_per_epoch, self.batch_size):
            stop = min(start + self.batch_size, self.rows_per_epoch)
            yield [piece for place in range(start, stop) for piece in self._row(0, place)]

    def _windows(self, numbers: Sequence[int], stream: int = 0) -> Batch:
        """The windows of these numbers: of the training's stream, or of SAMPLE's."""
        last = len(self.stream) - self.block_size
        if stream == SAMPLE:
            starts = order_of(self.seed, SAMPLE).integers(last, size=numbers[-1] + 1)[numbers[0] :].tolist()
        else:
            starts = [int(order_of(self.seed, n).integers(last)) for n in numbers]
        ids = np.stack([self.stream.part(a, a + self.block_size + 1) for a in starts])
        inputs, targets = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy()).flatten()
        return Batch(inputs, torch.arange(len(targets)), targets)

    def _assemble(self, rows: Sequence[Sequence[Piece]]) -> Batch:
        width = self.block_size
        if self.batching == "padded":
            longest = max(len(p) for row in rows for p in row)
            width = min(self.block_size, -(-longest // PAD_STEP) * PAD_STEP)
        input_ids = np.full((len(rows), width), self.store.end_of_text, np.int64)
        targets = np.full((len(rows), width), IGNORE_INDEX, np.int64)
        lengths, padding = [], []
        for i, row in enumerate(rows):
            at = 0
            for piece in row:
                stop = at + len(piece)
                input_ids[i, at:stop], targets[i, at:stop] = self.store.row(
                    piece.row, self.loss_on, piece.start, piece.stop
                )
                at = stop
            padding.append(width - at)
            lengths.append([len(p) for p in row] + ([width - at] if at < width else []))
        supervised = np.flatnonzero(targets.ravel() != IGNORE_INDEX)
        return Batch.filled(
            torch.from_numpy(input_ids),
            torch.from_numpy(supervised),
            torch.from_numpy(targets.ravel()[supervised]),
            fill_to=self.fill_to,
            documents=Documents.from_rows(lengths),
            sources=tuple(p.row for row in rows for p in row),
            padding=tuple(padding),
        )
