"""Encoding word by word gives the Rust tokenizer's ids, text for text, and only where the tokenizer cuts as GPT-2 does."""

import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from tunesmith.data import words as module
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.words import Words
from tunesmith.files.names import SAMPLE

TOKENIZERS = {"gpt2": Tokenizer.gpt2(), "sample": Tokenizer.load(SAMPLE)}
WORDS = {name: Words(tokenizer) for name, tokenizer in TOKENIZERS.items()}
ASCII = st.text(st.sampled_from([chr(i) for i in range(128)]), max_size=30)
CRAFTED = st.lists(
    st.sampled_from(
        ["'s", "'re", "'", "'S", " ", "  ", "\n", "\t", "\x0b", "\x1c", "\x1f", "\x85", "a", "Z", "9", "<|endoftext|>",
         "_", "-", "é", "\u2019", "\u00b2", "世", "\u00a0", "\u2028", "\u0301", "\U0001f600"]
    ), max_size=14,
).map("".join)  # fmt: skip


def assert_same(name, texts):
    ids, counts = WORDS[name].encode(texts)
    plain = [TOKENIZERS[name].encode(text) for text in texts]
    assert counts.tolist() == [len(row) for row in plain]
    assert ids.tolist() == [i for row in plain for i in row]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=400)
@given(st.lists(ASCII | CRAFTED, max_size=6))
def test_equals_the_tokenizer_on_any_texts(name, texts):
    assert WORDS[name].cuts_as_gpt2
    assert_same(name, texts)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_equals_the_tokenizer_on_all_short_ascii_texts(name):
    """Every pair of ASCII characters beside a letter, a space, a digit and a sign: each alternative meets each other."""
    every = [chr(i) for i in range(128)]
    assert_same(name, [f"a{x}{y} {x}{y}1{y}'{x}s" for x in every for y in every])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_each_known_character_is_of_the_class_that_rust_has_for_it(name):
    """Beside letters, digits, signs and spaces; the last of every range and the first beyond included."""
    characters = [chr(i) for r in (module.LATIN, module.PUNCTUATION, module.PICTURES) for i in (*r, r[-1] + 1)]
    assert_same(name, [f"a{x}b {x}{x} 1{x}2 ({x}) \n{x}\n \u2019{x}s'{x}  {x}\t{x}" for x in characters])


def test_forgetting_words_changes_nothing(monkeypatch):
    monkeypatch.setattr(module, "KEPT", 5)
    words, rng = Words(TOKENIZERS["gpt2"]), random.Random(0)
    for _ in range(5):
        texts = ["".join(rng.choices(["tea ", "of", " time", "7", "é"], k=8)) for _ in range(9)]
        ids, counts = words.encode(texts)
        assert ids.tolist() == [i for text in texts for i in TOKENIZERS["gpt2"].encode(text)]
        assert len(counts) == 9


def changed(change):
    backend = tokenizers.Tokenizer.from_str(TOKENIZERS["gpt2"]._backend.to_str())
    change(backend)
    return Tokenizer(backend)


OTHERS = {
    "no cut": lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "digits": lambda b: setattr(
        b, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    ),
    "none": lambda b: setattr(b, "pre_tokenizer", None),
    "normaliser": lambda b: setattr(b, "normalizer", normalizers.Lowercase()),
    "added word": lambda b: b.add_tokens([AddedToken("tea", special=False)]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_tokenizer_that_cuts_differently_is_left_to_do_it(other):
    tokenizer = changed(OTHERS[other])
    assert not tokenizer.cuts_as_gpt2
    texts = ["Two teapots of tea, 1234 and 5.", "", "é tea"]
    ids, counts = Words(tokenizer).encode(texts)
    assert np.split(ids, np.cumsum(counts)[:-1])[0].tolist() == tokenizer.encode(texts[0])
    assert ids.tolist() == [i for text in texts for i in tokenizer.encode(text)]


def test_a_special_token_spelled_out_is_letters_in_both():
    tokenizer = changed(lambda b: b.add_special_tokens([AddedToken("<|im_start|>", special=True)]))
    assert tokenizer.cuts_as_gpt2
    text = "a <|im_start|>user <|endoftext|>"
    assert Words(tokenizer).encode([text])[0].tolist() == tokenizer.encode(text)
    assert tokenizer._backend.token_to_id("<|im_start|>") not in tokenizer.encode(text)
