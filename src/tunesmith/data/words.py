"""Many texts to tokens, word by word: what GPT-2's tokenizer does with a word is asked once and kept.

Most of the Rust tokenizer's time goes into cutting texts into words and into noting where each came from, not into the
merges. Where the cut is GPT-2's, one regular expression finds the same words, and few of them are new: about five times
faster on one core. Python's `re` does not know Unicode's classes, so they are spelled out for the characters of western
texts. Texts with any other go through Rust as a whole, and so does everything for a tokenizer that cuts differently.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain, compress, islice
from typing import Any

import numpy as np

from tunesmith.data.packing import gather
from tunesmith.data.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]
KEPT = 1 << 17  # words; about 20 MB
LATIN, PUNCTUATION, PICTURES = range(0x250), range(0x2010, 0x2028), range(0x1F300, 0x1F650)
"""Characters whose classes are the same in every version of Unicode that may be at work here or in Rust."""


def _words_of(characters: Iterable[int]) -> re.Pattern[str]:
    r"""GPT-2's `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` for texts of these characters."""
    classes = {"L": "", "N": ""}
    for character in map(chr, characters):
        kind = unicodedata.category(character)[0]
        if kind in classes:
            classes[kind] += character
    letters, digits, spaces = classes["L"], classes["N"], "\t\n\v\f\r \x85\xa0"
    return re.compile(
        f"'(?:s|t|re|ve|m|ll|d)| ?[{letters}]+| ?[{digits}]+| ?[^{spaces}{letters}{digits}]+|[{spaces}]+(?![^{spaces}])|[{spaces}]+"
    )


ASCII_WORD, WORD = _words_of(range(128)), _words_of([*LATIN, *PUNCTUATION, *PICTURES])
KNOWN = re.compile("[" + "".join(f"{chr(r[0])}-{chr(r[-1])}" for r in (LATIN, PUNCTUATION, PICTURES)) + "]*")


class _Numbers(dict[str, int]):
    """Words, numbered as they come."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


class Words:
    """An encoder with a memory for words; for one thread at a time. The ids are exactly the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.cuts_as_gpt2 = tokenizer, tokenizer.cuts_as_gpt2
        self._forget()

    def _forget(self) -> None:
        self.numbers = _Numbers()
        self.ids, self.starts, self.counts = (np.zeros(0, np.int64) for _ in range(3))

    def encode(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """Ids of the texts one after the other, (N,) int64, and how many each has, (texts,) int64."""
        known = [self.cuts_as_gpt2 and (text.isascii() or bool(KNOWN.fullmatch(text))) for text in texts]
        if all(known):
            return self._by_words(texts)
        if not any(known):
            return self._whole(texts)
        by_words = np.array(known)
        parts = self._by_words(list(compress(texts, known))), self._whole(list(compress(texts, ~by_words)))
        ids, counts = (np.concatenate(pair) for pair in zip(*parts, strict=True))
        place = np.argsort(np.argsort(~by_words, kind="stable"), kind="stable")  # of each text among the parts
        return gather(ids, (np.cumsum(counts) - counts)[place], counts[place]), counts[place]

    def _whole(self, texts: Sequence[str]) -> tuple[Array, Array]:
        encoded = self.tokenizer.encode_batch(texts)
        counts = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.fromiter(chain.from_iterable(encoded), np.int64, counts.sum()), counts

    def _by_words(self, texts: Sequence[str]) -> tuple[Array, Array]:
        if len(self.numbers) > KEPT:
            self._forget()
        words = [(ASCII_WORD if text.isascii() else WORD).findall(text) for text in texts]
        ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
        total = int(ends[-1]) if len(ends) else 0
        numbers = np.fromiter(map(self.numbers.__getitem__, chain.from_iterable(words)), np.int64, total)
        if new := list(islice(self.numbers, len(self.counts), None)):
            ids, counts = self._whole(new)
            self.ids, self.counts = np.concatenate([self.ids, ids]), np.concatenate([self.counts, counts])
            self.starts = np.cumsum(self.counts) - self.counts
        counts = self.counts[numbers]
        tokens_before = np.append(0, np.cumsum(counts))
        return gather(self.ids, self.starts[numbers], counts), np.diff(tokens_before[ends], prepend=0)
