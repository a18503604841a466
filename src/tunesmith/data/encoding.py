"""Segments to tokens: the ids of many rows, and of each token what it teaches.

The rule, for every tokenizer: where a segment ends a token ends, and a segment is encoded as the middle of its text
(`backend.in_the_middle`), after `Tokenizer.begun` has put in what the tokenizer does at a text's beginning and around special
tokens. So the ids before an answer are those of its prompt in training, chat and scoring. They are also those of the whole
text, and so what transformers makes of the dialogue, wherever no token would reach over a border: behind special tokens,
and before a word's space. Where one would, an answer that begins with a line break behind a line break, or a full stop
before the line breaks of the next turn, which Llama 3's and Qwen's tokenizers join, or an accent that NFC would put on what
stands before, the tokens here are cut at the border, as a model reads them that is to say the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from tunesmith.data.template import Segment
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.words import Words

Array = np.ndarray[Any, Any]

IGNORE_INDEX = -100  # the target of a token that carries no loss, as torch and transformers have it

# What a token teaches, as bits of one byte.
NEXT = 1  # its target is the token after it, which belongs to an answer or is its end
END = 2  # its target ends an answer: the token after it where NEXT is set too, else the end of text, which no row holds


def targets_of(ids: Array, flags: Array | None, end_of_text: int) -> Array:
    """What a model should say after each token of a row, or IGNORE_INDEX; shifted here and nowhere else.

    ids: (n,) int64. flags: (n,) uint8; None: every next token is learned, and the end of the text. The result: (n,) int64.
    """
    following: Array = np.append(ids[1:], end_of_text)
    if flags is None:
        return following
    targets = np.where(flags & NEXT, following, IGNORE_INDEX)
    targets[flags == END] = end_of_text
    return targets


def ids_of(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[int]:
    """Ids of the segments of one dialogue, each encoded by itself."""
    return list(chain.from_iterable(tokenizer.encode_segments(tokenizer.begun(segments, plain=False))))


def encode_rows(
    rows: Sequence[Sequence[Segment]], tokenizer: Tokenizer, words: Words | None = None
) -> tuple[Array, Array, Array]:
    """Tokens of many rows, as if every segment were encoded by itself, at nearly the cost of encoding whole rows.

    Each row is encoded once as a whole. A byte-level token has a known number of bytes, so the tokens' running sum
    shows where each segment ends. Where every end falls between two tokens the whole's tokens are the segments' tokens:
    no merge crossed a border, and before an answer's space and before a marker's line break the pre-tokeniser cuts
    anyway. Rows for which this does not hold (odd white space, answers without a space) are encoded segment by segment.
    If any row has special tokens, all are: an answer then begins without a space, where the words around the border
    could be cut differently in the whole.

    words: an encoder with a memory, of this tokenizer.

    Returns: ids (N,) int64 and flags (N,) uint8 of all rows one after the other, and tokens a row (rows,) int64.
    """
    segments = list(chain.from_iterable(rows))
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    if not tokenizer.counts_bytes or any(s.special for s in segments):
        parts = tokenizer.encode_segments(segments)
        ids, lengths = np.array(list(chain.from_iterable(parts)), np.int64), np.array([len(part) for part in parts])
    else:
        ids, lengths = _encode_words(rows, segments, row_of, tokenizer, words or Words(tokenizer))
    counts = np.bincount(row_of, lengths, len(rows)).astype(np.int64)
    return ids, _flags(segments, row_of, lengths, tokenizer.template.end), counts


def _encode_words(
    rows: Sequence[Sequence[Segment]], segments: Sequence[Segment], row_of: Array, tokenizer: Tokenizer, words: Words
) -> tuple[Array, Array]:
    """Ids of all rows, and tokens a segment, where there are no special tokens. row_of: the row of each segment."""
    texts = ["".join([s.text for s in row]) for row in rows]
    ids, counts = words.encode(texts)
    sizes, unknown = _known_sizes(tokenizer.token_bytes[ids], counts, texts)
    token_ends = np.cumsum(sizes)
    ends = np.cumsum([len(s.text) if s.text.isascii() else len(s.text.encode()) for s in segments])
    last = np.searchsorted(token_ends, ends)  # the token with which each segment ends
    on_border = token_ends[np.minimum(last, len(ids) - 1)] == ends
    first = np.diff(row_of, prepend=-1) > 0
    cut_there = np.array([not s.loss or s.text.startswith(" ") for s in segments])
    lengths = np.diff(last, prepend=-1)
    slow = np.union1d(row_of[~(on_border & (first | cut_there))], unknown)
    if len(slow):
        again = np.isin(row_of, slow)
        parts = tokenizer.encode_segments([segments[i] for i in np.flatnonzero(again).tolist()])
        lengths[again] = [len(part) for part in parts]
        ids_of, each = np.split(ids, np.cumsum(counts)[:-1]), iter(parts)
        for row in slow.tolist():
            ids_of[row] = np.array(list(chain.from_iterable(islice(each, len(rows[row])))), np.int64)
        ids = np.concatenate(ids_of)
    return ids, lengths


def _known_sizes(sizes: Array, counts: Array, texts: Sequence[str]) -> tuple[Array, Array]:
    """Bytes a token, and the rows where they are not known of every token; such a row's bytes are all at its last token."""
    row_of_token = np.repeat(np.arange(len(counts)), counts)
    unknown = np.unique(row_of_token[sizes < 0])
    if len(unknown):
        sizes = np.where(np.isin(row_of_token, unknown), 0, sizes)
        sizes[np.cumsum(counts)[unknown] - 1] = [len(texts[row].encode()) for row in unknown]
    return sizes, unknown


def _flags(segments: Sequence[Segment], row_of: Array, lengths: Array, end: str) -> Array:
    """The bits of every token. row_of, lengths: (segments,), the row of each and its tokens. end: text of the token that ends an answer."""
    loss = np.array([s.loss for s in segments])
    closes = np.array([s.closes for s in segments]) & (lengths > 0)
    is_end = np.array([s.loss and s.special and s.text == end for s in segments])
    stops = np.cumsum(lengths)
    learned, row_of_token = np.repeat(loss, lengths), np.repeat(row_of, lengths)
    flags = np.zeros(len(learned), np.uint8)
    # a row's first token is nobody's target
    flags[:-1][learned[1:] & (row_of_token[1:] == row_of_token[:-1])] = NEXT
    flags[(stops - lengths)[is_end & (np.diff(row_of, prepend=-1) == 0)] - 1] |= END
    flags[stops[closes] - 1] |= END
    return flags
