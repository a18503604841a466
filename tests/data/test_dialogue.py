"""The HH form, its segments, mask and stop rule: nothing is lost or added, and exactly the answers are supervised."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.datasets import open_dataset
from tunesmith.data.dialogue import BadRow, Dialogue, Message, Preference, parse_messages
from tunesmith.data.encoding import IGNORE_INDEX
from tunesmith.data.hh_template import HH, parse_transcript
from tunesmith.data.prompts import encode_prompt
from tunesmith.data.tokenstore import TokenStore, tokenise
from tunesmith.options.training import DataOptions

NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

ODD_TRANSCRIPTS = [
    f"{HUMAN} hi{ASSISTANT} hello",
    f"{HUMAN} hi{ASSISTANT} hello\n\n",
    f"{HUMAN} hi{ASSISTANT} hello\n\n\n\nHuman: more",
    f"{HUMAN} hi{ASSISTANT}",
    f"{HUMAN}{ASSISTANT}{HUMAN}{ASSISTANT} last",
    f"{HUMAN} {ASSISTANT} ",
    f"{HUMAN}no space{ASSISTANT}none here",
    f"{HUMAN}  two spaces{ASSISTANT}   three ",
    f"{HUMAN}\ttab{ASSISTANT}\nnew line",
    f"{HUMAN} a{HUMAN} b{ASSISTANT} c{ASSISTANT} d",
    f"{ASSISTANT} I begin{HUMAN} odd",
    f"{HUMAN} Human: not a marker, Assistant: neither\nAssistant: nor this{ASSISTANT} ok",
    f"{HUMAN} write '\n\nHuman:' and '\n\nAssistant:' in your answer{ASSISTANT} no",
    f"{HUMAN} \n\nhuman: lower case\n\nAssistant : space{ASSISTANT} ok",
    f"{HUMAN} \r\n\r\nAssistant: windows{ASSISTANT} \u2028\u0085 你好 👩‍👩‍👧 e\u0301 \x00",
    f"{HUMAN} <|endoftext|>{ASSISTANT} <|endoftext|> done",
    f"{HUMAN} \n\nSystem: kept as text{ASSISTANT} ok",
]

transcripts = st.lists(
    st.sampled_from([HUMAN, ASSISTANT, "\n\n", "\n", " ", "Human:", "Assistant:", "\n\nSystem:"]) | st.text(max_size=8),
    max_size=12,
).map(lambda pieces: HUMAN + "".join(pieces))

messages = st.builds(
    Message, role=st.sampled_from(["user", "assistant", "system"]), content=st.text(max_size=25), lead=st.sampled_from(["", " "])
)  # fmt: skip
learnable = (
    st.lists(messages, max_size=6)
    .map(lambda ms: [*ms, Message("assistant", "and so it ends")])
    .map(lambda ms: [Message(m.role, m.content) for m in ms])
)


def store_of(dialogues, directory, tokenizer) -> TokenStore:
    """Rows of `messages` through the real path: file, data set, token store."""
    file = directory / "rows.jsonl"
    rows = [{"messages": [{"role": m.role, "content": m.content} for m in ms]} for ms in dialogues]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tokenise(open_dataset(DataOptions(name=str(file))), "train", tokenizer)


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ODD_TRANSCRIPTS)
def test_odd_transcripts_come_back_byte_for_byte(text):
    assert HH.text(parse_transcript(text).messages) == text


@settings(max_examples=500)
@given(text=transcripts)
def test_any_transcript_comes_back_byte_for_byte(text):
    assert HH.text(parse_transcript(text).messages) == text


@settings(max_examples=300)
@given(text=transcripts)
def test_no_turn_holds_a_marker_of_the_next(text):
    """Were one left inside a turn, its words would be learned as another's."""
    for message in parse_transcript(text).messages:
        assert HUMAN not in message.lead + message.content
        assert ASSISTANT not in message.lead + message.content


def test_turns_roles_and_spaces_are_told_apart():
    found = parse_transcript(f"{HUMAN} a{HUMAN}b{ASSISTANT}  c \n{ASSISTANT}").messages
    assert found == (
        Message("user", "a"),
        Message("user", "b", ""),
        Message("assistant", " c \n"),
        Message("assistant", "", ""),
    )


@pytest.mark.parametrize("text", ["", "hello", " \n\nHuman: hi", "\nHuman: hi", "Human: hi\n\nAssistant: ho", "\n\n"])
def test_text_without_marker_at_the_beginning_is_a_bad_row(text):
    with pytest.raises(BadRow, match="no role marker at the beginning"):
        parse_transcript(text)


