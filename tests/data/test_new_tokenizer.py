"""A tokenizer trained on texts: plain byte-pair encoding, any text comes back, and equal texts give equal tokenizers."""

import json
import os
import pydoc_data.topics
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import GPT2_PATTERN, ODD_TEXTS

from tunesmith.data.backend import END_OF_TEXT, gpt2_byte_symbols
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError

SIZE = 400
TEXTS = [*pydoc_data.topics.topics.values()][:12]
NASTY = [
    "",
    "\r\n",
    "a\r\nb\r",
    "\u0301",
    "e\u0301\u0327",
    "👩‍👩‍👧‍👦🇩🇪",
    "\x00\x1f\x7f\x9f",
    "\ufeff",
    "\u2028",
    END_OF_TEXT,
    "\U0010ffff",
]


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(TEXTS, SIZE)


def merges_of(tokenizer):
    """Token id -> the pair of ids it was made of; ids below 257 are the end of text and the bytes."""
    model = json.loads(tokenizer._backend.to_str())["model"]
    pairs = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    return {model["vocab"][a + b]: (model["vocab"][a], model["vocab"][b]) for a, b in pairs}, model["vocab"]


def test_every_merge_is_of_a_most_frequent_pair(trained):
    """The textbook algorithm (Sennrich et al. 2016) played along: no pair was more frequent than the merged one."""
    merges, vocab = merges_of(trained)
    symbol_of = dict(zip([*range(33, 127), *range(161, 173), *range(174, 256)], gpt2_byte_symbols()[:188], strict=True))
    symbol_of |= dict(zip([b for b in range(256) if b not in symbol_of], gpt2_byte_symbols()[188:], strict=True))
    words = Counter(word for text in TEXTS for word in regex.findall(GPT2_PATTERN, text))
    split = {word: [vocab[symbol_of[b]] for b in word.encode()] for word in words}
    assert sorted(merges) == list(range(257, SIZE))
    for new in sorted(merges):
        pairs = Counter()
        for word, ids in split.items():
            for pair in pairwise(ids):
                pairs[pair] += words[word]
        assert pairs[merges[new]] == max(pairs.values()), new
        for ids in split.values():
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == merges[new]:
                    ids[i : i + 2] = [new]
                i += 1
    for word in list(words)[::7]:  # and encoding gives what training left
        assert trained.encode(word) == split[word]


@settings(max_examples=400)
@given(text=st.text(max_size=200))
@example("".join(NASTY))
@example("".join(ODD_TEXTS))
def test_any_text_comes_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.end_of_text not in ids
    assert trained.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_the_nasty_ones_come_back_one_by_one(trained, tokenizer, text):
    for which in (trained, tokenizer):
        assert which.decode(which.encode(text)) == text


def test_all_bytes_have_a_token_though_the_texts_hold_few_of_them(trained):
    assert all(trained.encode(chr(b)) for b in range(256))
    assert (trained.token_bytes[1:257] == 1).all()
    assert trained.token_bytes[trained.encode(" the")].tolist() == [4]


def test_equal_texts_give_an_equal_tokenizer_whatever_the_threads():
    """In processes of their own, with one thread and with four: hash seeds and scheduling differ."""
    code = (
        "import pydoc_data.topics as t; from tunesmith.data.tokenizer import Tokenizer\n"
        "print(Tokenizer.train(t.topics.values(), 2000).fingerprint)"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": threads},
            capture_output=True, text=True, check=True,
        ).stdout
        for threads in ("1", "4", "4")
    ]  # fmt: skip
    assert len(set(found)) == 1
    assert len(found[0].strip()) == 64


def test_saved_and_loaded_encodes_the_same(trained, tmp_path):
    trained.save(tmp_path, block_size=64)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == trained.fingerprint
    assert loaded.encode_batch(ODD_TEXTS) == trained.encode_batch(ODD_TEXTS)


def test_a_vocabulary_that_the_texts_do_not_support_is_told_with_what_they_do():
    with pytest.raises(UserError, match=r"vocab_size 300 .* they hold 260 pieces .* Use 260 or less"):
        Tokenizer.train(["abab abab", "abab abab", "once"], 300)  # what comes once is no piece
    assert Tokenizer.train(["abab abab"] * 2, 260).encode("abab abab") == [258, 259]
