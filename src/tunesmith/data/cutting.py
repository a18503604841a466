"""Rows that are longer than a block: which pieces of them are used, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tunesmith.data.encoding import END
from tunesmith.data.tokenstore import TokenStore
from tunesmith.errors import UsageError, UserError
from tunesmith.options.training import BlockSize, DataOptions

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Piece:
    """A stretch [start, stop) of row `row` that is short enough for a batch row."""

    row: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Pieces:
    """Many pieces, as arrays (n,) int64; one is made an object when it is asked for."""

    rows: Array
    starts: Array
    stops: Array

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Piece:
        return Piece(int(self.rows[index]), int(self.starts[index]), int(self.stops[index]))

    def __iter__(self) -> Iterator[Piece]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> Array:
        """(n,) int64, tokens of each."""
        lengths: Array = self.stops - self.starts
        return lengths

    def taken(self, which: Array) -> Pieces:
        """The pieces of these numbers."""
        return Pieces(self.rows[which], self.starts[which], self.stops[which])


@dataclass
class Truncation:
    """How many rows were too long, what was done, and what it cost."""

    rule: str = ""
    cut: int = 0
    tokens_lost: int = 0
    ends_lost: int = 0
    places: list[str] = field(default_factory=list)

    def lines(self, block_size: int) -> list[str]:
        """One line for the user, or none."""
        if not self.cut:
            return []
        what = {
            "keep_end": "lost their beginning",
            "keep_start": "lost their end",
            "split": "were split",
            "drop": "were dropped",
        }
        cost = f" ({self.tokens_lost:,} tokens, {self.ends_lost:,} answer endings lost)" if self.tokens_lost else ""
        where = f": {', '.join(self.places)}{', ...' if self.cut > 3 else ''}"
        return [f"{self.cut:,} longer than block_size {block_size:,} {what[self.rule]}{cost}{where}"]


USUAL_BLOCK = 1024  # tokens: what block_size auto does not go beyond, so that a long context is no surprise in memory


def resolve_block_size(asked: BlockSize, positions: int, model: str) -> int:
    """Tokens of a row for a model that can read `positions`. Raises: UserError if more were asked for."""
    if asked == "auto":
        return min(positions, USUAL_BLOCK)
    if asked > positions:
        raise UserError(
            f"--data.block_size {asked:,} is more than {model} can hold: it reads texts of up to {positions:,} tokens. "
            f"Use {positions} or less, or auto"
        )
    return asked


def block_size_of(data: DataOptions) -> int:
    """Tokens of a row in resolved options."""
    assert data.block_size != "auto"
    return data.block_size


def cut_rows(
    store: TokenStore, rows: Sequence[int] | Array, block_size: int, rule: str = "auto"
) -> tuple[Pieces, list[Truncation]]:
    """Pieces of at most `block_size` tokens, and what had to be cut.

    rule: keep_end (cut the beginning, so that the last answer and its end stay), keep_start, split (consecutive pieces,
        nothing lost), drop; auto: split for plain text, keep_end for dialogues.
    """
    if block_size < 1:
        raise UsageError(f"--data.block_size is {block_size}, expected at least 1")
    numbers = np.asarray(rows, np.int64)
    lengths = store.lengths[numbers]
    over = lengths > block_size
    plain = np.asarray(store.plain[numbers], np.bool_) if rule == "auto" else np.full(len(numbers), rule == "split")
    other = "keep_end" if rule in ("auto", "split") else rule  # what is done with a long row that is not split
    counts = np.where(over & plain, -(-lengths // block_size), 1)
    if other == "drop":
        counts[over] = 0
    first = np.where(over & ~plain & (other == "keep_end"), lengths - block_size, 0)
    of_row = np.repeat(np.arange(len(numbers)), counts)
    nth = np.arange(len(of_row)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = first[of_row] + nth * block_size
    pieces = Pieces(numbers[of_row], starts, np.minimum(starts + block_size, lengths[of_row]))
    told = [
        _truncation(store, how, numbers[which], block_size)
        for how, which in (("split", np.flatnonzero(over & plain)), (other, np.flatnonzero(over & ~plain)))
        if len(which)
    ]
    if len(told) == 2 and not plain[np.argmax(over)]:
        told.reverse()  # in the order of the first rows
    return pieces, told


def _truncation(store: TokenStore, how: str, rows: Array, block_size: int) -> Truncation:
    """What cutting these rows, which are all too long, by one rule does."""
    starts, stops = store.offsets[rows], store.offsets[rows + 1]
    places = [f"{store.place(row)} with {store.offsets[row + 1] - store.offsets[row]:,}" for row in rows[:3].tolist()]
    note = Truncation(how, len(rows), places=places)
    if how == "split":
        return note
    if how == "keep_end":
        stops = stops - block_size
    elif how == "keep_start":
        starts = starts + block_size
    note.tokens_lost = int((stops - starts).sum())
    lost = zip(starts.tolist(), stops.tolist(), strict=True)
    note.ends_lost = sum(int(np.count_nonzero(store.flags[a:b] & END)) for a, b in lost)
    return note


def taught(store: TokenStore, pieces: Pieces) -> Array:
    """(pieces,) bool: whether a piece holds a target, with the loss on the assistant's turns."""
    found = store.taught[pieces.rows] > 0
    lengths = store.lengths[pieces.rows]
    for i in np.flatnonzero(found & (pieces.lengths < lengths)).tolist():  # of a row that was cut
        at = int(store.offsets[pieces.rows[i]])
        found[i] = store.flags[at + pieces.starts[i] : at + pieces.stops[i]].any()
    return found
