"""Tokens one by one: the text of each as it comes, and the bytes that many stand for."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.data.tokenizer import Tokenizer


class ByteRuns:
    """Decodes one token after the other; bytes of a character that is not complete yet wait for the rest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.waiting = tokenizer, list[int]()
        self.characters = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token: int) -> str:
        if self.tokenizer.spelling is not None:
            return self.characters.decode(self.tokenizer.bytes_of(token))
        self.waiting.append(token)
        text = self.tokenizer.decode(self.waiting)
        if text.endswith("\ufffd") and len(self.waiting) < 4:
            return ""
        self.waiting = []
        return text

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token, "" where a character goes on in the next; joined they are the text of all."""
        found = [self(token) for token in tokens]
        rest = self.characters.decode(b"", final=True) + (self.tokenizer.decode(self.waiting) if self.waiting else "")
        if rest:
            found[-1] += rest
        self.waiting = []
        return found


def special_text(tokenizer: Tokenizer, number: int) -> str:
    """How a special token is written; "" for one that stands for text."""
    token = tokenizer.added.get(number)
    return token.content if token and token.special else ""


def bits_per_byte(nats: float, size: int) -> float:
    """`nats` summed over all targets, as bits for each of the `size` bytes of UTF-8 that the targets stand for.

    >>> round(bits_per_byte(8 * math.log(2), 2), 6)
    4.0

    Raises: ValueError if there are no bytes.
    """
    if size < 1:
        raise ValueError(f"bits per byte over {size} bytes")
    return nats / math.log(2) / size


def text_bytes(tokenizer: Tokenizer, targets: Sequence[int] | np.ndarray[Any, Any]) -> int:
    """Bytes of UTF-8 that target tokens stand for. The end of a text or an answer, and a text's beginning, have none.

    The bytes are those of `Tokenizer.token_bytes`: of the text as the tokenizer's normaliser leaves it.
    Raises: ValueError if the bytes of one of them are not known.
    """
    ids = np.asarray(targets, np.int64)
    edges = [tokenizer.end_of_text, tokenizer.end_of_answer, *map(tokenizer.special_id, tokenizer.begins)]
    sizes = tokenizer.token_bytes[ids[~np.isin(ids, edges)]]
    if (sizes < 0).any():
        raise ValueError("the bytes of some tokens are not known")
    return int(sizes.sum())
