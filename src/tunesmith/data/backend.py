"""The Rust tokenizer beneath a `Tokenizer`: put together, and set so that text gives its own ids and nothing else."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tunesmith.data.special_tokens import SpecialTokens
from tunesmith.errors import UserError

END_OF_TEXT = "<|endoftext|>"


def gpt2_byte_symbols() -> list[str]:
    """GPT-2's 256 byte symbols in the order of its vocabulary: printable bytes first, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def byte_level(model: models.BPE, with_end: bool = True) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if with_end:
        backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
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
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] |= token["content"] in lacking
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def byte_levels(cutter: dict[str, Any]) -> list[dict[str, Any]]:
    """The byte-level parts of a tokenizer.json's `pre_tokenizer`, where a prefix space is set."""
    return [part for part in cutter.get("pretokenizers", [cutter]) if part.get("type") == "ByteLevel"]


def with_prefix_space(backend: tokenizers.Tokenizer, on: bool) -> tokenizers.Tokenizer:
    content = json.loads(backend.to_str())
    for part in byte_levels(content["pre_tokenizer"] or {}):
        part["add_prefix_space"] = on
    return tokenizers.Tokenizer.from_str(json.dumps(content))
