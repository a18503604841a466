"""Tokenizers as people save them: each changes a directory that holds a GPT-2 with the sample's tokenizer.json."""

import json

from tunesmith.data.backend import gpt2_byte_symbols


def change_json(path, changes, default=None):
    """None removes a key."""
    content = (json.loads(path.read_text()) if path.exists() else default or {}) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def added(number, text, *, special):
    return {
        "id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": special,
    }  # fmt: skip


def old_pair(path, **files):
    """vocab.json and merges.txt in place of tokenizer.json, and what stands beside them."""
    content = json.loads((path / "tokenizer.json").read_text())["model"]
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in content["merges"])
    (path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))


def slash_s(path):
    """A tokenizer whose tokens are called as in RoBERTa."""
    symbols = [*gpt2_byte_symbols(), "He", "an"]
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {text: i for i, text in enumerate([*names, *symbols])}
    content = json.loads((path / "tokenizer.json").read_text())
    content["added_tokens"] = [added(i, name, special=True) for i, name in enumerate(names)]
    content["model"] |= {"vocab": vocab, "merges": [["H", "e"], ["a", "n"]], "unk_token": None}
    (path / "tokenizer.json").write_text(json.dumps(content))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    change_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **roles})


def grown(path, *tokens, **config):
    """More tokens in tokenizer.json than the model has embeddings for."""
    content = json.loads((path / "tokenizer.json").read_text())
    content["added_tokens"] += [added(6144 + i, text, special=special) for i, (text, special) in enumerate(tokens)]
    (path / "tokenizer.json").write_text(json.dumps(content))
    change_json(path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", **config})


def prefix_space(path, **config):
    content = json.loads((path / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (path / "tokenizer.json").write_text(json.dumps(content))
    if config:
        change_json(path / "tokenizer_config.json", config)


KINDS = {
    "plain": lambda path: None,
    "old pair": old_pair,
    "old pair, tokens in two files": lambda path: old_pair(
        path,
        added_tokens={"<bos>": 6144, "<eos>": 6145, "<pad>": 6146, "<user>": 6147},
        special_tokens_map={"bos_token": "<bos>", "eos_token": {"content": "<eos>", "lstrip": False}, "pad_token": "<pad>"},
    ),
    "old pair, tokens in tokenizer_config": lambda path: old_pair(
        path,
        tokenizer_config={
            "tokenizer_class": "GPT2Tokenizer", "pad_token": "<pad>", "eos_token": "<|im_end|>",
            "additional_special_tokens": ["<|im_start|>"],
            "added_tokens_decoder": {
                str(6144 + i): {k: v for k, v in added(0, text, special=special).items() if k != "id"}
                for i, (text, special) in enumerate([("<pad>", True), ("<|im_end|>", True), ("<|im_start|>", True), ("<user>", False)])
            },
        },
    ),
    "chatml": lambda path: grown(
        path, ("<|im_end|>", True), ("<|im_start|>", True), eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"],
    ),
    "pad beyond": lambda path: grown(path, ("[PAD]", True), pad_token="[PAD]"),
    "words added": lambda path: grown(path, ("<user>", False), ("<bot>", False)),
    "slash s": slash_s,
    "prefix space in tokenizer.json alone": prefix_space,
    "prefix space": lambda path: prefix_space(path, tokenizer_class="GPT2Tokenizer", add_prefix_space=True),
    "prefix space of the fast class": lambda path: prefix_space(path, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>"),
}  # fmt: skip
TEXTS = [
    "\n\nHuman: hi\n\nAssistant:", "Hello, world!  two", " begins with a space", "<user>a<user> b <bot>", "\u00e9\u00fc \U0001f600",
    "", "can't",
]  # fmt: skip
