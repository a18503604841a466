"""The order of an epoch's rows, and micro-batches by number: any of them can be asked for at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from tunesmith.data.batch import Batch
from tunesmith.data.packing import Groups, pack

Array = np.ndarray[Any, Any]
SAMPLE = -1  # in place of an epoch's number: the order in which rows are drawn for estimates of the training loss


@dataclass(frozen=True)
class BatchLayout:
    """How rows are laid out in micro-batches; fields as the options of the same names.

    loss_on: of texts; pairs have theirs on the answers.
    shuffle: False keeps the rows in the order that they were given in, the same in every epoch.
    fill_to: targets of a batch are filled up to a multiple of this. Above 1 other shapes are kept to few values too: widths
        of rows, and for texts the number of rows in the short last batch of an epoch.
    """

    batching: str
    block_size: int
    batch_size: int
    loss_on: str = "auto"
    truncation: str = "auto"
    seed: int = 0
    shuffle: bool = True
    fill_to: int = 1


class EpochRows(Protocol):
    """Rows in an order for each epoch, and how they become a batch.

    endless: whether rows go on beyond rows_per_epoch, so that epochs have no ends.
    """

    @property
    def layout(self) -> BatchLayout: ...
    @property
    def endless(self) -> bool: ...
    @property
    def rows_per_epoch(self) -> int: ...
    def batch(self, epoch: int, places: range) -> Batch:
        """The rows at these places of an epoch, or of SAMPLE, as one batch."""


# Covariant: whoever takes batches of texts or windows takes batches of texts.
R = TypeVar("R", bound=EpochRows, covariant=True)


@dataclass(frozen=True)
class Batches(Generic[R]):
    """Micro-batches by number: `batches[i]` is the same whenever it is asked for, so a run resumes at any step.

    Each epoch has its own order, drawn from (seed, epoch), and holds each row once: its last batch is short where rows are
    left over. Windows are drawn at random for ever; no batch of them is short. Estimates of the training loss have rows of
    their own (`sample`): those of the first batches are learned first, and would make the loss look lower than it is.
    """

    rows: R

    @property
    def rows_per_epoch(self) -> int:
        """Rows of batches in an epoch; of windows, as many as the stream has blocks."""
        return self.rows.rows_per_epoch

    @property
    def batch_size(self) -> int:
        """Rows in a batch."""
        return self.rows.layout.batch_size

    @property
    def per_epoch(self) -> int | None:
        """Batches in an epoch; None where epochs have no ends."""
        return None if self.rows.endless else -(-self.rows_per_epoch // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        """Micro-batch number `index`, counted from 0 over the whole training."""
        # A pure function of the number: no iterator whose state a checkpoint would have to hold, and no rows to skip at a resume.
        epoch, number = divmod(index, self.per_epoch) if self.per_epoch else (0, index)
        return self._batch(epoch, number, beyond=self.rows.endless)

    def fixed(self, limit: int | None = None) -> Iterator[Batch]:
        """At most `limit` batches that are the same at every call: each row once, and only here the last may be short."""
        # Shuffled, epoch 0's order is a random one already: its first few batches are a fair sample of all rows.
        return self._few(0, limit)

    def sample(self, limit: int) -> Iterator[Batch]:
        """As `fixed`, of rows drawn anew from all there are: an estimate over a part of the rows that training does not favour."""
        return self._few(SAMPLE, limit)

    def _few(self, epoch: int, limit: int | None) -> Iterator[Batch]:
        batches = -(-self.rows_per_epoch // self.batch_size)
        # One at a time: an estimate over the whole validation split shall not hold all of it as int64.
        return (self._batch(epoch, number) for number in range(batches)[:limit])

    def _batch(self, epoch: int, number: int, *, beyond: bool = False) -> Batch:
        # An estimate over everything ends with the rows, also for windows and with any batch size.
        start = number * self.batch_size
        stop = start + self.batch_size
        return self.rows.batch(epoch, range(start, stop if beyond else min(stop, self.rows_per_epoch)))


def order_of(seed: int, number: int) -> np.random.Generator:
    """What an epoch's order, or a window, is drawn from; SAMPLE has a stream of its own, so that it says nothing about them."""
    # Seeded by number and not drawn on from the epoch before: epoch 7 can be had without the six before it.
    return np.random.default_rng((seed, 0, 1) if number == SAMPLE else (seed, number))


def grouped(items: Array, lengths: Array, size: int) -> Groups:
    """Items, by number, packed into groups of at most `size` tokens; a longer item is a group of its own."""
    # Only pairs can be longer: their bound is for prompt + answer, and they have two answers.
    packed = pack(np.minimum(lengths[items], size), size)
    return Groups(items[packed.members], packed.borders)


def epoch_plans(lengths: Array, layout: BatchLayout) -> Callable[[int], Groups]:
    """A function from an epoch's number, or SAMPLE, to its rows in order, each a group of item numbers.

    lengths: (items,) int64, tokens of each. Packed rows hold what fits into block_size, padded ones a single item.
    """

    # Kept, as every batch asks for its epoch's: 0.2 s for a million items. Three, as training asks in turn for the epoch that
    # it is in, SAMPLE, and the next epoch, whose first batches may be made ahead. A plan takes 16 bytes an item.
    @lru_cache(maxsize=3)
    def plan(epoch: int) -> Groups:
        rng = order_of(layout.seed, epoch)
        # Shuffled before packing too: items of one length are packed in this order, so each epoch brings other neighbours.
        order = rng.permutation(len(lengths)) if layout.shuffle else np.arange(len(lengths))
        if layout.batching == "padded":
            return Groups.of_one(order)
        rows = grouped(order, lengths, layout.block_size)
        # Packing goes from long items to short: without a second shuffle every epoch would begin with the longest.
        return rows.taken(rng.permutation(len(rows))) if layout.shuffle else rows

    return plan
