"""Keys and values of growing sequences, which decoding keeps from token to token.

Shapes: B sequences, T tokens, N tokens of packed prompts, H heads of queries, K heads of keys (H is a multiple), D width of
a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.models.attention import Documents, attend_documents, attend_rows

ALIGNED_COLUMNS = 16
"""Of a mask that is added to the scores. torch's memory-efficient kernel loads 16 bytes of it at a time, and torch takes a
mask whose rows lie a multiple of 8 numbers apart as it is, wherever its first column lies; any other it copies in every
layer. So a cache has a multiple of these columns, and a mask is read from such a multiple on."""


class Cache(Protocol):
    """What the model needs of keys and values that are held for growing sequences: a KVCache, or `generation.token_graph.FixedSteps`."""

    @property
    def reach(self) -> int:
        """Tokens of the longest sequence when one more is added."""

    def positions(self) -> Tensor:
        """Of the next token of every sequence: (B, 1) int64."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, window: int | None = None
    ) -> Tensor:
        """Store keys and values, of packed prompts or of one more token of every sequence, and attend.

        q and the result: (B, T, H, D); k, v: (B, T, K, D). window: as in `attend_documents`.
        """

    def advance(self, documents: Documents | None) -> None:
        """Every layer has stored them."""


@dataclass
class KVCache:
    """Keys and values of B growing sequences; made by `Model.new_cache`.

    All sequences end in the same column, so that their next tokens go into one column and what is read is one slice.

    keys, values: one a layer, each (B, K, size, D), size a multiple of ALIGNED_COLUMNS. A column before a sequence's
        first one holds a number, which the mask hides.
    copies: for every prompt to be read, how many sequences begin with it.
    starts: first column of each sequence; `first_columns` is the same on the device, (B,) int64.
    end: columns that are filled.
    mask: (B, 1, 1, size), 0 from a sequence's first column on and -inf before, added to the scores; None: all begin at once.
    read: prompts that are in.
    narrowed: for every window a mask whose columns before it are hidden too, as far as it has come.
    """

    keys: list[Tensor]
    values: list[Tensor]
    copies: Sequence[int]
    starts: list[int]
    first_columns: Tensor
    end: int
    mask: Tensor | None
    read: int = 0
    narrowed: dict[int, Tensor] = field(default_factory=dict)

    @property
    def reach(self) -> int:
        """Tokens of the longest sequence when one more is added."""
        return self.end + 1 - min(self.starts)

    def positions(self) -> Tensor:
        """Of the next token of every sequence: (B, 1) int64."""
        return (self.end - self.first_columns)[:, None]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, window: int | None = None
    ) -> Tensor:
        """As `Cache` has it."""
        if documents is None:
            return self.attend_next(layer, q, k, v, window)
        return self.attend_prompts(layer, q, k, v, documents, window)

    def advance(self, documents: Documents | None) -> None:
        """Every layer has stored them."""
        if documents is None:
            self.end += 1
        else:
            self.read += len(documents.lengths)

    def attend_prompts(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None = None
    ) -> Tensor:
        """Store the keys of packed prompts, the next ones', and attend within each. q: (1, N, H, D)."""
        start, row = 0, sum(self.copies[: self.read])
        for n, copies in zip(documents.lengths, self.copies[self.read :], strict=False):
            place = slice(row, row + copies), slice(None), slice(self.end - n, self.end)
            self.keys[layer][place] = k[0, start : start + n].transpose(0, 1)
            self.values[layer][place] = v[0, start : start + n].transpose(0, 1)
            start, row = start + n, row + copies
        return attend_documents(q, k, v, documents, window=window)

    def attend_next(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Store one more token of every sequence and attend to all before it, or a window of it. q: (B, 1, H, D)."""
        b, end = len(self.starts), self.end + 1
        begin = seen = max(min(self.starts), end - (window or end))
        mask = self.mask if begin < max(self.starts) else None  # for the sequences that begin later
        if mask is not None:
            begin -= begin % ALIGNED_COLUMNS  # columns that are masked for every sequence
            if window is not None and seen > min(self.starts):
                mask = self.narrowed.setdefault(window, mask if window in self.narrowed else mask.clone())
                mask[..., begin:seen] = -math.inf
        keys, values = self.keys[layer][:b, :, begin:end], self.values[layer][:b, :, begin:end]
        keys[:, :, -1], values[:, :, -1] = k[:, 0], v[:, 0]
        return attend_last(q, keys, values, None if mask is None else mask[:b, :, :, begin:end])

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Forget these sequences; the last ones move into their places. Returns the former numbers of those that stay."""
        order = list(range(len(self.starts)))
        for i in sorted(rows, reverse=True):
            last = len(order) - 1
            if i < last:
                order[i] = order[last]
                for held in (*self.keys, *self.values):
                    held[i, :, : self.end] = held[last, :, : self.end]
            del order[last]
        self.starts = [self.starts[i] for i in order]
        moved = torch.tensor(order, device=self.first_columns.device)
        self.first_columns = self.first_columns[moved]
        self.mask = None if self.mask is None or len(set(self.starts)) == 1 else self.mask[moved]
        self.narrowed = {}
        return order


def attend_last(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of each sequence's last token to all that is held. q and the result: (B, 1, H, D); keys: (B, K, n, D).

    Heads that share a key head take the place of several queries: nothing is repeated.
    """
    grouped = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])  # (B, K, H / K, D)
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1, 2)[:, None]


def attend(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None,
    cache: Cache | None,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """A block's attention: of what `cache` holds, inside documents, or inside rows; causal. (B, T, H, D), as q.

    window: as in `attend_documents`. Rows have none: longer ones come as documents (`Model.window`).
    """
    if cache is not None:
        return cache.attend(layer, q, k, v, documents, window)
    if documents is not None:
        return attend_documents(q, k, v, documents, dropout, window)
    return attend_rows(q, k, v, dropout)