@pytest.mark.parametrize(
    ("role", "becomes"),
    [("user", "user"), ("human", "user"), ("Human", "user"), ("prompter", "user"), ("assistant", "assistant"),
     ("gpt", "assistant"), ("bot", "assistant"), ("model", "assistant"), ("SYSTEM", "system")],
)  # fmt: skip
def test_role_names_of_the_ecosystem(role, becomes):
    assert parse_messages([{"role": role, "content": "x"}]).messages == (Message(becomes, "x"),)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "not a list"), ("hi", "not a list"), ([], "not a list"), ({"role": "user"}, "not a list"),
        ([{"role": "user"}], "without text"), ([{"role": "user", "content": None}], "without text"),
        ([{"role": "user", "content": ["x"]}], "without text"), (["hi"], "without text"),
        ([{"role": "tool", "content": "x"}], "unknown role 'tool'"), ([{"content": "x"}], "unknown role None"),
    ],
)  # fmt: skip
def test_bad_messages_give_their_reason(value, reason):
    with pytest.raises(BadRow, match=reason):
        parse_messages(value)


def test_dialogue_without_anything_to_learn_gives_its_reason():
    with pytest.raises(BadRow, match="no assistant turn"):
        Dialogue((Message("user", "hi"),)).check()
    for nothing in ("", "  ", "\n"):
        with pytest.raises(BadRow, match="empty answer"):
            Dialogue((Message("assistant", "first"), Message("user", "hi"), Message("assistant", nothing))).check()
    fine = Dialogue((Message("user", "hi"), Message("assistant", ""), Message("assistant", "ok")))
    assert fine.check() is fine


def talk(*contents):
    """User and assistant in turn."""
    return Dialogue(tuple(Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)))


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (["q", "a"], ["q", "b"], None),
        (["q", "a", "more?", "c"], ["q", "a", "more?", "d"], None),
        (["q", "a"], ["p", "b"], "the prompts of chosen and rejected differ"),
        (["q", "a", "more?", "c"], ["q", "b"], "the prompts of chosen and rejected differ"),
        (["q", "a"], ["q", "a"], "chosen and rejected are the same"),
        (["q", " "], ["q", "b"], "empty chosen answer"),
        (["q", "a"], ["q", ""], "empty rejected answer"),
        (["q", "a", "more?"], ["q", "b"], "chosen does not end with an answer"),
        (["q", "a"], [], "rejected does not end with an answer"),
    ],
)
def test_a_preference_is_two_answers_to_one_prompt(chosen, rejected, reason):
    preference = Preference(talk(*chosen), talk(*rejected))
    if reason is None:
        assert preference.check() is preference
    else:
        with pytest.raises(BadRow, match=reason):
            preference.check()


def test_answers_without_a_prompt_are_no_preference():
    alone = [Dialogue((Message("assistant", text),)) for text in "ab"]
    with pytest.raises(BadRow, match="no prompt"):
        Preference(*alone).check()


# ---- segments and mask ---------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(turns=st.lists(messages, max_size=8))
def test_segments_joined_are_the_text_and_answers_are_the_assistants_words(turns):
    plain = "".join(f"\n\n{NAMES[m.role]}:{m.lead}{m.content}" for m in turns)
    pieces = HH.segments(turns, False)
    assert "".join(piece.text for piece in pieces) == HH.text(turns) == plain
    words = [m.lead + m.content for m in turns if m.role == "assistant"]
    assert [piece.text for piece in pieces if piece.loss] == [w for w in words if w]
    assert [piece.loss for piece in pieces] == [piece.closes for piece in pieces]
    assert not any(piece.special for piece in pieces)


@settings(max_examples=40)
@given(dialogues=st.lists(learnable, min_size=1, max_size=8))
def test_supervised_tokens_are_exactly_the_answers_each_with_one_end(tokenizer, tmp_path_factory, dialogues):
    """The masked targets, cut at each end of text, decode to the assistants' words: no token more, none fewer."""
    store = store_of(dialogues, tmp_path_factory.mktemp("rows"), tokenizer)
    assert len(store) == len(dialogues)
    for index, turns in enumerate(dialogues):
        tokens, targets = store.row(index, "assistant")
        assert tokenizer.decode(tokens) == HH.text(turns)
        answers, current = [], []
        for target in targets[targets != IGNORE_INDEX].tolist():
            if target == tokenizer.end_of_text:
                answers.append(tokenizer.decode(current))
                current = []
            else:
                current.append(target)
        assert current == [], "the last supervised target is an end"
        assert answers == [" " + m.content for m in turns if m.role == "assistant"]


