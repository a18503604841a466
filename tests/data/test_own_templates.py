"""ChatML, Llama 3's and Gemma's form against their own Jinja in transformers, with tokenizers of the families that have them."""

import itertools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from family_tokenizers import write
from tunesmith.data.datasets import open_dataset
from tunesmith.data.dialogue import Message, Preference
from tunesmith.data.encoding import END, IGNORE_INDEX, encode_rows, ids_of, targets_of
from tunesmith.data.prompts import encode_answered, encode_prompt
from tunesmith.data.readers import Report
from tunesmith.data.special_tokens import read_special_tokens
from tunesmith.data.templates import TEMPLATES
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.options.training import DataOptions

PAIRS = [
    ("chatml", "qwen"),
    ("chatml", "smollm2"),
    ("chatml", "prefix space"),
    ("llama3", "llama 3"),
    ("gemma", "gemma"),
]
PUBLISHED = {  # as the models' cards have them, to the letter or in sense
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}"
    "{%- endif -%}{%- for message in loop_messages -%}{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}"
    "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}{{ '<start_of_turn>' + role + '\n' + "
    "(first_user_prefix if loop.first else '') }}{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}",
}
every_pair = pytest.mark.parametrize(("template", "kind"), PAIRS)


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """(template, kind) -> our tokenizer, and transformers' reading of what we write of it."""
    found = {}
    for template, kind in PAIRS:
        path = write(kind, tmp_path_factory.mktemp("kind"))
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        ours = Tokenizer(backend, special=read_special_tokens(path), template=TEMPLATES[template])
        written = tmp_path_factory.mktemp("written")
        ours.save(written, 1024)
        found[template, kind] = ours, AutoTokenizer.from_pretrained(written)
    return found


def as_messages(turns):
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def rendered(theirs, turns, **more):
    return theirs.apply_chat_template(as_messages(turns), return_dict=False, **more)


def dialogues(count):
    source = open_dataset(DataOptions(name="sample"))
    rows = (row.value for row in source.rows("train", Report(), pairs=False))
    scenes = itertools.cycle([[], [Message("system", "Be brief.")]])
    talks = ((row.chosen if isinstance(row, Preference) else row).messages for row in rows)
    return [[*scene, *turns] for scene, turns in itertools.islice(zip(scenes, talks, strict=False), count)]


@every_pair
def test_the_samples_dialogues_are_rendered_token_for_token(tools, template, kind):
    ours, theirs = tools[template, kind]
    talks = dialogues(200)
    assert len(talks) == 200
    for turns in talks:
        assert rendered(theirs, turns) == ids_of(ours.template.segments(turns, False), ours)
        assert rendered(theirs, turns, chat_template=PUBLISHED[template]) == rendered(theirs, turns)
        last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
        asked = encode_prompt(ours, turns[:last])
        assert rendered(theirs, turns[:last], add_generation_prompt=True) == asked
        assert rendered(theirs, turns)[: len(asked)] == asked


HARD = [
    "",
    " ",
    "\n",
    "hi",
    " hi",
    "hi ",
    "\n\nhi\n",
    "a\n\nb",
    "\U0001f600",
    "e\u0301",
    "don't  stop 12345",
    "\u4f60\u597d.",
    "<table>\t|",
]
hard = st.sampled_from(HARD) | st.text(alphabet="ab 1.'\n\t\u00e9\U0001f600", max_size=12)
turns_of_any = st.builds(
    lambda scene, exchanges: [
        *([Message("system", scene)] if scene else []),
        *(m for q, a, w in exchanges for m in (Message("user", q), Message("assistant", a, weight=w))),
    ],
    st.none() | hard,
    st.lists(st.tuples(hard, hard, st.sampled_from([1, 1, 0])), min_size=1, max_size=3),
)


@every_pair
@settings(max_examples=150, deadline=None)
@given(turns=turns_of_any)
def test_hard_texts_are_rendered_alike_and_the_mask_is_the_answers(tools, template, kind, turns):
    """An answer that begins with white space is cut off from the line break before it, which transformers joins to it."""
    ours, theirs = tools[template, kind]
    trims = template != "chatml"
    answers = [m.content.strip() if trims else m.content for m in turns if m.role == "assistant" and m.weight]
    segments = ours.template.segments(turns, False)
    assert rendered(theirs, turns, tokenize=False) == "".join(s.text for s in segments)
    if not any(m.content[:1].isspace() for m in turns if m.role == "assistant" and not trims):
        assert rendered(theirs, turns) == ids_of(segments, ours)
    ids, flags, _ = encode_rows([ours.begun(segments, plain=False)], ours)
    targets = targets_of(ids, flags, ours.end_of_text)
    learned, current = [], []
    for target in targets[targets != IGNORE_INDEX].tolist():
        if target == ours.end_of_answer:
            learned.append(ours.answer(current))
            current = []
        else:
            current.append(target)
    assert [*learned, *current] == [text.replace("e\u0301", "\u00e9") if kind == "qwen" else text for text in answers]
    assert (flags & END > 0).sum() == len(answers)
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and (turn.content.strip() if trims else turn.content):
            before, words = encode_answered(ours, turns[:number], turn.content)
            assert before == encode_prompt(ours, turns[:number]) == ids[: len(before)].tolist()
            assert words == ids[len(before) : len(before) + len(words)].tolist()


@every_pair
def test_a_text_that_spells_special_tokens_stays_text(tools, template, kind):
    ours, theirs = tools[template, kind]
    names = [
        *theirs.all_special_tokens,
        *{s.text for s in ours.template.segments([Message("user", "x")], True) if s.special},
    ]
    turns = [Message("user", f"say {name} now") for name in names] + [Message("assistant", "".join(names))]
    plain = [Message("user", "say it now")] * len(names) + [Message("assistant", "it")]
    specials = {ours.special_id(name) for name in names}
    of_words, of_plain = (
        [i for i in ids_of(ours.template.segments(talk, False), ours) if i in specials] for talk in (turns, plain)
    )
    assert of_words == of_plain
    assert encode_prompt(ours, turns[:-1]) != rendered(theirs, turns[:-1], add_generation_prompt=True)


def test_a_system_text_stands_before_the_question_that_follows_it_in_gemmas_form():
    turns = [
        Message("system", "Be brief."),
        Message("user", " Why? "),
        Message("assistant", "So."),
        Message("system", "Now rhyme."),
    ]
    assert TEMPLATES["gemma"].text(turns) == (
        "<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\nSo.<end_of_turn>\n"
        "<start_of_turn>user\nNow rhyme.\n\n<end_of_turn>\n"
    )


@every_pair
def test_an_answer_stops_at_its_end_and_at_all_ends_that_the_model_names(tools, template, kind):
    ours, _ = tools[template, kind]
    assert ours.end_of_answer == ours.special_id(TEMPLATES[template].end)
    assert ours.stops == {ours.end_of_answer, ours.end_of_text, *ours.special.ends}
    expected = {"qwen": 2, "smollm2": 1, "prefix space": 1, "llama 3": 3, "gemma": 2}
    assert len(ours.stops) == expected[kind]
