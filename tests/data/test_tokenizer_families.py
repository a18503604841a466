"""The families' tokenizers against transformers: ids, beginnings, special tokens, text of tokens, and what is written."""

import itertools
import json
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from family_tokenizers import FAMILIES, write
from reference import marked
from tunesmith.data.dialogue import Message
from tunesmith.data.encoding import encode_rows, ids_of
from tunesmith.data.hh_template import HH
from tunesmith.data.prompts import encode_answered, encode_prompt
from tunesmith.data.special_tokens import read_special_tokens
from tunesmith.data.template import Segment, Template
from tunesmith.data.token_bytes import ByteRuns, text_bytes
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError

TEXTS = [
    "", " ", "hello", " hello", "  hello", "Hello, world! 3.14 and 2026", "\n\nHuman: hi\n\nAssistant: yes.\n\nHuman: so?",
    "a    b\t\tc\r\n\r\n d  ", "e\u0301 caf\u00e9 \u1e9b\u0323", "\U0001f600\U0001f680 \u2581 \u4f60\u597d", "<|endoftext|> </s> <bos>x",
    "<think>so</think>", "can't WE'LL", "x\u0000y", "\u0301begins with an accent", "tail \n",
]  # fmt: skip
CLASSES = {  # with which transformers reads what we write; tokenizer.json as it stands where its own class would differ
    "qwen": "Qwen2Tokenizer", "llama, first": "LlamaTokenizer", "llama, always": "LlamaTokenizer", "llama, never": "LlamaTokenizer",
    "gemma": "GemmaTokenizer", "gpt_neox": "GPTNeoXTokenizer",
}  # fmt: skip
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return {name: write(name, tmp_path_factory.mktemp("family")) for name in FAMILIES}


@pytest.fixture(scope="module")
def ours(places):
    return {name: Tokenizer.load(path) for name, path in places.items()}


@pytest.fixture(scope="module")
def theirs(places):
    """tokenizer.json as it stands."""
    return {name: PreTrainedTokenizerFast.from_pretrained(path) for name, path in places.items()}


def as_letters(theirs, text, **more):
    """Their ids of a text whose special tokens are text."""
    return theirs(text, split_special_tokens=True, **more)["input_ids"]


@every_family
def test_a_text_has_the_ids_of_transformers(ours, theirs, name):
    for text in TEXTS:
        assert ours[name].encode(text) == as_letters(theirs[name], text, add_special_tokens=False), text


@every_family
def test_a_plain_text_begins_as_in_transformers(ours, theirs, name):
    for text in TEXTS[2:]:
        segments = ours[name].begun([Segment(text)])
        ids = list(itertools.chain.from_iterable(ours[name].encode_segments(segments)))
        assert ids == as_letters(theirs[name], text), text


@every_family
def test_tokens_are_decoded_to_their_text(ours, name):
    """In the middle of a text, so that the space before it, where a tokenizer puts one, is part of it."""
    tokenizer = ours[name]
    composed = name in ("qwen", "gpt_neox")
    for text in TEXTS:
        expected = unicodedata.normalize("NFC", text) if composed else text
        if name.startswith(("llama,", "gemma", "swallowing")):
            expected = expected.replace("\u2581", " ")
        if tokenizer.opening:
            expected = tokenizer.opening.before(expected)
        assert tokenizer.decode(tokenizer.encode(text)) == expected


@every_family
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_pieces_of_any_tokens_are_the_text_of_all(ours, name, data):
    tokenizer = ours[name]
    known = tokenizer._backend.get_vocab().values()
    odd = [
        i
        for i in known
        if not tokenizer.bytes_of(i).decode(errors="replace").isprintable() or len(tokenizer.bytes_of(i)) == 1
    ]
    ids = data.draw(st.lists(st.sampled_from(sorted(known)) | st.sampled_from(sorted(odd)), max_size=12))
    runs = ByteRuns(tokenizer)
    pieces = runs.pieces(ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len(pieces) == len(ids)


@every_family
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30) | st.text(alphabet="ab \n\u2581\u0301\u00e9\U0001f600", max_size=30))
def test_the_pieces_of_a_text_come_as_soon_as_they_are_whole(ours, name, text):
    tokenizer = ours[name]
    ids = tokenizer.encode(text)
    runs, shown = ByteRuns(tokenizer), ""
    for number, token in enumerate(ids, 1):
        shown += runs(token)
        whole = b"".join(map(tokenizer.bytes_of, ids[:number])).decode(errors="ignore")
        assert shown == whole
    assert shown == tokenizer.decode(ids)


@every_family
def test_whole_texts_are_decoded_as_transformers_decodes_them(ours, theirs, name):
    for text in TEXTS:
        ids = ours[name].encode(text)
        expected = theirs[name].decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = ours[name].decode(ids)
        strips = (name.startswith("llama,") and name != "llama, never") or name == "swallowing"
        assert (found.removeprefix(" ") if strips else found) == expected


@every_family
def test_the_bytes_of_tokens_are_those_of_the_text(ours, name):
    tokenizer = ours[name]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert text_bytes(tokenizer, ids) == len(tokenizer.decode(ids).encode())
    begin = [tokenizer.special_id(token) for token in tokenizer.begins]
    assert text_bytes(tokenizer, [*begin, *tokenizer.encode("four"), tokenizer.end_of_text]) in (4, 5)


