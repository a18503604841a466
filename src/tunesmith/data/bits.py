"""Bits per byte: a loss by which models with different tokenizers can be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.data.tokenizer import Tokenizer


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
    """Bytes of UTF-8 that target tokens stand for. The end of a text is a target too, and has none.

    Raises: ValueError if the tokenizer is not byte-level: its tokens' bytes are not known one by one.
    """
    ids = np.asarray(targets, np.int64)
    sizes = tokenizer.token_bytes[ids[ids != tokenizer.end_of_text]]
    if (sizes < 0).any():
        raise ValueError("not a byte-level tokenizer")
    return int(sizes.sum())
