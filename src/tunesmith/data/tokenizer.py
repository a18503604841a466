"""Byte-level BPE through the Rust `tokenizers`: text to ids and back; text never turns into a special token."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from tunesmith.data.fingerprint import content_hash
from tunesmith.errors import UserError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the bytes and the end of text


class Tokenizer:
    """A model's tokenizer.

    The string `<|endoftext|>` inside a text is encoded as the letters it is made of; the end-of-text token is only ever
    added by `dialogue.py` and `texts.py`, as the id `end_of_text`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, where: str = "tokenizer") -> None:
        """Raises: UserError if `backend` has no end-of-text token."""
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        end = backend.token_to_id(END_OF_TEXT)
        if end is None:
            raise UserError(f"{where} has no {END_OF_TEXT} token, which every GPT-2 tokenizer has as its end of text")
        self.end_of_text: int = end
        self.vocab_size: int = backend.get_vocab_size()

    @staticmethod
    def load(directory: Path) -> Tokenizer:
        """From `tokenizer.json`, or from GPT-2's older pair `vocab.json` + `merges.txt`."""
        file = directory / "tokenizer.json"
        try:
            if file.exists():
                return Tokenizer(tokenizers.Tokenizer.from_file(str(file)), str(file))
            vocab, merges = directory / "vocab.json", directory / "merges.txt"
            if vocab.exists() and merges.exists():
                return Tokenizer(_byte_level(models.BPE.from_file(str(vocab), str(merges))), str(vocab))
        except UserError:
            raise
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"{file} is not a tokenizer ({error}); download or save it again") from None
        raise UserError(f"{directory} holds no tokenizer.json (nor vocab.json with merges.txt)")

    @staticmethod
    def gpt2() -> Tokenizer:
        """GPT-2's own tokenizer, rebuilt from the 50,000 published merges that ship with this package."""
        lines = resources.files("tunesmith").joinpath("gpt2/vocab.bpe").read_text(encoding="utf-8").split("\n")
        merges = [(a, b) for a, b in (line.split(" ") for line in lines[1:] if line)]
        symbols = [*gpt2_byte_symbols(), *(a + b for a, b in merges), END_OF_TEXT]
        vocab = {symbol: i for i, symbol in enumerate(symbols)}
        return Tokenizer(_byte_level(models.BPE(vocab=vocab, merges=merges)), "gpt2")

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A byte-level BPE made from texts, with GPT-2's cut into words. The same texts give the same tokenizer.

        The end of text is token 0, then come the 256 bytes, then the merges; a merge comes at least twice in the texts.
        Raises: UserError if they hold fewer merges than `vocab_size` asks for.
        """
        backend = _byte_level(models.BPE())
        end = AddedToken(END_OF_TEXT, normalized=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size, min_frequency=2, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
            ),
        )  # fmt: skip
        found = backend.get_vocab_size()
        if found != vocab_size:
            raise UserError(
                f"--tokenizer.vocab_size {vocab_size:,} is more than these texts give: they hold {found:,} pieces that come "
                f"at least twice. Use {found} or less, give more text, or take --tokenizer.name gpt2"
            )
        return Tokenizer(backend, "new tokenizer")

    def encode(self, text: str) -> list[int]:
        """Ids of one text; no special token is added or recognised."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; the end-of-text token and incomplete UTF-8 at the end give nothing and U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def token_bytes(self) -> np.ndarray[Any, Any]:
        """(vocab,) int64: how many bytes of text each token stands for. A byte-level symbol has one letter a byte.

        -1 for every token of a tokenizer that is not byte-level without normalisation: its lengths are not known.
        """
        lengths = np.full(self.vocab_size, -1, np.int64)
        plain = self._backend.normalizer is None and isinstance(self._backend.decoder, decoders.ByteLevel)
        if plain and isinstance(self._backend.pre_tokenizer, pre_tokenizers.ByteLevel):
            for symbol, number in self._backend.get_vocab(with_added_tokens=False).items():
                lengths[number] = len(symbol)
        return lengths

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's definition: equal fingerprints encode equally."""
        return content_hash([self._backend.to_str()])

    def same_tokens(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same text in both, and the end of text is the same."""
        ours, theirs = self._backend, other._backend
        return self.end_of_text == other.end_of_text and (
            self.fingerprint == other.fingerprint or ours.get_vocab() == theirs.get_vocab()
        )

    def save(self, directory: Path, block_size: int) -> None:
        """Write `tokenizer.json` and the `tokenizer_config.json` that transformers reads beside it."""
        # not `backend.save`: that tells of a full disk as a bare Exception
        (directory / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": block_size,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "add_prefix_space": False,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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


def gpt2_byte_symbols() -> list[str]:
    """GPT-2's 256 byte symbols in the order of its vocabulary: printable bytes first, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    return backend


# ---- bytes that tokens stand for --------------------------------------------------------------------------------------


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