@every_family
def test_what_is_written_is_the_same_tokenizer_to_transformers_and_to_us(places, ours, theirs, name, tmp_path):
    ours[name].save(tmp_path, 256)
    again, back, before = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path), theirs[name]
    asked = json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert asked.removesuffix("Fast") == CLASSES.get(name, "PreTrainedTokenizer")
    for text in TEXTS:
        assert again(text)["input_ids"] == before(text)["input_ids"], text
        assert back.encode(text) == ours[name].encode(text)
    named = AutoTokenizer.from_pretrained(places[name])  # with its class
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(again, f"{role}_token") == getattr(named, f"{role}_token"), role
    assert again.get_vocab() == before.get_vocab()
    assert {str(t) for t in again.added_tokens_decoder.values()} == {
        str(t) for t in before.added_tokens_decoder.values()
    }
    assert again.padding_side == named.padding_side
    assert again.eos_token_id == ours[name].end_of_text == back.end_of_text
    assert ours[name].pad(10**6) == (ours[name].end_of_text if named.pad_token is None else named.pad_token_id)
    assert back.template is HH, "though it says a text's beginning to transformers"
    assert (back.fingerprint, back.begins, back.opening, back.stops) == (
        ours[name].fingerprint, ours[name].begins, ours[name].opening, ours[name].stops,
    )  # fmt: skip
    assert json.loads((tmp_path / "generation_config.json").read_text())["bos_token_id"] in (
        named.bos_token_id,
        ours[name].end_of_text,
    )


@every_family
def test_hh_dialogues_begin_and_go_on_as_transformers_renders_them(ours, name, tmp_path):
    """Answers that end in a letter: behind a full stop these tokenizers join line breaks to it, which no answer can do."""
    ours[name].save(tmp_path, 256)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    turns = [("user", "What is fog"), ("assistant", "A cloud"), ("user", " caf\u00e9 \U0001f600 <|endoftext|")]
    messages = [{"role": role, "content": content} for role, content in turns]
    for asked in (messages, messages[:1]):
        rendered = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert rendered == encode_prompt(ours[name], asked)


@every_family
def test_rows_are_their_segments_one_by_one_and_a_prompt_is_that_of_training(ours, name):
    tokenizer = ours[name]
    said = ["hello", " two  spaces ", "\nline", "\u0301x", "\u00e9\U0001f600.", "<think>", "y."]
    talks = [
        [Message("user", a), Message("assistant", b), Message("user", b), Message("assistant", a)]
        for a in said
        for b in said
    ]
    rows = [tokenizer.begun(HH.segments(talk, False), plain=False) for talk in talks]
    ids, flags, counts = encode_rows(rows, tokenizer)
    expected = [marked(row, tokenizer) for row in rows]
    assert ids.tolist() == list(itertools.chain.from_iterable(row for row, _ in expected))
    assert flags.tolist() == list(itertools.chain.from_iterable(marks for _, marks in expected))
    for talk, row in zip(talks, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
        before, words = encode_answered(tokenizer, talk[:3], talk[3].content)
        assert [*before, *words] == row.tolist()
        assert before == encode_prompt(tokenizer, talk[:3])
        expected_words = (
            unicodedata.normalize("NFC", talk[3].content) if name in ("qwen", "gpt_neox") else talk[3].content
        )
        assert tokenizer.answer(words) == expected_words


@pytest.mark.parametrize("name", ["qwen", "gpt_neox"])
def test_an_older_pair_of_files_is_read_as_its_class_reads_it(places, ours, name, tmp_path):
    content = json.loads((places[name] / "tokenizer.json").read_text())
    merges = "\n".join(" ".join(pair) for pair in content["model"]["merges"])
    added = {str(token.pop("id")): token for token in content["added_tokens"]}
    config = json.loads((places[name] / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": added}
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    read = Tokenizer.load(tmp_path)
    for text in TEXTS:
        assert read.encode(text) == ours[name].encode(text), text


def test_a_sentencepiece_file_alone_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no tokenizer\.json .*convert its tokenizer\.model: .*save_pretrained"):
        Tokenizer.load(tmp_path)


# ---- white space and special tokens ----------------------------------------------------------------------------------


def _marked_turns(messages, answer_follows):
    pieces = []
    for m in messages:
        learned = m.role == "assistant"
        words = [Segment("\n"), Segment(m.content, learned)] if learned else [Segment(f"\n {m.content} \n")]
        pieces += [
            Segment(f"<|{m.role}|>", special=True),
            *words,
            Segment("<|end|>", learned, special=True),
            Segment(" \n"),
        ]
    return [*pieces, Segment("<|assistant|>", special=True), Segment("\n")] if answer_follows else pieces


MARKED = Template(
    name="marked",
    segments=_marked_turns,
    jinja="{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{{ m['content'] if m['role'] == 'assistant' else ' ' + m['content'] + ' \n' }}"
    "{{ '<|end|> \n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    end="<|end|>",
)


def test_special_tokens_swallow_white_space_and_words_behind_them_begin_with_a_space(places, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(places["swallowing"] / "tokenizer.json"))
    tokenizer = Tokenizer(backend, special=read_special_tokens(places["swallowing"]), template=MARKED)
    tokenizer.save(tmp_path, 256)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    turns = [
        Message("user", "What is fog?"),
        Message("assistant", "A cloud."),
        Message("user", "\n So? "),
        Message("assistant", "Yes"),
    ]
    messages = [{"role": m.role, "content": m.content} for m in turns]
    rendered = theirs.apply_chat_template(messages, return_dict=False)
    assert rendered == ids_of(MARKED.segments(turns, False), tokenizer)
    before, words = encode_answered(tokenizer, turns[:3], "Yes")
    assert before == theirs.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert rendered[len(before) : len(before) + len(words)] == words
    assert tokenizer.decode(words) == " Yes"
    assert tokenizer.answer(words) == "Yes"
