"""The tokenizer in a GGUF file's metadata as the files that its model was published with: tokenizer.json and its like.

A file names the way of cutting text into words (`tokenizer.ggml.pre`) and leaves the rest to the reader. What stands here are
facts of the published tokenizers. transformers (5.23) cuts digits of `smollm` and leaves `ignore_merges` and Unicode
normalisation out, so that its tokens differ from the model's own where a number follows white space, for instance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from tunesmith.errors import UserError
from tunesmith.jsontext import write_json
from tunesmith.models.in_gguf import Header

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # of tokenizer.ggml.token_type
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ENDS = ("eos", "eot", "eom")  # whose tokens end an answer
SPACE = "\u2581"  # stands for a space in SentencePiece's vocabularies

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_OPENS = r"[^\r\n\p{L}\p{N}]?"


@dataclass(frozen=True)
class Cut:
    """How text is cut into words before merges. words: an expression, "" for GPT-2's own.

    digits: every digit by itself, before anything else. nfc: normalised to Unicode's NFC first. whole: a word that is
    itself a token is one, whatever the merges make of it. begins: a text begins with the bos token unless the file says no.
    """

    words: str = ""
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    begins: bool = False


_GPT2, _NEOX, _STARCODER = Cut(), Cut(nfc=True), Cut(digits=True)
_LLAMA3 = Cut(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", whole=True, begins=True)
_QWEN2 = Cut(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}", nfc=True)
_TEKKEN = Cut(
    rf"{_OPENS}{_UPPER}*{_LOWER}+|{_OPENS}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole=True,
    begins=True,
)
CUTS = {
    "gpt-2": _GPT2,
    "mpt": _NEOX,
    "olmo": _NEOX,
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "refact": _STARCODER,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
UNNAMED = {"gpt2": "gpt-2", "gptneox": "mpt", "qwen2": "qwen2", "qwen3": "qwen2"}  # old files: by their architecture


def write_tokenizer(header: Header, directory: Path) -> int:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json of the tokenizer in a file's metadata.

    Returns: how many tokens it has, those left out that stand for nothing.
    Raises: UserError naming what is missing, does not fit together, or is not known here; OSError from writing.
    """
    tokens, types = _vocabulary(header)
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    kind = header.values.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            backend = _byte_level(vocab, header)
        elif kind == "llama":
            backend = _sentencepiece(vocab, header, types)
        else:
            raise UserError(
                f"{header.where}: a tokenizer of the kind {kind!r} is not supported; expected gpt2 or llama"
            )
        _add_tokens(backend, tokens, types)
    except UserError:
        raise
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"{header.where}: its vocabulary and merges do not fit together ({error})") from None
    roles = {role: tokens[i] for role, key in ROLES.items() if (i := _id(header, key)) is not None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles, "clean_up_tokenization_spaces": False}
    config |= _begins_and_ends(backend, roles, header)
    if isinstance(template := header.values.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    if length := header.says("context_length"):
        config["model_max_length"] = length
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "generation_config.json", special_ids(header))
    return max(vocab.values()) + 1


def special_ids(header: Header) -> dict[str, Any]:
    """`bos_token_id` and its like, of a config.json; several that end an answer as a list."""
    named = {f"{name}_token_id": _id(header, key) for name, key in (("bos", "bos"), ("pad", "padding"))}
    ends = list(dict.fromkeys(i for key in ENDS if (i := _id(header, key)) is not None))
    named["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None  # type: ignore[assignment]
    return {key: value for key, value in named.items() if value is not None}


def _id(header: Header, key: str) -> int | None:
    """The id of a special token. Raises: UserError if there is no such token."""
    value, count = header.values.get(f"tokenizer.ggml.{key}_token_id"), len(header.values["tokenizer.ggml.tokens"])
    if value is None or value == 2**32 - 1:  # llama.cpp's "none"
        return None
    if not isinstance(value, int) or not 0 <= value < count:
        raise UserError(f"{header.where}: tokenizer.ggml.{key}_token_id is {value}, but there are {count:,} tokens")
    return value


def _vocabulary(header: Header) -> tuple[list[str], list[int]]:
    """Tokens and their types. Raises: UserError if there are none, or the lists differ in length."""
    tokens = header.values.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"{header.where} holds no tokenizer (tokenizer.ggml.tokens); take a file that does")
    types = header.values.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    scores = header.values.get("tokenizer.ggml.scores") or types
    if not len(tokens) == len(types) == len(scores):
        raise UserError(
            f"{header.where}: its vocabulary does not fit: {len(tokens):,} tokens, {len(types):,} types, {len(scores):,} scores"
        )
    return tokens, types


