"""Decoding steps on a GPU: kernels of one shape, recorded as a CUDA graph and replayed.

A step of a model of this size is a hundred kernels and more of a few microseconds each, and takes as long as Python needs
to launch them. A recording is launched at once. It repeats kernels as they were, their addresses and host numbers
included, so what changes from step to step lies in tensors that stay where they are: tokens, the column of the
cache that they go into, the sequences' first columns. Attention reads all columns up to a bound, the later ones masked:
COLUMNS and the cache's own are multiples of `models.cache.ALIGNED_COLUMNS`, as attention wants the mask.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from tunesmith.capture import capture, reason_of
from tunesmith.models.attention import Documents
from tunesmith.models.cache import Cache, KVCache, attend_last

COLUMNS = 128  # columns of the cache by which what a recording reads grows
ENOUGH_STEPS = 16  # steps that always pay for a recording, which takes as long as a few plain ones
FEW_ROWS = 8  # a batch of fewer rows costs what one row does: the weights are read

Work = Callable[[], None]
Record = Callable[[Work], Work]
"""Work on tensors that stay in place -> what does it again. The work may be done meanwhile, and more than once."""


class FixedSteps:
    """Takes the decoding steps of a batch: recorded, or plain on the KVCache where a recording does not pay or fails.

    Recordings are made anew for every batch of answers. They hold the addresses of its cache and of the weights, and a
    training, an adapter's merging or another model may have put other tensors there by the next.

    A row whose answer has ended stays in the recorded batch until three quarters have or more columns are needed.

    Args:
        next_logits: (tokens (B,), cache) -> (B, V), one more token of every sequence, without gradients.
        cache: holds the prompts; its rows are dropped between the steps, as without this.
        logits: (B, V), those after the prompts. Their memory is written to by every step.
    """

    def __init__(
        self, next_logits: Callable[[Tensor, Cache], Tensor], cache: KVCache, logits: Tensor, record: Record
    ) -> None:
        self.next_logits, self.cache, self.logits = next_logits, cache, logits
        self.record: Record | None = record
        self.replay: Work | None = None
        self.first_columns = cache.first_columns.clone()
        self.tokens = torch.zeros_like(self.first_columns)
        self.columns = torch.arange(cache.keys[0].shape[2], device=logits.device)
        self.column = self.columns[:1].clone()
        self.going = len(cache.starts)  # rows that still have an answer to make, the first ones
        self.rows = self.extent = 0  # of the recording: rows of the batch and columns that are read
        self.masks: dict[int | None, Tensor] = {}  # window -> mask of the step
        for held in (*cache.keys, *cache.values):
            held[:, :, cache.end :] = 0  # masked, but 0 times NaN, which might lie there, is NaN

    def __call__(self, tokens: Tensor, left: int) -> Tensor:
        """Logits after one more token of every sequence: (n, V), to be read before the next call.

        tokens: (n,) int64. left: steps that may still be taken, this one included.
        """
        n = len(tokens)
        outgrown = self.cache.end >= self.extent
        if self.record is not None and left >= ENOUGH_STEPS and (outgrown or max(FEW_ROWS, 4 * n) <= self.rows):
            self._set(tokens)
            outgrown = not self._recorded(self.record)
        if outgrown or self.replay is None:
            return self.next_logits(tokens, self.cache)
        self._set(tokens)
        self.replay()
        self.cache.end += 1
        return self.logits[:n]

    def _set(self, tokens: Tensor) -> None:
        """Put what a step reads into its place."""
        n, first = len(tokens), self.cache.first_columns
        self.tokens[:n] = tokens
        self.column.fill_(self.cache.end)
        if n < self.going:  # rows without an answer to make repeat the first: their positions stay within the model's
            self.first_columns[:n], self.first_columns[n:] = first, first[0]
        self.going = n

    def _recorded(self, record: Record) -> bool:
        """Make a recording for the rows and columns of now; False where that fails, once and for all."""
        self.rows = self.going
        self.extent = min(len(self.columns), math.ceil((self.cache.end + ENOUGH_STEPS) / COLUMNS) * COLUMNS)
        try:
            self.replay = record(self._step)
        except RuntimeError as error:
            self.record = self.replay = None
            why = reason_of(error)
            note = f"decoding steps are not recorded as a CUDA graph ({why}); their kernels are launched one at a time"
            warnings.warn(note, stacklevel=3)
        return self.replay is not None

    def _step(self) -> None:
        """One step from tensors in place to tensors in place. Done once more, it leaves the same."""
        self.masks = {}
        self.logits[: self.rows].copy_(self.next_logits(self.tokens[: self.rows], self))

    # ---- as a Cache, of the recorded rows --------------------------------------------------------------------------

    @property
    def reach(self) -> int:
        """Tokens of the longest sequence when one more is added."""
        return self.cache.reach

    def positions(self) -> Tensor:
        """Of the next token of every sequence: (B, 1) int64."""
        return (self.column - self.first_columns[: self.rows])[:, None]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, window: int | None = None
    ) -> Tensor:
        """Store one more token of every sequence and attend to all columns, those that hold nothing of it masked."""
        assert documents is None
        keys, values = (held[layer][: self.rows, :, : self.extent] for held in (self.cache.keys, self.cache.values))
        for held, new in ((keys, k), (values, v)):
            held.index_copy_(2, self.column, new.transpose(1, 2))
        return attend_last(q, keys, values, self._mask(window))

    def _mask(self, window: int | None) -> Tensor:
        """What is added to the scores of a step: (B, 1, 1, extent), made once for all layers of a kind."""
        window = None if window is None or window >= self.extent else window
        if (mask := self.masks.get(window)) is None:
            columns, first = self.columns[: self.extent], self.first_columns[: self.rows, None, None, None]
            hidden = (columns < first) | (columns > self.column)
            if window is not None:
                hidden |= columns <= self.column - window
            mask = self.cache.keys[0].new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)
            self.masks[window] = mask
        return mask

    def advance(self, documents: Documents | None) -> None:
        """The column is set before a step."""


def recorder(device: torch.device, steps: int) -> Record | None:
    """What records on `device`; None where nothing does, or where so few steps do not pay for it.

    Under autocast weights are cast once and kept for its time only, at addresses that a recording must not hold.
    """
    if device.type != "cuda" or steps <= ENOUGH_STEPS or torch.is_autocast_enabled("cuda"):
        return None
    return cuda_graphs(device)


def cuda_graphs(device: torch.device) -> Record:
    """Records on a CUDA device. Recordings share one memory pool: only the latest may be replayed."""
    pool = torch.cuda.graph_pool_handle()
    return lambda work: capture(work, device, pool, rehearse=True)
