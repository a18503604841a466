"""Best-fit packing of many lengths, and the groups that come of it, as arrays: a million items are no million objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def gather(values: Array, starts: Array, counts: Array) -> Array:
    """The stretches `values[start : start + count]` one after the other, without a loop over them.

    >>> gather(np.array([5, 6, 7, 8]), np.array([2, 0]), np.array([2, 1])).tolist()
    [7, 8, 5]
    """
    # Every output place is its own number plus a shift that is the same throughout its stretch: no loop, one array of indices.
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return values[np.repeat(starts - (ends - counts), counts) + np.arange(total)]


@dataclass(frozen=True)
class Groups(Sequence[Array]):
    """Groups of numbers, in order: group i is `members[borders[i] : borders[i + 1]]`.

    members: (N,) int64. borders: (groups + 1,) int64, from 0 to N.
    """

    members: Array
    borders: Array

    @staticmethod
    def of_one(members: Array) -> Groups:
        """Every number a group of its own."""
        return Groups(members, np.arange(len(members) + 1))

    def __len__(self) -> int:
        return len(self.borders) - 1

    def __getitem__(self, index: Any) -> Any:
        """Group `index` as an array; of a slice the list of its groups."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return self.members[self.borders[number] : self.borders[number + 1]]

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    def taken(self, order: Array) -> Groups:
        """The groups of these numbers, in this order."""
        counts = np.diff(self.borders)[order]
        return Groups(gather(self.members, self.borders[order], counts), np.append(0, np.cumsum(counts)))


def pack(lengths: Sequence[int] | Array, block_size: int) -> Groups:
    """Best-fit decreasing: indices into `lengths`, grouped into bins of at most `block_size`.

    The longest remaining item goes where it leaves the least room, among equals into the bin that was filled last.

    >>> [group.tolist() for group in pack([5, 3, 4, 2], 7)]
    [[0, 3], [2, 1]]

    Raises: ValueError for an item that is longer than a bin.
    """
    # Longest first, because a short item still fits into what long ones leave, and not the other way round. On real dialogues
    # of HH-RLHF more than 99 % of the room at 1,024 is used (tests/data/test_real_data.py).
    sizes = np.asarray(lengths, np.int64)
    # Stable, so that equals keep the caller's order: shuffled anew for an epoch, they get other neighbours.
    order = np.argsort(-sizes, kind="stable")
    if len(sizes) and sizes[order[0]] > block_size:
        raise ValueError(f"an item of {sizes[order[0]]} does not fit into rows of {block_size}")
    # A block has few lengths, a data set many items: the loop is over the lengths, so a million rows take 0.2 s.
    values, counts = np.unique(-sizes, return_counts=True)
    bins = _Bins(block_size)
    chosen = [part for n, count in zip((-values).tolist(), counts.tolist(), strict=True) for part in bins.put(n, count)]
    bin_of = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    filled = np.bincount(bin_of, minlength=bins.opened)  # items of each bin, from which the borders follow
    return Groups(order[np.argsort(bin_of, kind="stable")], np.append(0, np.cumsum(filled)))


class _Bins:
    """Bins by their free room. Items of one length are placed together, which gives what placing them one by one gives.

    While items of length n are placed, the best bin stays the best until it has less than n of room left: nothing
    else lies between. So a bin takes `room // n` of them in a row, and the bins of one room take theirs in the order
    of a stack. What is done for each item is done by numpy; the loop is over lengths and rooms.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size, self.opened = block_size, 0
        self.with_room: list[list[Array]] = [[] for _ in range(block_size + 1)]  # stacks of bins, in runs, by free room
        # Bit r is set while with_room[r] is not empty: Python's integers are as long as a block, and finding the least room that
        # is enough takes a shift and a mask in place of a search.
        self.occupied = 0

    def put(self, n: int, count: int) -> Iterator[Array]:
        """Place `count` items of length n; yields the bin of each, in runs."""
        while count:
            fitting = self.occupied >> n
            if fitting:
                room = n + (fitting & -fitting).bit_length() - 1  # the lowest bit that is set: the tightest fit
                each = room // n if n else count  # items without length all go where the first goes
                run = self._pop(room, -(-count // each))
            else:  # new bins, only now that no open one has room
                room = self.block_size
                each = room // n if n else count
                run = np.arange(self.opened, self.opened + -(-count // each))
                self.opened += len(run)
            placed = min(count, len(run) * each)
            # The last bin of the run may have got fewer items than the rest, and then belongs to the stack of another room.
            whole, rest = divmod(placed, each)
            yield np.repeat(run, each)[:placed]
            self._push(room - each * n, run[:whole])
            self._push(room - rest * n, run[whole:])
            count -= placed

    def _pop(self, room: int, most: int) -> Array:
        """Up to `most` bins with this room, the last filled first; of one run at a time."""
        run = self.with_room[room].pop()
        if len(run) > most:  # views of one array: splitting a run copies nothing
            self.with_room[room].append(run[:-most])
        elif not self.with_room[room]:
            self.occupied &= ~(1 << room)
        return run[-most:][::-1]

    def _push(self, room: int, run: Array) -> None:
        if len(run):
            self.with_room[room].append(run)
            self.occupied |= 1 << room
