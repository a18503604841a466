"""Tokenizers of the kinds that the families have, trained here on the sample's texts: real pipelines, small vocabularies.

Each is what a directory on the hub holds: tokenizer.json, tokenizer_config.json, generation_config.json. The pipelines and
the class names are those of the public models (facts, from their tokenizer.json and tokenizer_config.json).
"""

import gzip
import json
from functools import cache

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tunesmith.data.tokenizer_classes import QWEN2_WORDS
from tunesmith.files.names import SAMPLE

LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = [f"<0x{i:02X}>" for i in range(256)]
MERGES = 400


@cache
def texts():
    found = []
    for file in sorted(SAMPLE.parent.rglob("*.jsonl*")):
        opened = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt", encoding="utf-8") as lines:
            found += [line for line, _ in zip(lines, range(300), strict=False)]
    text = "".join(found).replace("\\n", "\n").replace("\\u2019", "'")
    return [text[i : i + 4000] for i in range(0, min(len(text), 400_000), 4000)]


def special(*names):
    return [AddedToken(name, normalized=False, special=True) for name in names]


def byte_level(cut, normalizer=None, ignore_merges=False):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, cut, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=256 + MERGES, initial_alphabet=alphabet, show_progress=False)
    )
    backend.model.ignore_merges = ignore_merges
    return backend


def split(words):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@cache
def _pieces():
    """Letters and merges of words with U+2581 for a space, runs of spaces and line breaks among them."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581+[^\u2581\n]*|\n+|[^\u2581\n]+"), "isolated")
    backend.train_from_iterator(
        [*texts(), *["a    b\n\n\nc   d\n\n"] * 50],
        trainers.BpeTrainer(vocab_size=500 + MERGES, show_progress=False, max_token_length=12, limit_alphabet=90),
    )
    content = json.loads(backend.to_str())["model"]
    return sorted(content["vocab"], key=content["vocab"].__getitem__), [tuple(pair) for pair in content["merges"]]


def byte_fallback(first, normalizer, cut, *, strip, newlines=True):
    """first: the names of the first tokens; `newlines`: whether line breaks are pieces (Gemma), or bytes (Llama)."""
    pieces, merges = _pieces()
    if not newlines:
        pieces = [piece for piece in pieces if "\n" not in piece]
        merges = [pair for pair in merges if "\n" not in "".join(pair)]
    vocab = {name: i for i, name in enumerate(dict.fromkeys([*first, *BYTES, *pieces]))}
    unknown = "<unk>"
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    if normalizer is not None:
        backend.normalizer = normalizer
    if cut is not None:
        backend.pre_tokenizer = cut
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_special_tokens(special(*first))
    return backend


def begins_with(backend, name):
    return processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, backend.token_to_id(name))]
    )


def _llama(normalizer, cut):
    backend = byte_fallback(["<unk>", "<s>", "</s>"], normalizer, cut, strip=True, newlines=False)
    backend.post_processor = begins_with(backend, "<s>")
    return backend


LLAMA_ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
}


def llama_legacy():
    backend = _llama(normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]), None)
    return backend, {"tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": None, **LLAMA_ROLES}


def metaspace(scheme):
    def make():
        backend = _llama(None, pre_tokenizers.Metaspace("\u2581", scheme, split=False))
        about = {"first": {"legacy": False}, "always": {"legacy": True}, "never": {"add_prefix_space": False}}[scheme]
        if scheme == "never":
            backend.decoder = decoders.Sequence(
                [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
            )
        return backend, {"tokenizer_class": "LlamaTokenizerFast", "padding_side": "left", **LLAMA_ROLES, **about}

    return make


def gemma():
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    cut = pre_tokenizers.Split(" ", "merged_with_previous")
    backend = byte_fallback(first, normalizers.Replace(" ", "\u2581"), cut, strip=False)
    backend.add_special_tokens(special("<start_of_turn>", "<end_of_turn>"))
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in ("\n\n", "<table>")])
    backend.post_processor = begins_with(backend, "<bos>")
    roles = {f"{role}_token": f"<{role}>" for role in ("pad", "eos", "bos", "unk", "mask")}
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "spaces_between_special_tokens": False,
        **roles,
    }
    return backend, config | {"ends": ["<eos>", "<end_of_turn>"]}


def qwen():
    backend = byte_level(split(QWEN2_WORDS), normalizers.NFC())
    backend.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in ("<think>", "</think>")])
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    more = {
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "errors": "replace",
        "split_special_tokens": False,
    }
    return backend, config | more | {"ends": ["<|im_end|>", "<|endoftext|>"]}


def llama3():
    backend = byte_level(split(LLAMA3_WORDS), ignore_merges=True)
    names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
    ]
    backend.add_special_tokens(special(*names))
    begin = begins_with(backend, "<|begin_of_text|>")
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return backend, config | {"ends": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]}


def gpt_neox():
    backend = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())
    backend.add_special_tokens(special("<|endoftext|>", "<|padding|>"))
    backend.add_tokens([AddedToken(" " * n, normalized=True, special=False) for n in (4, 3, 2)])
    return backend, {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False, "eos_token": "<|endoftext|>"}


def smollm2():
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = byte_level(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]))
    backend.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return backend, config | {"pad_token": "<|im_end|>", "unk_token": "<|endoftext|>", "add_prefix_space": False}


def prefix_space():
    """As RoBERTa's or OPT's relatives: a space before every word that begins a text or stands behind a special token."""
    backend = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    backend.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return backend, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }


def swallowing():
    """As Phi-3's: white space behind a role's token, and before and behind the end of a turn, is no text."""
    backend, config = llama_legacy()
    roles = [AddedToken(name, rstrip=True, normalized=False, special=True) for name in ("<|user|>", "<|assistant|>")]
    backend.add_special_tokens(
        [*roles, AddedToken("<|end|>", lstrip=True, rstrip=True, normalized=False, special=True)]
    )
    return backend, config | {"eos_token": "<|end|>", "pad_token": "</s>"}


FAMILIES = {
    "qwen": qwen,
    "llama 3": llama3,
    "llama, prepend": llama_legacy,
    "llama, first": metaspace("first"),
    "llama, always": metaspace("always"),
    "llama, never": metaspace("never"),
    "gemma": gemma,
    "gpt_neox": gpt_neox,
    "smollm2": smollm2,
    "prefix space": prefix_space,
    "swallowing": swallowing,
}


def write(name, path):
    """The directory of a model of that kind, without the model."""
    backend, config = FAMILIES[name]()
    ends = config.pop("ends", [config["eos_token"]])
    (path / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = [backend.token_to_id(end) for end in ends]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return path
