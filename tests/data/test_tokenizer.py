"""The tokenizer against OpenAI's own encoder (tiktoken) and transformers; text never becomes a special token."""

import hashlib
import json
from importlib import resources

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError

VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

ODD_TEXTS = [
    "",
    " ",
    "\n",
    "Hello, world!",
    "\n\nHuman: hi\n\nAssistant: hello",
    "I'll we've they're don't he'd I'm it's I'LL WE'VE",
    "price: 12345678901234567890 0.1 ½ ² Ⅷ ٣",
    "👍 👩‍👩‍👧‍👦 🇩🇪 ❤️ a👍b",
    "你好,世界。日本語のテキスト 한국어",
    "Ελληνικά עברית العربية हिन्दी ไทย",
    "\x00\x01\x02\x1f\x7f\x80\x9f",
    "a" * 1000,
    " " * 257 + "x" + "\t" * 30 + "\r\n" * 20 + "  \n  ",
    "non\u00a0breaking\u2003em\u200bzero\ufeffbom\u2028line\u0085next",
    "<|endoftext|>",
    "before<|endoftext|>after <|endoftext|><|endoftext|>",
    "e\u0301 é \ufffd \U0010ffff \ue000",
]


def gpt2_byte_order() -> list[int]:
    """The 256 bytes in the order of GPT-2's vocabulary: the 188 that print, then the rest."""
    printable = [b for b in range(256) if b in range(33, 127) or b in range(161, 173) or b in range(174, 256)]
    return printable + [b for b in range(256) if b not in printable]


def merge_pairs() -> list[tuple[str, str]]:
    text = resources.files("tunesmith").joinpath("gpt2/vocab.bpe").read_text(encoding="utf-8")
    return [tuple(line.split(" ")) for line in text.splitlines()[1:]]


def vocabulary() -> dict[str, int]:
    """GPT-2's encoder.json, made from the byte order and the merges."""
    symbols = [chr(b) if i < 188 else chr(256 + i - 188) for i, b in enumerate(gpt2_byte_order())]
    names = [*symbols, *("".join(pair) for pair in merge_pairs()), "<|endoftext|>"]
    return {name: i for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    """tiktoken's GPT-2, its ranks made from the published merges instead of a download."""
    order = gpt2_byte_order()
    byte_of = {(chr(b) if i < 188 else chr(256 + i - 188)): b for i, b in enumerate(order)}
    ranks = {bytes([b]): i for i, b in enumerate(order)}
    for pair in merge_pairs():
        ranks[bytes(byte_of[c] for c in "".join(pair))] = len(ranks)
    assert len(ranks) == 50_256
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50_256}
    )


def test_merges_are_the_published_file():
    data = resources.files("tunesmith").joinpath("gpt2/vocab.bpe").read_bytes()
    assert hashlib.sha256(data).hexdigest() == VOCAB_BPE_SHA256


def test_known_ids(tokenizer):
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]
    assert tokenizer.end_of_text == 50_256
    assert tokenizer.vocab_size == 50_257


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_have_tiktokens_ids(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode_ordinary(text)
    assert tokenizer.decode(ids) == text


def test_batch_is_one_by_one(tokenizer):
    assert tokenizer.encode_batch(ODD_TEXTS) == [tokenizer.encode(text) for text in ODD_TEXTS]


@settings(max_examples=400)
@given(text=st.text(max_size=200))
def test_any_text_has_tiktokens_ids_and_comes_back(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode_ordinary(text)
    assert tokenizer.decode(ids) == text


@settings(max_examples=200)
@given(text=st.text(alphabet=" \n\t\r'slveradmt<|>endoftx1²é你👍", max_size=80))
def test_text_rich_in_borders_has_tiktokens_ids(tokenizer, reference, text):
    """Spaces, apostrophes and pieces of `<|endoftext|>` in every neighbourhood."""
    assert tokenizer.encode(text) == reference.encode_ordinary(text)


@settings(max_examples=100)
@given(before=st.text(max_size=20), after=st.text(max_size=20))
def test_text_never_becomes_the_special_token(tokenizer, before, after):
    text = f"{before}<|endoftext|>{after}"
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text not in ids
    assert tokenizer.end_of_text not in tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(ids) == text


def test_the_special_token_gives_no_text(tokenizer):
    assert tokenizer.decode([15496, tokenizer.end_of_text]) == "Hello"


def test_saved_and_loaded_encodes_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path, block_size=1024)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode_batch(ODD_TEXTS) == tokenizer.encode_batch(ODD_TEXTS)
    assert (loaded.end_of_text, loaded.vocab_size) == (50_256, 50_257)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert tokenizer.end_of_text not in tokenizer.encode("<|endoftext|>"), "saving must not change the saver"


def test_transformers_reads_what_we_save(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path, block_size=1024)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    plain = [text for text in ODD_TEXTS if "<|endoftext|>" not in text]
    for text in plain:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.end_of_text
    assert theirs.model_max_length == 1024
    assert len(theirs) == tokenizer.vocab_size


def test_reads_what_transformers_saves(tokenizer, tmp_path):
    from transformers import GPT2TokenizerFast

    GPT2TokenizerFast(vocab=vocabulary(), merges=merge_pairs()).save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode_batch(ODD_TEXTS) == tokenizer.encode_batch(ODD_TEXTS)
    assert loaded.end_of_text == tokenizer.end_of_text


def test_older_pair_of_files_loads(tokenizer, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    merges = resources.files("tunesmith").joinpath("gpt2/vocab.bpe").read_bytes()
    (tmp_path / "merges.txt").write_bytes(merges)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode_batch(ODD_TEXTS) == tokenizer.encode_batch(ODD_TEXTS)
    assert loaded.end_of_text == 50_256


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', "\x00\x01"])
def test_broken_file_is_one_clear_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer .*again") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_no_file_names_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_tokenizer_without_end_of_text_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path, block_size=1024)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<|endoftext|>", "<|other|>"), encoding="utf-8")
    with pytest.raises(UserError, match=r"no <\|endoftext\|> token"):
        Tokenizer.load(tmp_path)


def test_a_save_that_fails_is_an_oserror_and_leaves_the_tokenizer_as_it_was(tokenizer, tmp_path):
    """A full disk or a missing folder must reach the command line as the OSError that it is."""
    with pytest.raises(OSError, match="missing"):
        tokenizer.save(tmp_path / "missing", block_size=1024)
    assert tokenizer.end_of_text not in tokenizer.encode("<|endoftext|>")
