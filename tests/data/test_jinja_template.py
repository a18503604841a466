"""Any chat_template as a template of ours: its tokens are transformers', its mask is derived, and a bad one is one clear line."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from public_templates import PUBLIC, ours_of, theirs_of
from tunesmith.data.dialogue import BadRow, Message
from tunesmith.data.encoding import IGNORE_INDEX, encode_rows, targets_of
from tunesmith.data.jinja_template import from_jinja
from tunesmith.data.prompts import encode_answered, encode_prompt
from tunesmith.errors import UserError

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
SPECIAL = [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<s>", "</s>")]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS = [
    Message("user", "hi <|im_end|></s>"),
    Message("assistant", " yo\n"),
    Message("user", "more"),
    Message("assistant", "ok"),
]


def learned(template, messages):
    return [s.text for s in template.segments(messages, False) if s.loss]


def test_the_answers_and_their_ends_are_learned_and_words_never_become_special_tokens():
    chatml, llama2 = (from_jinja(text, SPECIAL, VARIABLES) for text in (CHATML, LLAMA2))
    assert learned(chatml, TURNS) == [" yo\n", "<|im_end|>", "ok", "<|im_end|>"]
    assert learned(llama2, TURNS) == [" yo ", "</s>", " ok ", "</s>"]
    assert (llama2.lead, llama2.trail, llama2.words(" yo ")) == (" ", " ", "yo")
    for template in (chatml, llama2):
        told = next(s for s in template.segments(TURNS, False) if "hi" in s.text)
        assert "hi <|im_end|></s>" in told.text
        assert not told.special
        prompt, words = template.answered(TURNS)
        assert prompt == template.segments(TURNS[:-1], True)
        assert "".join(s.text for s in words).strip() == "ok"


def test_a_dialogue_that_the_template_refuses_is_a_bad_row_with_its_words():
    template = from_jinja(LLAMA2, SPECIAL, VARIABLES)
    with pytest.raises(BadRow, match="Only user and assistant roles are supported!"):
        template.segments([Message("system", "Be brief."), *TURNS], False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% if x", "line 1: unexpected end of template"),
        ("{{ raise_exception('never') }}", "chat_template: never: it does not render a single question"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "1,000,000 steps"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'x' * 10000000000 }}", "more than 10,000,000 elements"),
        ("{{ '%1000000000d' | format(3) }}", "width of 100,000"),
        ("{{ 'x' | center(10000000000) }}", "10,000,000,000 characters"),
        ("{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "10,000,000"),
        ("{{ messages[0].role }}", "leaves out what the user says"),
        (CHATML.partition("{% if add")[0], "no prompt for an answer .* but begins one with '<|im_start|>assistant"),
        (CHATML.replace("<|im_end|>", "<|end|>"), r"ends an answer with '<\|end\|>', which is no special token"),
    ],
    ids=range(12),
)
def test_a_template_that_cannot_be_used_is_one_clear_line(text, said):
    with pytest.raises(UserError, match=said) as raised:
        from_jinja(text, SPECIAL, VARIABLES)
    assert "\n" not in str(raised.value)


# ---- laws, whatever is said ----------------------------------------------------------------------------------------------

LAWS = ("chatml", "llama3", "gemma2", "zephyr", "qwen3", "olmo2", "mistral03", "smollm3")
ours, theirs = (functools.cache(lambda name, of=of: of(PUBLIC[name])) for of in (ours_of, theirs_of))


def sayings(name):
    """Words, among them such as spell the template's own tokens and marks."""
    public = PUBLIC[name]
    odd = [
        public.ends,
        public.bos,
        *public.special,
        *public.plain,
        "</think>",
        "<think>x</think> y",
        "[/INST]",
        "{{ x }}",
        "\U00100000",
    ]
    return st.sampled_from([*filter(None, odd), "a\n\nb", " a", "a ", "\n", "say <|im_end|> now"]) | st.text(
        "ab <|>\n", min_size=1, max_size=8
    )


@pytest.mark.parametrize("name", LAWS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_is_said_the_text_is_transformers_and_special_tokens_are_the_templates(name, data):
    tokenizer, their, said = ours(name), theirs(name), sayings(name)
    turns = [Message(("user", "assistant")[i % 2], data.draw(said)) for i in range(2 * data.draw(st.integers(1, 3)))]
    messages = [{"role": m.role, "content": m.content} for m in turns]
    row, refused = [], ""
    try:
        row = tokenizer.template.segments(turns, False)
    except BadRow as error:
        refused = str(error)
    if refused:
        assert "leaves out" in refused or "changes the text of a turn" in refused
        return
    assert "".join(s.text for s in row) == their.apply_chat_template(messages, tokenize=False)
    plain = [Message(m.role, "x" if m.content.strip() else m.content) for m in turns]
    assert [s.text for s in row if s.special] == [
        s.text for s in tokenizer.template.segments(plain, False) if s.special
    ]
    ids, flags, _ = encode_rows([tokenizer.begun(row, plain=False)], tokenizer)
    targets = targets_of(ids, flags, tokenizer.end_of_text)
    assert (targets != IGNORE_INDEX).any() or tokenizer.template.refusal(turns)
    if not tokenizer.template.refusal(turns):
        before, words = encode_answered(tokenizer, turns[:-1], turns[-1].content)
        assert before == encode_prompt(tokenizer, turns[:-1]) == ids[: len(before)].tolist()
        assert [*words, tokenizer.end_of_answer] == targets[len(before) - 1 :][: len(words) + 1].tolist()
        assert (targets[len(before) + len(words) :] == IGNORE_INDEX).all(), "what follows the end is context"
