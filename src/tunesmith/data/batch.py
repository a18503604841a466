"""A micro-batch: texts in rows, or preference pairs end to end in one row. It can be cut in two and moved to a device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.device import put
from tunesmith.models.attention import Documents

PAD_STEP = 128  # padded batches have widths in multiples of this, so that few shapes occur


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device: texts, many to a row, or preference pairs, all in one row.

    input_ids: (B, T) int64. documents: which tokens belong together; None where every row is one text. Of a pair they
        are three stretches, prompt, chosen and rejected, of which the answers continue the prompt.
    rows: (n,) int64, which of the B * T tokens predict a target, for pairs answer by answer: the last token of a prompt
        predicts the first of either answer, so it occurs twice. targets: (n,) int64, theirs.
    sources: row numbers of the data set, one for each text or pair; empty where a row is a window of many texts.
    fill_to: n is a multiple of this. filler: how many of the last n only make it one, and count nothing.
    padding: for each row the tokens at its end that belong to no text; empty: no row has any.

    Of pairs alone, whose answers are counted chosen, rejected, chosen, ...; empty for texts:
    pairs: numbers in the list of pairs that the batch was made from. lengths: targets of each answer.
    last: (2 * pairs,) int64, the last token of each answer.
    """

    # Frozen: a step that ran out of memory is repeated with the very batches that failed. What a loss is divided by, and what
    # attention is called with, are tuples on the host and not tensors: reading them waits for no GPU.
    input_ids: Tensor
    rows: Tensor
    targets: Tensor
    documents: Documents | None = None
    sources: tuple[int, ...] = ()
    filler: int = 0
    fill_to: int = 1
    padding: tuple[int, ...] = ()
    pairs: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    last: Tensor | None = None

    @staticmethod
    def filled(input_ids: Tensor, rows: Tensor, targets: Tensor, *, fill_to: int, **facts: Any) -> Batch:
        """A batch with rows and targets filled up to a multiple of `fill_to`. facts: further fields.

        Kernels made for a shape (compiled ones, bf16 on a CPU) are then made for few of them. The filler predicts token 0
        from token 0, which costs at most `fill_to` - 1 rows of the head; losses leave it out by `filler` or `lengths`.
        """
        # Index 0 and token 0 exist in every batch and vocabulary, so filler needs no special case on its way to the loss.
        filler = -len(targets) % fill_to
        rows, targets = F.pad(rows, (0, filler)), F.pad(targets, (0, filler))
        return Batch(input_ids, rows, targets, filler=filler, fill_to=fill_to, **facts)

    @property
    def count(self) -> int:
        """What the loss is a mean over: pairs, or for texts supervised tokens."""
        # A pair's two answers make one term of its loss, however long they are; a text's every token makes one.
        return len(self.pairs) if self.pairs else len(self.targets) - self.filler

    @property
    def size(self) -> int:
        """Tokens through the model, padding counted."""
        return self.input_ids.numel()

    @property
    def tokens(self) -> int:
        """Tokens of texts or pairs, padding not counted."""
        return self.size - sum(self.padding)

    @property
    def extent(self) -> str:
        """The size in words."""
        height, width = self.input_ids.shape
        if self.pairs:
            return f"{self.count} {'pair' if self.count == 1 else 'pairs'} in {width:,} tokens"
        return f"{height} {'row' if height == 1 else 'rows'} x {width:,} tokens"

    def halves(self) -> tuple[Batch, Batch] | None:
        """Two batches with the same targets in the same texts or pairs; None for a single one.

        Rows stay whole. A single row is cut at the border between two texts or pairs that is nearest to its middle, and
        loses its padding. Reads `rows`, for which a GPU is waited; only a step that ran out of memory is cut.
        """
        height, width = self.input_ids.shape
        if height > 1:  # by rows and not by texts: the halves keep the width, for which kernels exist
            middle = height // 2 * width
            return self._part(0, middle, width), self._part(middle, self.size, width)
        borders = [border for border in self._borders() if border < self.tokens]
        if not borders:  # a text cannot be cut: its later tokens need the earlier ones
            return None
        # Nearest to the middle, because the larger half decides what is tried from now on (`halving.Halving.limit`).
        middle = min(borders, key=lambda border: abs(2 * border - self.tokens))
        return self._part(0, middle, middle), self._part(middle, self.tokens, self.tokens - middle)

    def _borders(self) -> list[int]:
        """Where each text or pair ends, counted over all B * T tokens."""
        height, width = self.input_ids.shape
        if self.documents is None:
            return [*range(width, self.size + 1, width)]
        ends = [*accumulate(self.documents.lengths)]
        if self.pairs:  # every third: an answer is of no use without its prompt, or one answer without the other
            return ends[2 : 3 * len(self.pairs) : 3]
        # Padding is a stretch too, but nothing that a part would be worth a forward pass for.
        padding = self.padding or (0,) * height
        return [end for end in ends if (end - 1) % width < width - padding[(end - 1) // width]]

    def _part(self, start: int, stop: int, width: int) -> Batch:
        """Tokens [start, stop) of all, in rows of `width`: whole rows, or a part of the only one, filled up to a steady width."""
        whole, borders = self.input_ids.shape[1], self._borders()
        first, end = bisect_right(borders, start), bisect_right(borders, stop)  # the texts or pairs inside
        added = steady_width(width, whole, self.fill_to) - width
        # The filler is left behind and made anew: half of it would fill up neither half.
        rows, targets = (t[: len(t) - self.filler] for t in (self.rows, self.targets))
        inside = (rows >= start) & (rows < stop)
        # As an index `inside` makes a GPU report how many there are: here the host waits for it.
        return Batch.filled(
            F.pad(self.input_ids.flatten()[start:stop].view(-1, width), (0, added)),
            rows[inside] - start,
            targets[inside],
            fill_to=self.fill_to,
            documents=self.documents and self._documents(self.documents, start, stop, width, added),
            sources=self.sources[first:end],
            padding=self.padding[start // whole : stop // whole] if width == whole else (added,),
            pairs=self.pairs[first:end],
            lengths=self.lengths[2 * first : 2 * end],
            # Counted from the part's first token, as `rows` are.
            last=None if self.last is None else self.last[2 * first : 2 * end] - start,
        )

    def _documents(self, documents: Documents, start: int, stop: int, width: int, added: int) -> Documents:
        """The stretches of a part, and after those of a cut row `added` tokens of padding."""
        stretches: list[list[int]] = [[] for _ in range(start, stop, width)]
        for length, end in zip(documents.lengths, accumulate(documents.lengths), strict=True):
            # By their ends, which are all different, but for an empty answer's: that belongs to the pair before the border.
            if start < end <= stop:
                stretches[(end - start - 1) // width].append(length)
        device = self.input_ids.device
        if self.pairs:  # padding no longer than the longest stretch so far, for which the model surely has positions
            return documents_of_pairs(stretches[0], added, max(documents.lengths), device)
        if added:
            stretches[0].append(added)
        return Documents.from_rows(stretches, device)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; onto a GPU the copies do not wait."""
        if device == self.input_ids.device:
            return self

        def move(t: Tensor) -> Tensor:
            return put(t, device)

        # Every tensor by its field, so that a field added later is not left behind on the host.
        moved: dict[str, Any] = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, documents=self.documents and self.documents.moved(move))


def steady_width(width: int, whole: int, fill_to: int) -> int:
    """`width` filled up to a multiple of PAD_STEP, where shapes are to be steady and that is still less than the whole."""
    # Filled up to the whole's width, a part would need the memory that has just run out.
    up = -(-width // PAD_STEP) * PAD_STEP
    return up if fill_to > 1 and up < whole else width


def documents_of_pairs(
    stretches: Sequence[int], padding: int, longest: int, device: torch.device | str = "cpu"
) -> Documents:
    """Of pairs end to end in one row, and `padding` tokens after them.

    stretches: tokens of prompt, chosen and rejected answer of each pair; both answers continue the prompt.
    longest: tokens that a stretch of padding may have. The row can be longer than the model has positions.
    """
    # One row, however long: attention and positions go by stretches, so a border between rows would only leave gaps.
    filler = [min(longest, padding - at) for at in range(0, padding, longest)]
    parents = [p for prompt in range(0, len(stretches), 3) for p in (-1, prompt, prompt)] + [-1] * len(filler)
    return Documents.from_rows([[*stretches, *filler]], device, parents)
