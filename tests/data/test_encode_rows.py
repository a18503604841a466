"""Encoding whole rows and finding the pieces' borders afterwards equals encoding every piece by itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import marked
from tunesmith.data.dialogue import Message
from tunesmith.data.encoding import encode_rows
from tunesmith.data.hh_template import HH
from tunesmith.data.template import Segment
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.words import Words
from tunesmith.files.names import SAMPLE

TOKENIZERS = {"gpt2": Tokenizer.gpt2(), "sample": Tokenizer.load(SAMPLE)}
ODD = st.text(alphabet=st.sampled_from(list("ab 's.,:'!\n\t\r\u00e9\u4e16\U0001f600  \n\nHuman:0")), max_size=12)
messages = st.lists(
    st.builds(Message, st.sampled_from(["user", "assistant"]), ODD, st.sampled_from([" ", " ", " ", ""])),
    min_size=1,
    max_size=5,
)


def one_by_one(rows, tokenizer):
    plain = [marked(row, tokenizer) for row in rows]
    return (
        [i for ids, _ in plain for i in ids],
        [f for _, flags in plain for f in flags],
        [len(ids) for ids, _ in plain],
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=400)
@given(st.lists(messages, min_size=1, max_size=4))
def test_equals_piece_by_piece(name, dialogues):
    rows = [HH.segments(d, False) for d in dialogues]
    found = encode_rows(rows, TOKENIZERS[name])
    for ours, plain in zip(found, one_by_one(rows, TOKENIZERS[name]), strict=True):
        assert ours.tolist() == plain


def test_ordinary_dialogues_take_the_fast_path(monkeypatch):
    rows = [
        HH.segments([Message("user", f"Hello {i}"), Message("assistant", "Hi there."), Message("user", "Bye")], False)
        for i in range(9)
    ]
    calls, words = [], Words(TOKENIZERS["gpt2"])
    plain = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: calls.append(texts) or plain(self, texts))
    encode_rows(rows, TOKENIZERS["gpt2"], words)
    assert sorted(calls[0]) == sorted(set(calls[0])), "each word once"
    assert len(calls) == 1
    encode_rows(rows, TOKENIZERS["gpt2"], words)
    assert len(calls) == 1, "and never again"
    encode_rows([HH.segments([Message("assistant", "Odd", "")], False)], TOKENIZERS["gpt2"], words)
    assert calls[2:] == [["\n\nAssistant:", "Odd"]], "piece by piece"


def learned(text):
    return Segment(text, loss=True, closes=True)


def test_plain_text_is_supervised_from_its_second_token_to_its_end():
    ids, flags, counts = encode_rows([[learned("one two three")], [learned("four")]], TOKENIZERS["gpt2"])
    assert counts.tolist() == [3, 1]
    assert flags.tolist() == [1, 1, 2, 2]
    assert np.array_equal(ids, TOKENIZERS["gpt2"].encode("one two three") + TOKENIZERS["gpt2"].encode("four"))