@settings(max_examples=40)
@given(dialogues=st.lists(learnable, min_size=1, max_size=8))
def test_targets_equal_a_plain_reconstruction(tokenizer, tmp_path_factory, dialogues):
    """Segment by segment: nothing for context, the next id for answers, the end after an answer's last id."""
    store = store_of(dialogues, tmp_path_factory.mktemp("rows"), tokenizer)
    for index, turns in enumerate(dialogues):
        ids, teaches = [], []
        for segment in HH.segments(turns, False):
            piece = tokenizer.encode(segment.text)
            ids += piece
            teaches += [segment.loss] * len(piece)
        expected = []
        for t in range(len(ids)):
            if t + 1 < len(ids) and teaches[t + 1]:
                expected.append(ids[t + 1])
            elif teaches[t]:
                expected.append(tokenizer.end_of_text)
            else:
                expected.append(IGNORE_INDEX)
        tokens, targets = store.row(index, "assistant")
        assert tokens.tolist() == ids
        assert targets.tolist() == expected
        assert store.row(index, "all")[1].tolist() == [*ids[1:], tokenizer.end_of_text]


def test_end_of_text_is_never_an_input(tokenizer, tmp_path):
    turns = [Message("user", "say <|endoftext|>"), Message("assistant", "<|endoftext|>"), Message("assistant", "x")]
    tokens, targets = store_of([turns], tmp_path, tokenizer).row(0, "assistant")
    assert tokenizer.end_of_text not in tokens
    assert (targets == tokenizer.end_of_text).sum() == 2


# ---- inference reads what training wrote ---------------------------------------------------------------------------


@settings(max_examples=40)
@given(turns=learnable)
def test_prompt_ids_are_a_prefix_of_the_training_ids(tokenizer, tmp_path_factory, turns):
    """For every answer of the dialogue: what the model reads before it is what it read in training."""
    tokens = store_of([turns], tmp_path_factory.mktemp("rows"), tokenizer).row(0, "assistant")[0].tolist()
    for number, message in enumerate(turns):
        if (
            message.role == "assistant" and number and turns[number - 1].role != "assistant"
        ):  # else there is nothing to answer
            prompt = encode_prompt(tokenizer, [{"role": m.role, "content": m.content} for m in turns[:number]])
            answer = tokenizer.encode(" " + message.content)
            assert tokens[: len(prompt)] == prompt
            assert tokens[len(prompt) : len(prompt) + len(answer)] == answer


@settings(max_examples=200)
@given(turns=st.lists(messages, max_size=6))
def test_a_prompt_ends_in_the_marker_without_a_space(turns):
    text = "".join(piece.text for piece in HH.segments(turns, True))
    assert text == HH.text(turns) + ASSISTANT


def test_a_trailing_space_would_mistokenise_every_prompt_of_the_sample(tokenizer):
    """One space too many, the commonest mistake with this form: counted on 480 dialogues, and ours makes it on none."""
    source = open_dataset(DataOptions(name="sample"))
    store = tokenise(source, "train", tokenizer)
    ours = spaced = 0
    for index in range(len(store)):
        tokens, targets = store.row(index, "assistant")
        text = tokenizer.decode(tokens)
        prompt = text[: text.index(ASSISTANT) + len(ASSISTANT)]
        start = int((targets != IGNORE_INDEX).argmax()) + 1
        ours += tokens[:start].tolist() != tokenizer.encode(prompt)
        with_space = tokenizer.encode(prompt + " ")
        spaced += tokens[: len(with_space)].tolist() != with_space
    assert (ours, spaced) == (0, 480)


@pytest.mark.parametrize(
    ("answer", "kept", "stopped"),
    [
        ("hello", "hello", False), ("", "", False), ("a\n\nHuman: b", "a", True), ("a\n\nAssistant: b", "a", True),
        ("a\n\nSystem: b\n\nHuman: c", "a", True), ("a\n\nAssistant: b\n\nHuman: c", "a", True),
        ("\n\nHuman:", "", True), ("a Human: b", "a Human: b", False), ("a\nHuman: b", "a\nHuman: b", False),
    ],
)  # fmt: skip
def test_an_answer_ends_before_the_first_marker(answer, kept, stopped):
    assert HH.cut_at_stop(answer) == (kept, stopped)
