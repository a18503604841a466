"""Tokenizers out of GGUF metadata: the ids of the published tokenizers, by transformers' own reading and by its classes."""

import json
import unicodedata

import pytest
import transformers
from tokenizers import Tokenizer, models, normalizers, trainers

import gguf_made as made
from tunesmith.errors import UserError
from tunesmith.files.gguf_tokenizer import write_tokenizer
from tunesmith.files.names import SAMPLE
from tunesmith.models.in_gguf import Header

ROWS = (SAMPLE.parent / "train.jsonl").read_text(encoding="utf-8").split("\n")[:60]
TEXTS = [
    *ROWS,
    *(json.loads(row)["messages"][-1]["content"] for row in ROWS if '"messages"' in row),
    "I'll say it's HERE'S 1234567 times,  then\n\n\n  3.14!? (no) {x}\t--- e.g. $5 …",
    "Straße, naïve café; Привет мир 12 日本語のテスト 🙂🙂 ½ ٣٤",
    "camelCaseWords ABCdef XMLHttpRequest\r\nwindows\r\n\r\nlines   ",
]
MERGES = 1500
DECOMPOSED = unicodedata.normalize("NFD", TEXTS[-2])


def byte_level(pre):
    """The sample's tokenizer as a file has it, and a token that no merge makes."""
    model = json.loads((SAMPLE / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)[: 257 + MERGES]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "Ġnaïve".replace("ï", "Ã¯"), "<|turn|>"],
        "tokenizer.ggml.token_type": [3] + [1] * len(tokens) + [4],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"][:MERGES]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


def sentencepiece():
    """A vocabulary of pieces with scores, as SentencePiece numbers them: unknown, begin, end, bytes, pieces by rank."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=900, show_progress=False))
    learned = json.loads(backend.to_str())["model"]
    made_of = ["".join(merge) for merge in learned["merges"]]
    letters = [token for token in learned["vocab"] if len(token) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *made_of, *letters]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def read_both(folder, architecture, entries):
    """Ours and transformers' reading of a file with that tokenizer."""
    shape = made.entries_of(made.CONFIGS["gpt2" if architecture == "gpt2" else "llama"]())
    file = made.write_file(folder / "tokenizer.gguf", architecture, shape, {}, tokenizer=entries)
    values = {f"{architecture}.{key}": value for key, value in shape.items()} | entries
    own = folder / "own"
    write_tokenizer(Header(str(file), {"general.architecture": architecture} | values, {}), own)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    return transformers.PreTrainedTokenizerFast.from_pretrained(own), theirs


def plain(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False).input_ids


@pytest.mark.parametrize("pre", ["gpt-2", "mpt", "qwen2", "llama-bpe", "tekken"])
def test_byte_level_ids_are_those_of_transformers_own_reading(pre, tmp_path):
    """But for words of Llama 3 that are a token, and for Unicode that is not normalised: those come next."""
    own, theirs = read_both(tmp_path, "llama", byte_level(pre))
    texts = [text.replace(" naïve", " native") for text in TEXTS]
    assert plain(own, texts) == plain(theirs, texts)
    assert own.decode(plain(own, texts)[-2]) == texts[-2]


def test_what_transformers_leaves_out_of_a_file_is_as_in_its_own_classes(tmp_path):
    entries = byte_level("qwen2")
    vocab = {token: i for i, token in enumerate(entries["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in entries["tokenizer.ggml.merges"]]
    for pre, named in (("qwen2", transformers.Qwen2Tokenizer), ("mpt", transformers.GPTNeoXTokenizer)):
        (tmp_path / pre).mkdir()
        own, theirs = read_both(tmp_path / pre, "llama", byte_level(pre))
        assert plain(own, DECOMPOSED) == plain(named(vocab=vocab, merges=merges), DECOMPOSED)
        assert plain(own, DECOMPOSED) == plain(own, TEXTS[-2]) != plain(theirs, DECOMPOSED)


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)])
def test_words_that_are_a_token_stay_whole_where_the_published_tokenizer_keeps_them(pre, whole, tmp_path):
    own, _ = read_both(tmp_path, "llama", byte_level(pre))
    assert (len(plain(own, " naïve")) == 1) == whole
    assert len(plain(own, "<|turn|>")) == 1


@pytest.mark.parametrize("pre", ["smollm", "starcoder"])
def test_digits_are_cut_one_by_one(pre, tmp_path):
    own, _ = read_both(tmp_path, "llama", byte_level(pre))
    pieces = [piece for piece, _ in own.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x\n\n12  345½ y")]
    assert pieces == ["x", "ĊĊ", "1", "2", "ĠĠ", "3", "4", "5", "Â½", "Ġy"]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_sentencepiece_ids_are_those_of_transformers_own_reading(architecture, tmp_path):
    own, theirs = read_both(tmp_path, architecture, sentencepiece())
    texts = [*TEXTS, "Ωmega ≈ 𝄞"]
    assert plain(own, texts) == plain(theirs, texts)
    for text, ids in zip(texts, plain(own, texts), strict=True):
        assert own.decode(ids) == text
    assert any(3 <= i < 259 for i in plain(own, texts)[-1])  # bytes of what has no piece


def test_sentencepiece_joins_what_scores_best_first(tmp_path):
    """ab scores worse than bc, so that abc is a + bc and never ab + c; a text that begins with a space begins with two."""
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc", "\u2581", "\u2581\u2581"]
    entries = sentencepiece() | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 7,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -9.0, -3.0],
    }
    own, _ = read_both(tmp_path, "llama", entries)
    assert plain(own, "abc") == [8, 3, 7]
    assert plain(own, " abc") == [9, 3, 7]
    assert own.decode([9, 3, 7]) == " abc"
    assert plain(own, "a?") == [8, 3, 0]


@pytest.mark.parametrize(
    ("entries", "begins"),
    [
        ({}, True),
        ({"tokenizer.ggml.add_bos_token": False}, False),
        ({"tokenizer.ggml.add_eos_token": True}, True),
    ],
)
def test_a_text_begins_and_ends_as_the_file_says(entries, begins, tmp_path):
    own, theirs = read_both(tmp_path, "llama", sentencepiece() | entries)
    ids = own("a text").input_ids
    assert ids == theirs("a text").input_ids
    assert (ids[0] == 1) == begins
    assert (ids[-1] == 2) == ("tokenizer.ggml.add_eos_token" in entries)


def test_a_gpt2_that_does_not_say_how_it_cuts_text_cuts_as_gpt2(tmp_path):
    entries = byte_level("default")
    own, _ = read_both(tmp_path, "gpt2", entries)
    named, _ = read_both(tmp_path, "gpt2", entries | {"tokenizer.ggml.pre": "gpt-2"})
    assert plain(own, TEXTS) == plain(named, TEXTS)
    with pytest.raises(UserError, match=r"cuts text into words by 'default'.*known are gpt-2"):
        read_both(tmp_path, "llama", entries)