def _byte_level(vocab: dict[str, int], header: Header) -> tokenizers.Tokenizer:
    merges = header.values.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise UserError(f"{header.where}: its tokenizer has no merges (tokenizer.ggml.merges); convert the model again")
    cut = _cut(header)
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=cut.whole))
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    steps += [pre_tokenizers.Split(Regex(cut.words), "isolated")] if cut.words else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut.words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    return backend


def _cut(header: Header) -> Cut:
    """How the file's tokenizer cuts text into words. Raises: UserError if that is not known."""
    named = header.values.get("tokenizer.ggml.pre", "default")
    if named == "default":  # what llama.cpp writes where it does not know
        named = UNNAMED.get(header.architecture, named)
    if named not in CUTS:
        raise UserError(
            f"{header.where}: its tokenizer cuts text into words by {named!r} (tokenizer.ggml.pre), which is not known here; "
            f"known are {', '.join(CUTS)}"
        )
    return CUTS[named]


def _sentencepiece(vocab: dict[str, int], header: Header, types: Sequence[int]) -> tokenizers.Tokenizer:
    """BPE over characters with spaces as U+2581 and single bytes for what is not in the vocabulary.

    SentencePiece joins the neighbours whose joint token scores best; the `tokenizers` library wants the pairs in that order.
    """
    gemma = header.architecture.startswith("gemma")
    scores = header.values.get("tokenizer.ggml.scores")
    if not scores:
        raise UserError(f"{header.where}: its tokenizer has no scores (tokenizer.ggml.scores); convert the model again")
    if gemma:  # runs of spaces are stored as such; its scores are not in the order of its merges, its tokens are
        vocab = {
            SPACE * len(token) if token.isspace() and set(token) == {" "} else token: i for token, i in vocab.items()
        }
    rank = {token: i if gemma else -scores[i] for token, i in vocab.items()}
    unknown = next((token for token, i in vocab.items() if types[i] == 2), None)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(vocab, rank), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    if header.values.get("tokenizer.ggml.add_space_prefix", not gemma):
        spaces.insert(0, normalizers.Prepend(SPACE))
        steps.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(vocab: dict[str, int], rank: dict[str, float]) -> list[tuple[str, str]]:
    """Every way of joining two tokens to a third, the best third first; of one third the earliest tokens first."""
    pairs = []
    for token in vocab:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs += [(rank[token], len(a), vocab[a], vocab[b], a, b) for a, b in halves if a in vocab and b in vocab]
    return [(a, b) for *_, a, b in sorted(pairs)]


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Iterable[str], types: Sequence[int]) -> None:
    """Mark control tokens as special, and those that are found in text as a whole."""
    there = backend.get_vocab()
    listed = [(token, kind) for token, kind in zip(tokens, types, strict=True) if token in there]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token, kind in listed if kind == CONTROL])
    backend.add_tokens([AddedToken(token, normalized=False) for token, kind in listed if kind == USER_DEFINED])


def _begins_and_ends(backend: tokenizers.Tokenizer, roles: dict[str, str], header: Header) -> dict[str, Any]:
    """`add_bos_token` and `add_eos_token`, as the file says or llama.cpp takes for granted; and the tokenizer set so."""
    kind = header.values.get("tokenizer.ggml.model")
    usual = kind == "llama" or _cut(header).begins
    flags = {
        "add_bos_token": bool(header.values.get("tokenizer.ggml.add_bos_token", usual)) and "bos_token" in roles,
        "add_eos_token": bool(header.values.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in roles,
    }
    begin, end = roles.get("bos_token", ""), roles.get("eos_token", "")
    if any(flags.values()):
        around = [f"{begin}:0"] * flags["add_bos_token"] + ["$A:0"] + [f"{end}:0"] * flags["add_eos_token"]
        used = [(text, backend.token_to_id(text)) for text in {begin, end} if f"{text}:0" in around]
        backend.post_processor = processors.TemplateProcessing(single=around, pair=None, special_tokens=used)
    return flags
