"""Rows of texts for batches: packed, padded or random windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from tunesmith.data.batch import PAD_STEP, Batch
from tunesmith.data.cutting import Piece, cut_rows, taught
from tunesmith.data.encoding import IGNORE_INDEX
from tunesmith.data.epochs import SAMPLE, BatchLayout, epoch_plans, order_of
from tunesmith.data.tokenstore import TokenStore
from tunesmith.errors import UsageError, UserError
from tunesmith.models.attention import Documents

Array = np.ndarray[Any, Any]
LossOn = Literal["assistant", "all"]


def resolve_loss_on(loss_on: str, batching: str) -> LossOn:
    """What `auto` means: the paper's windows put loss on all tokens, whole dialogues on the assistant's."""
    if loss_on == "auto":
        return "all" if batching == "windows" else "assistant"
    return "all" if loss_on == "all" else "assistant"


class Stream:
    """Every text, the end-of-text token, the next text: one long line of tokens, of which parts are read when wanted."""

    def __init__(self, store: TokenStore, rows: Array) -> None:
        self.store, self.rows = store, rows
        # Where each text begins. The end-of-text token is not in the store: it counts here, and is put in as a part is read.
        self.borders = np.append(0, np.cumsum(store.lengths[rows] + 1))

    def __len__(self) -> int:
        return int(self.borders[-1])

    def part(self, start: int, stop: int) -> Array:
        """Tokens [start, stop): (stop - start,) int64."""
        # The stream never exists as a whole: its tokens stay in the memory-mapped file, and only these few texts are read.
        first, last = np.searchsorted(self.borders, (start, stop - 1), side="right") - 1
        store, parts = self.store, list[Any]()
        for row in self.rows[first : last + 1].tolist():
            parts += [store.tokens[store.offsets[row] : store.offsets[row + 1]], [store.end_of_text]]
        # Joined whole, then cut. With a text far longer than a window, such as one book, this copies all of it each time.
        begin = start - int(self.borders[first])
        return np.concatenate(parts).astype(np.int64)[begin : begin + stop - start]


class WindowRows:
    """Random windows of block_size tokens of the stream of all texts, cut without regard to where one begins.

    endless: a window's place is drawn from (seed, its number), so that numbers, and training, go on for ever.
    """

    loss_on: LossOn = "all"
    endless = True

    def __init__(self, store: TokenStore, numbers: Sequence[int] | Array, layout: BatchLayout) -> None:
        """numbers: rows of the store, in the order of the stream.

        Raises: UsageError for sizes below 1 or loss on the assistant alone; UserError if the windows are longer than the data.
        """
        _check_sizes(layout)
        if resolve_loss_on(layout.loss_on, layout.batching) != "all":
            raise UsageError(
                "--data.batching windows cuts through dialogues and puts loss on all tokens; use packed with --data.loss_on assistant"
            )
        self.store, self.layout = store, layout
        self.stream = Stream(store, np.asarray(numbers, np.int64))
        # There are no epochs, but estimates and `train.epochs` need a size: the windows that the stream would be cut into.
        self.rows_per_epoch = max(1, len(self.stream) // layout.block_size)
        if len(self.stream) <= layout.block_size:
            raise UserError(
                f"{len(self.stream):,} tokens are too few for windows of {layout.block_size:,}; lower --data.block_size"
            )

    def cut_lines(self) -> list[str]:
        """Nothing is lost by windows."""
        return []

    def batch(self, epoch: int, places: range) -> Batch:
        """The windows of these numbers: of the training's stream, or of SAMPLE's."""
        width, seed = self.layout.block_size, self.layout.seed
        # Never drawn itself: a window needs one more token after it, as its last target.
        last = len(self.stream) - width
        if epoch == SAMPLE:
            # One stream for all windows of an estimate, read from its start each time: window n is the same at any batch size.
            starts = order_of(seed, SAMPLE).integers(last, size=places[-1] + 1)[places[0] :].tolist()
        else:
            starts = [int(order_of(seed, number).integers(last)) for number in places]
        ids = np.stack([self.stream.part(a, a + width + 1) for a in starts])
        inputs, targets = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy()).flatten()
        # No documents: as in the paper, attention runs across the texts of a window. And so every batch has the same shape and
        # the same host numbers, without which a step cannot be recorded (train/step_graph.py).
        return Batch(inputs, torch.arange(len(targets)), targets)


class TextRows:
    """Texts or dialogues, cut to block_size: as many as fit into a row side by side, or padded, one to a row."""

    endless = False

    def __init__(self, store: TokenStore, numbers: Sequence[int] | Array, layout: BatchLayout) -> None:
        """numbers: rows of the store. Raises: UsageError for sizes below 1; UserError if nothing is left to learn from."""
        _check_sizes(layout)
        self.store, self.layout = store, layout
        self.loss_on = resolve_loss_on(layout.loss_on, layout.batching)
        cut, self.truncations = cut_rows(store, numbers, layout.block_size, layout.truncation)
        # A piece without a target (its answer was cut off) would take room in a row, and time, for nothing.
        self.pieces = cut if self.loss_on == "all" else cut.taken(np.flatnonzero(taught(store, cut)))
        if not len(self.pieces):
            without = [f"{len(cut):,} have no target at block_size {layout.block_size:,}"] if len(cut) else []
            raise UserError(
                f"no row of {store.source.name} ({store.split}) is left to learn from: {'; '.join([*self.cut_lines(), *without])}"
            )
        self.plan = epoch_plans(self.pieces.lengths, layout)
        # As many in every epoch: how many rows packing needs depends on the lengths, not on which piece has which.
        self.rows_per_epoch = len(self.plan(0))

    def cut_lines(self) -> list[str]:
        """What cutting to block_size did, for the user."""
        return [line for truncation in self.truncations for line in truncation.lines(self.layout.block_size)]

    def _row(self, epoch: int, place: int) -> list[Piece]:
        return [self.pieces[i] for i in self.plan(epoch)[place].tolist()]

    def fixed_pieces(self) -> Iterator[list[Piece]]:
        """The pieces of each batch of `Batches.fixed`, in the order in which they stand there."""
        # A batch says which rows it holds, but not which stretch of them: the loss of a single answer needs both.
        for start in range(0, self.rows_per_epoch, self.layout.batch_size):
            stop = min(start + self.layout.batch_size, self.rows_per_epoch)
            yield [piece for place in range(start, stop) for piece in self._row(0, place)]

    def batch(self, epoch: int, places: range) -> Batch:
        """The rows at these places of an epoch, and where shapes are to be steady empty ones for those that an epoch's end lacks."""
        rows = [self._row(epoch, place) for place in places]
        # No more of them than an epoch has rows: a batch_size beyond the data would be padding for ever.
        if self.layout.fill_to > 1:
            rows += [[]] * (min(self.layout.batch_size, self.rows_per_epoch) - len(rows))
        return self._assemble(rows)

    def _assemble(self, rows: Sequence[Sequence[Piece]]) -> Batch:
        width = self.layout.block_size
        if self.layout.batching == "padded":
            # In steps: a block of 1,024 then has eight widths, for which kernels are made, and not a thousand.
            longest = max(len(piece) for row in rows for piece in row)
            width = min(width, -(-longest // PAD_STEP) * PAD_STEP)
        # What padding holds does not matter, as nothing attends to it; but it must be a token that the model has. In int64, as
        # an embedding wants it: stored tokens have two or four bytes.
        input_ids = np.full((len(rows), width), self.store.end_of_text, np.int64)
        # (B, T) on the host only: what goes to the device are the n targets that count, and where they are.
        targets = np.full((len(rows), width), IGNORE_INDEX, np.int64)
        stretches, padding = [], []
        for i, row in enumerate(rows):
            at = 0
            for piece in row:
                stop = at + len(piece)
                input_ids[i, at:stop], targets[i, at:stop] = self.store.row(
                    piece.row, self.loss_on, piece.start, piece.stop
                )
                at = stop
            # Padding is a stretch like the others, for stretches have to add up to the row (`Documents.from_rows`).
            padding.append(width - at)
            stretches.append([len(piece) for piece in row] + ([width - at] if at < width else []))
        # Found here on the host: a GPU would have to report how many there are before head and loss could be launched.
        supervised = np.flatnonzero(targets.ravel() != IGNORE_INDEX)
        return Batch.filled(
            torch.from_numpy(input_ids),
            torch.from_numpy(supervised),
            torch.from_numpy(targets.ravel()[supervised]),
            fill_to=self.layout.fill_to,
            documents=Documents.from_rows(stretches),
            sources=tuple(piece.row for row in rows for piece in row),
            padding=tuple(padding),
        )


def text_rows(store: TokenStore, numbers: Sequence[int] | Array, layout: BatchLayout) -> TextRows | WindowRows:
    """Rows of texts as `layout.batching` has them. Raises: as the two classes."""
    return (WindowRows if layout.batching == "windows" else TextRows)(store, numbers, layout)


def _check_sizes(layout: BatchLayout) -> None:
    if layout.block_size < 1 or layout.batch_size < 1:
        raise UsageError(
            f"block_size is {layout.block_size} and batch_size {layout.batch_size}; both must be at least 1"
        )
