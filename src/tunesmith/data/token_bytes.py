"""Tokens one by one: the text of each as it comes, and the bytes that many stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.data.tokenizer import Tokenizer


class ByteRuns:
    """Decodes one token after the other; bytes of a character that is not complete yet wait for the rest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.waiting = tokenizer, list[int]()

    def __call__(self, token: int) -> str:
        self.waiting.append(token)
        text = self.tokenizer.decode(self.waiting)
        if text.endswith("\ufffd") and len(self.waiting) < 4:
            return ""
        self.waiting = []
        return text

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token, "" where a character goes on in the next; joined they are the text of all."""
        found = [self(token) for token in tokens]
        if self.waiting:
            found[-1], self.waiting = self.tokenizer.decode(self.waiting), []
        return found


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
    """Bytes of UTF-8 that target tokens stand for. The end of a text or an answer is a target too, and has none.

    Raises: ValueError if the tokenizer is not byte-level: its tokens' bytes are not known one by one.
    """
    ids = np.asarray(targets, np.int64)
    sizes = tokenizer.token_bytes[ids[(ids != tokenizer.end_of_text) & (ids != tokenizer.end_of_answer)]]
    if (sizes < 0).any():
        raise ValueError("not a byte-level tokenizer")
    return int(sizes.sum())
