"""transformers' tokenizer classes of the families: what each makes of a vocabulary.

transformers 5 builds these anew from the vocabulary and merges of tokenizer.json: it ignores the normaliser, the
pre-tokenizer and the decoder that stand there (`models/*/tokenization_*.py`). Here tokenizer.json counts, as with every other
program that reads it. So a directory keeps the name of its class only where both come to the same; else it is written
`PreTrainedTokenizerFast`, with which transformers takes tokenizer.json as it stands. (For `model_type` qwen2 alone it builds
its Qwen2Tokenizer whatever is written.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import models

from tunesmith.data.backend import SPACE, Parts

AS_IT_STANDS = "PreTrainedTokenizerFast"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def built(settings: Mapping[str, Any]) -> Parts:
    """The parts that the class of a tokenizer_config.json puts around a vocabulary; GPT-2's for one that is not known here."""
    return _BUILT.get(_plain_name(settings), _byte_level)(settings)


def class_for(settings: Mapping[str, Any], parts: Parts, model: models.Model) -> str:
    """The class to write for a tokenizer of these parts. settings: of its tokenizer_config.json, with the class that it had."""
    name = _plain_name(settings)
    alike = (
        name in _BUILT
        and isinstance(model, models.BPE)
        and _meaning(parts) == _meaning(built(settings))
        and model.byte_fallback == (name in ("LlamaTokenizer", "GemmaTokenizer"))
        and not model.ignore_merges
        and model.dropout is None
    )
    return (settings.get("tokenizer_class") or name) if alike else AS_IT_STANDS


def _plain_name(settings: Mapping[str, Any]) -> str:
    return str(settings.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")


def _byte_level(settings: Mapping[str, Any], normalizer: str | None = None) -> Parts:
    space = bool(settings.get("add_prefix_space"))
    cut = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True, "use_regex": True}
    decoder = cut | {"add_prefix_space": True}
    return {"normalizer": normalizer and {"type": normalizer}, "pre_tokenizer": cut, "decoder": decoder}


def _qwen2(settings: Mapping[str, Any]) -> Parts:
    parts = dict(_byte_level(settings, "NFC"))
    words = {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
    parts["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [words, parts["pre_tokenizer"] | {"use_regex": False}],
    }
    return parts


def _llama(settings: Mapping[str, Any]) -> Parts:
    space = settings.get("add_prefix_space") is not False
    scheme = ("always" if settings.get("legacy") else "first") if space else "never"
    cut = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    return {"normalizer": None, "pre_tokenizer": cut, "decoder": _byte_fallback(strip=space)}


def _gemma(_settings: Mapping[str, Any]) -> Parts:
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {"normalizer": spaces, "pre_tokenizer": None, "decoder": _byte_fallback(strip=False)}


def _byte_fallback(*, strip: bool) -> dict[str, Any]:
    spaces = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    first = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *[first] * strip]}


_BUILT = {
    "GPT2Tokenizer": _byte_level,
    "GPTNeoXTokenizer": lambda settings: _byte_level(settings, "NFC"),
    "Qwen2Tokenizer": _qwen2,
    "LlamaTokenizer": _llama,
    "GemmaTokenizer": _gemma,
}
_NOTHING_TO_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def _meaning(parts: Parts) -> Parts:
    """Without what changes no token: where offsets begin, and Gemma's cut at spaces, which its normaliser has replaced."""

    def of(part: Any) -> Any:
        if not isinstance(part, dict):
            return [of(p) for p in part] if isinstance(part, list) else part
        return {key: of(value) for key, value in part.items() if key != "trim_offsets"}

    found = {name: of(part) for name, part in parts.items()}
    if (found["decoder"] or {}).get("type") == "ByteLevel":
        found["decoder"] = {"type": "ByteLevel"}  # its settings are those of a pre-tokenizer
    if found["pre_tokenizer"] == _NOTHING_TO_SPLIT and found["normalizer"] == _gemma({})["normalizer"]:
        found["pre_tokenizer"] = None
    return found
