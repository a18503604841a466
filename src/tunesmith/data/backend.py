"""The Rust tokenizer beneath a `Tokenizer`: put together, and set so that a text gives its own ids and nothing else.

Two kinds are known byte by byte. Byte-level ones (GPT-2, Llama 3, Qwen, GPT-NeoX, SmolLM2) write each byte as a letter.
Those with byte fallback (Llama 2, Mistral, TinyLlama, Gemma) write a space as U+2581 and a byte that no token has as `<0x0A>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from tunesmith.data.special_tokens import SpecialTokens
from tunesmith.errors import UserError

END_OF_TEXT = "<|endoftext|>"
SPACE = "\u2581"  # what a space is to a tokenizer with byte fallback
PARTS = ("normalizer", "pre_tokenizer", "decoder")
Parts = Mapping[str, Any]
"""`normalizer`, `pre_tokenizer` and `decoder` as tokenizer.json has them; None for one that is not there."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def gpt2_byte_symbols() -> list[str]:
    """GPT-2's 256 byte symbols in the order of its vocabulary: printable bytes first, the rest from U+0100 on."""
    return [chr(b) for b in _PRINTABLE] + [chr(0x100 + i) for i in range(256 - len(_PRINTABLE))]


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF_LETTER = dict(
    zip(gpt2_byte_symbols(), [*_PRINTABLE, *(b for b in range(256) if b not in _PRINTABLE)], strict=True)
)


def byte_level(model: models.BPE, with_end: bool = True) -> tokenizers.Tokenizer:
    """A tokenizer that cuts texts into words as GPT-2 does; `with_end`: and has its end of text."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if with_end:
        backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    return backend


def gpt2_backend() -> tokenizers.Tokenizer:
    """GPT-2's, from the merges in this package."""
    lines = resources.files("tunesmith").joinpath("gpt2/vocab.bpe").read_text(encoding="utf-8").split("\n")
    merges = [(a, b) for a, b in (line.split(" ") for line in lines[1:] if line)]
    symbols = [*gpt2_byte_symbols(), *(a + b for a, b in merges), END_OF_TEXT]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    return byte_level(models.BPE(vocab=vocab, merges=merges))


