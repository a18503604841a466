"""An interpolated n-gram model over a tokenizer's tokens: the bar that a small pretrained model has to pass.

    python tools/ngram.py DATASET --tokenizer MODEL [--order 5]

Modified Kneser-Ney smoothing (Chen & Goodman 1999, section 3), interpolated down to the uniform distribution, so that
every token has a probability and all of them sum to 1. It predicts exactly what `tunesmith pretrain` trains a GPT-2 on:
every token of a text but its first, and the text's end. A text is preceded by one beginning mark, so that contexts
at its start are known as such; n-grams that begin with the mark keep their plain counts in the lower orders, since
nothing can stand before them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data.token_bytes import bits_per_byte, text_bytes
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.names import load_tokenizer
from tunesmith.options.training import DataOptions
from tunesmith.train.splits import load_splits

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Windows:
    """Texts as one line of symbols: beginning mark, tokens, end, and again. Each array is (N,) int64.

    symbols: tokens; the mark is `vocab_size`. place: how many symbols of the same text stand before this one.
    """

    symbols: Array
    place: Array

    @staticmethod
    def of(texts: Sequence[Array], vocab_size: int, end: int) -> Windows:
        """From the tokens of each text, without its end."""
        parts = [np.concatenate([[vocab_size], tokens, [end]]).astype(np.int64) for tokens in texts]
        return Windows(np.concatenate(parts), np.concatenate([np.arange(len(p)) for p in parts]))

    @property
    def predicted(self) -> Array:
        """(N,) bool: all but the marks and the texts' first tokens."""
        return self.place >= 2


@dataclass(frozen=True)
class Order:
    """The n-grams of one length: symbols seen together, in the order of their keys, with what smoothing needs.

    keys: context's number * (vocab_size + 1) + last symbol, sorted; an n-gram's number is its place here. discounted:
        count less discount, of each. total, weight: by the context's number: its counts' sum, and the share of
        probability that goes to the next shorter context.
    """

    keys: Array
    discounted: Array
    total: Array
    weight: Array


def discounts(counts: Array) -> Array:
    """(4,) what is taken off a count of 0, 1, 2, and 3 or more: Chen & Goodman 1999, eq. 26.

    Where the counts of counts do not give them (tiny texts), half of one is taken off every count.
    """
    ones, twos, threes, fours = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    if not (ones and twos and threes and fours):
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = ones / (ones + 2 * twos)
    found = np.array([0.0, 1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes])
    return np.clip(found, 0.0, [0, 1, 2, 3])


class NGram:
    """A trained model; `orders[k]` holds the n-grams of k + 1 symbols."""

    def __init__(self, texts: Sequence[Array], *, vocab_size: int, end: int, order: int = 5) -> None:
        """texts: the tokens of each, (n,) int64, without its end, the token `end`."""
        self.vocab_size, self.end = vocab_size, end
        windows = Windows.of(texts, vocab_size, end)
        numbers = windows.symbols  # of the n-gram that ends at each symbol
        contexts = np.zeros_like(numbers)
        keys = np.arange(vocab_size + 1)
        levels = []  # sorted keys, and the number of the n-gram that ends at each symbol
        for k in range(order):
            if k:
                contexts, here = _before(numbers), windows.place >= k
                keys, inverse = np.unique(
                    contexts[here] * (vocab_size + 1) + windows.symbols[here], return_inverse=True
                )
                numbers = np.full(len(numbers), -1)
                numbers[here] = inverse
            levels.append((keys, numbers))
        self.orders: list[Order] = []
        for k, (keys, numbers) in enumerate(levels):
            counted = windows.predicted & (windows.place >= k)
            if (
                k + 1 < order
            ):  # how many different symbols stand before it; from the beginning on, how often it is there
                longer = levels[k + 1][1]
                seen = np.flatnonzero(windows.predicted & (windows.place >= k + 1))
                _, first = np.unique(longer[seen], return_index=True)
                counts = np.bincount(numbers[seen[first]], minlength=len(keys))
                counts += np.bincount(numbers[counted & (windows.place == k)], minlength=len(keys))
            else:
                counts = np.bincount(numbers[counted], minlength=len(keys))
            above = len(levels[k - 1][0]) if k else 1
            self.orders.append(_smoothed(keys, counts, vocab_size, above))

    def probabilities(self, texts: Sequence[Array]) -> Array:
        """(n,) of every predicted token of the texts, one text after the other."""
        windows = Windows.of(texts, self.vocab_size, self.end)
        p = np.full(len(windows.symbols), 1.0 / self.vocab_size)
        numbers = np.zeros(len(p), np.int64)
        for k, order in enumerate(self.orders):
            contexts = _before(numbers) if k else numbers
            known = (windows.place >= k) & (contexts >= 0)
            known[known] = order.total[contexts[known]] > 0
            wanted = contexts * (self.vocab_size + 1) + windows.symbols
            at = np.minimum(np.searchsorted(order.keys, wanted), len(order.keys) - 1)
            found = (order.keys[at] == wanted) & (contexts >= 0) & (windows.place >= k)
            own = np.where(found, order.discounted[at], 0.0)
            c = contexts[known]
            p[known] = own[known] / order.total[c] + order.weight[c] * p[known]
            numbers = np.where(found, at, -1)
        return p[windows.predicted]

    def nats(self, texts: Sequence[Array]) -> float:
        """Summed -log p of every predicted token."""
        return float(-np.log(self.probabilities(texts)).sum())


def _before(numbers: Array) -> Array:
    """The number that belongs to the symbol before; nothing stands before the first."""
    return np.concatenate([[-1], numbers[:-1]])


def _smoothed(keys: Array, counts: Array, vocab_size: int, contexts: int) -> Order:
    context = keys // (vocab_size + 1)
    off = discounts(counts)[np.minimum(counts, 3)]
    total = np.bincount(context, counts, minlength=contexts)
    taken = np.bincount(context, off, minlength=contexts)
    weight = np.divide(taken, total, out=np.zeros(contexts), where=total > 0)
    return Order(keys, counts - off, total, weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="as --data.name of tunesmith pretrain")
    parser.add_argument("--tokenizer", default="gpt2", help="MODEL whose tokens are counted")
    parser.add_argument("--order", type=int, default=5)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    print(held_out(args.dataset, tokenizer, args.order))


def held_out(dataset: str, tokenizer: Tokenizer, order: int = 5) -> str:
    """The figures for the held-out texts of a data set, in a line."""
    splits = load_splits(DataOptions(name=dataset), tokenizer, prose=True)
    train = [splits.train.row(r, "all")[0] for r in splits.train_rows]
    held = [splits.validation.row(r, "all")[0] for r in splits.validation_rows]
    model = NGram(train, vocab_size=tokenizer.vocab_size, end=tokenizer.end_of_text, order=order)
    nats, tokens = model.nats(held), sum(map(len, held))
    size = sum(text_bytes(tokenizer, splits.validation.row(r, "all")[1]) for r in splits.validation_rows)
    return (
        f"interpolated {order}-gram: {nats / tokens:.4f} nats a token over {tokens:,} held-out tokens, "
        f"{bits_per_byte(nats, size):.4f} bits a byte over {size:,} bytes"
    )


if __name__ == "__main__":
    main()