def trained_backend(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """One made from texts. Raises: UserError if they hold too few merges."""
    backend = byte_level(models.BPE())
    end = AddedToken(END_OF_TEXT, normalized=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    found = backend.get_vocab_size()
    if found != vocab_size:
        raise UserError(
            f"--tokenizer.vocab_size {vocab_size:,} is more than these texts allow: they hold {found:,} pieces "
            f"that occur at least twice. Use {found} or less, add text, or use --tokenizer.name gpt2"
        )
    return backend


def text_only(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Itself, so set that text gives its own ids and nothing else."""
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    return backend


def with_tokens(backend: tokenizers.Tokenizer, special: SpecialTokens, where: str) -> tokenizers.Tokenizer:
    """The backend with what its vocabulary lacks, and with special tokens marked as such."""
    for number, token in special.added.items():
        if backend.token_to_id(token.content) is None:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != number:
            raise UserError(
                f"{where}: the files beside it give {token.content!r} the id {number:,}, but the vocabulary has "
                f"{backend.token_to_id(token.content):,}; save the tokenizer again with transformers"
            )
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    lacking = [text for text in special.texts if text not in known and backend.token_to_id(text) is not None]
    if not lacking:
        return backend
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in lacking])
    return specially(backend, lambda token: token["content"] in lacking)


def specially(backend: tokenizers.Tokenizer, which: Callable[[dict[str, Any]], bool]) -> tokenizers.Tokenizer:
    """A copy in which those added tokens are special ones: no text gives them."""
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] |= which(token)
    return tokenizers.Tokenizer.from_str(json.dumps(content))


# ---- parts ------------------------------------------------------------------------------------------------------------


def parts_of(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """Its `Parts`; far cheaper than its whole JSON where the vocabulary is large."""
    found = {name: getattr(backend, name) for name in PARTS}
    return {name: None if part is None else json.loads(part.__getstate__()) for name, part in found.items()}


def with_parts(backend: tokenizers.Tokenizer, parts: Parts) -> tokenizers.Tokenizer:
    """A copy with these parts; itself if it has them already."""
    if parts == parts_of(backend):
        return backend
    return tokenizers.Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | dict(parts)))


@dataclass(frozen=True)
class Opening:
    """A space that a tokenizer puts before words.

    everywhere: also before the words behind a special token; else at the beginning of a text alone.
    unless: not before words that begin so.
    """

    everywhere: bool
    unless: tuple[str, ...] = ()

    def before(self, text: str) -> str:
        """The text with it."""
        return f" {text}" if text and not text.startswith(self.unless) else text


def byte_levels(parts: Parts) -> list[dict[str, Any]]:
    """The byte-level pre-tokenizers among the parts, where a prefix space is set."""
    return [part for part in _sequence(parts["pre_tokenizer"], "pretokenizers") if part["type"] == "ByteLevel"]


def opening_of(parts: Parts) -> Opening | None:
    """The space that tokenizer.json's parts put before words: a prefix space, metaspace's, or the older normaliser's."""
    if any(part["add_prefix_space"] for part in byte_levels(parts)):
        return Opening(everywhere=True, unless=(" ",))
    for part in _sequence(parts["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Metaspace" and part["prepend_scheme"] != "never":
            return Opening(everywhere=part["prepend_scheme"] == "always", unless=(" ", SPACE))
    normalizers = _sequence(parts["normalizer"], "normalizers")
    if _PREPEND in normalizers and _REPLACE in normalizers:
        return Opening(everywhere=True)
    return None


_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_RESTORE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}


def opened(parts: Parts, on: bool) -> dict[str, Any]:
    """The parts with byte-level prefix spaces on or off."""
    found: dict[str, Any] = json.loads(json.dumps(dict(parts)))
    for part in byte_levels(found):
        part["add_prefix_space"] = on
    return found


def in_the_middle(parts: Parts) -> dict[str, Any]:
    """The parts as they treat the middle of a text: no space is put before it, and none taken from what is decoded.

    So each segment of a dialogue is encoded as what stands there, and any tokens are decoded as what they stand for there.
    """
    found = opened(parts, False)
    for part in _sequence(found["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
    normalizers = _sequence(found["normalizer"], "normalizers")
    if _PREPEND in normalizers and _REPLACE in normalizers:
        rest = [part for part in normalizers if part != _PREPEND]
        found["normalizer"] = {"type": "Sequence", "normalizers": rest}
    kept = []
    for part in _sequence(found["decoder"], "decoders"):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        if part["type"] != "Strip" or part["content"] != " ":
            kept.append(part)
    if found["decoder"] is not None and len(kept) < len(_sequence(found["decoder"], "decoders")):
        found["decoder"] = {"type": "Sequence", "decoders": kept}
    return found


def _sequence(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A part's own parts, or the part itself; the dictionaries are those inside it."""
    return [] if part is None else part[key] if part["type"] == "Sequence" else [part]


# ---- what a token stands for -----------------------------------------------------------------------------------------


def spelling(parts: Parts) -> Callable[[str], bytes] | None:
    """A token's name -> the bytes that it stands for in the middle of a text; None where that cannot be said of one alone.

    The bytes are those of the text as the normaliser leaves it.
    """
    decoders = _sequence(parts["decoder"], "decoders")
    types = {part["type"] for part in decoders}
    if types == {"ByteLevel"}:
        return _of_byte_level
    if types <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and (
        "Metaspace" in types or _RESTORE in decoders
    ):
        return _of_metaspace if "ByteFallback" in types else lambda name: name.replace(SPACE, " ").encode()
    return None


def _of_byte_level(name: str) -> bytes:
    """An added token may have letters that stand for no byte: it is then what it says."""
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in name])
    except KeyError:
        return name.encode()


def _of_metaspace(name: str) -> bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(SPACE, " ").encode()


def keeps_text(parts: Parts) -> bool:
    """Whether the normaliser changes no more of a text than the form of its characters (NFC) and how a space is written."""
    return all(part in (_PREPEND, _REPLACE, {"type": "NFC"}) for part in _sequence(parts["normalizer"], "normalizers"))


def begins_of(backend: tokenizers.Tokenizer) -> list[str]:
    """The special tokens that its post-processor puts before a text."""
    with_them = backend.encode("a", add_special_tokens=True)
    added = takewhile(lambda token: token[1], zip(with_them.tokens, with_them.special_tokens_mask, strict=True))
    return [token for token, _ in added]
