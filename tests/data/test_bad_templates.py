"""Templates that cannot be used, dialogues that a template was not made for, and words that look like a template's: right, or one line."""

import dataclasses
import functools

import pytest

from public_templates import PUBLIC, ours_of, theirs_of
from tunesmith.data.dialogue import BadRow, Message
from tunesmith.data.encoding import IGNORE_INDEX, encode_rows, targets_of
from tunesmith.errors import UserError

SMOLLM2 = PUBLIC["smollm2"]
ours = functools.cache(lambda name: ours_of(PUBLIC[name]))
theirs = functools.cache(lambda name: theirs_of(PUBLIC[name]))
every_public = pytest.mark.parametrize("name", PUBLIC)

TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ WORDS }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chatml(words="m['content']"):
    return TURN.replace("WORDS", words) + ASK


def encoded(tokenizer, messages, answer_follows=False):
    """Ids and targets of a dialogue."""
    segments = tokenizer.begun(tokenizer.template.segments(messages, answer_follows), plain=False)
    ids, flags, _ = encode_rows([segments], tokenizer)
    return ids.tolist(), targets_of(ids, flags, tokenizer.end_of_text)


def messages_of(text):
    """`u` is a question, `a` an answer, `s` a system turn; words follow the letter."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [Message(roles[turn[:1]], turn[1:]) for turn in text.split("/")]


# ---- templates --------------------------------------------------------------------------------------------------------

UNUSABLE = {
    "{% for m in messages %}{{ m['content'] }": "line 1: unexpected",
    "\n{% for m in messages %}{{ m['content'] }}": "line 2: Unexpected end of template",
    "{{ messages | shout }}": "No filter named 'shout'",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}" + chatml(): "takes more than 1,000,000 steps",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + chatml(): "RecursionError",
    "{{ 'x' * 10000000000 }}" + chatml(): "more than 10,000,000",
    "{{ ''.__class__.__mro__ }}" + chatml(): "unsafe",
    "{% include '/etc/hosts' %}" + chatml(): "no loader",
    "{{ messages[0].nothing.more }}": "has no attribute 'nothing'",
    "{% for t in tools %}{{ t }}{% endfor %}" + chatml(): "'NoneType' object is not iterable",
    "{{ raise_exception('not for you') }}": "not for you",
    chatml().replace("<|im_end|>", "<|eot|>"): r"ends an answer with '<\|eot\|>', which is no special token",
    chatml().replace("<|im_end|>", "###"): "ends an answer with '###', which is no special token",
    chatml().replace(ASK, ""): "has no prompt for an answer",
    "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endfor %}": "leaves out what the user says",
    chatml("m['content'] | upper"): "changes the text of a turn",
    chatml("m['content'] | capitalize"): "changes the text of a turn",
    chatml("m['content'] | title"): "changes the text of a turn",
    chatml("m['content'] | length ~ m['content']"): "changes the text of a turn",
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), UNUSABLE.items())
def test_a_template_that_cannot_be_used_is_refused_with_its_file_and_the_reason(text, said):
    with pytest.raises(UserError, match=said) as refused:
        ours_of(SMOLLM2, text)
    line = str(refused.value)
    assert "tokenizer.json" in line
    assert "\n" not in line
    assert "--chat.template" in line or "not a Jinja template" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("m['content'][:4]", "changes the text of a turn"),
        ("m['content'] | replace('o', '0')", "changes the text of a turn"),
        ("1 // (m['content'] | length - 10) ~ m['content']", "fails with ZeroDivisionError"),
    ],
)
def test_a_row_that_a_template_changes_or_fails_at_is_one_bad_row(words, said):
    tokenizer = ours_of(SMOLLM2, chatml(words))
    with pytest.raises(BadRow, match=said):
        tokenizer.template.segments(messages_of("uIs it hot?/ayes, so hot"), False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (chatml("m['content'] + m['content']"), "writes it twice"),
        (chatml().replace("in messages", "in messages | reverse"), "different text"),
    ],
)
def test_answers_that_cannot_be_told_from_the_rest_are_not_learned(text, said):
    tokenizer = ours_of(SMOLLM2, text)
    talk = messages_of("uOne?/atwo/uThree?/afour")
    _, targets = encoded(tokenizer, talk)
    assert said in tokenizer.template.refusal(talk)
    assert (targets == IGNORE_INDEX).all()


def test_without_a_token_that_ends_an_answer_the_end_of_text_is_its_last_target():
    turns = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = ours_of(SMOLLM2, turns + "{% if add_generation_prompt %}assistant:{% endif %}")
    ids, targets = encoded(tokenizer, messages_of("uOne?/atwo"))
    assert tokenizer.decode(ids) == "user: One?\nassistant: two\n"
    learned = targets[targets != IGNORE_INDEX].tolist()
    assert tokenizer.decode(learned) == " two"
    assert learned[-1] == tokenizer.end_of_text == tokenizer.end_of_answer
    assert tokenizer.end_of_text not in ids


# ---- dialogues --------------------------------------------------------------------------------------------------------

ODD = ("uone/utwo/aso", "aHello/uhi/ayes", "uone/sbe brief/atwo", "sbe brief/ahello", "uone/atwo/athree", "uone/atwo/sthree/ufour/afive",
       "u/ayes", "uone/a/utwo/athree", "s/uone/atwo", "u \n /a \n ")  # fmt: skip


@every_public
def test_turns_in_an_odd_order_or_without_words_are_rendered_as_by_transformers_or_refused(name):
    for text in ODD:
        talk = messages_of(text)
        compare(name, talk, False)
        compare(name, talk[:-1], True)


def compare(name, talk, answer_follows):
    asked = [{"role": m.role, "content": m.content} for m in talk]
    try:
        found = encoded(ours(name), talk, answer_follows)[0]
    except BadRow as reason:
        found = str(reason)
    try:
        expected = theirs(name).apply_chat_template(asked, add_generation_prompt=answer_follows, return_dict=False)
    except Exception as reason:
        expected = str(reason)
    if isinstance(found, list):
        assert found == expected
    else:
        assert isinstance(expected, str) or "leaves out what the" in found
        assert "\n" not in found


@every_public
def test_words_that_look_like_the_template_or_like_jinja_stay_words(name):
    public, tokenizer = PUBLIC[name], ours(name)
    tricks = f"a {public.ends} b {{{{ messages }}}} {{% if x %}} {public.bos or ''}<|im_start|>c {{# d #}}"
    plain = messages_of("uone/atwo/uthree/afour")
    ids, targets = encoded(tokenizer, [dataclasses.replace(m, content=tricks) for m in plain])
    usual, usual_targets = encoded(tokenizer, plain)
    special = {number for number, token in tokenizer.added.items() if token.special}
    assert [i for i in ids if i in special] == [i for i in usual if i in special]
    learned, usually = (t[t != IGNORE_INDEX].tolist() for t in (targets, usual_targets))
    assert [i for i in learned if i in special] == [i for i in usually if i in special]
    assert tokenizer.decode(ids).count(tricks) == 4
    assert tokenizer.decode(learned).count(tricks) == {"all": 2, "last": 1, "none": 0}[public.learns]


@every_public
def test_an_answer_of_weight_0_is_read_and_not_learned(name):
    tokenizer, talk = ours(name), messages_of("uone/atwo/uthree/afour")
    ids, targets = encoded(tokenizer, talk)
    for unlearned in (1, 3):
        weighted = [dataclasses.replace(m, weight=float(i != unlearned)) for i, m in enumerate(talk)]
        same, some = encoded(tokenizer, weighted)
        assert same == ids
        said = tokenizer.decode(some[some != IGNORE_INDEX].tolist())
        assert talk[unlearned].content not in said
        assert (talk[4 - unlearned].content in said) == (
            PUBLIC[name].learns == "all" or (PUBLIC[name].learns == "last" and unlearned == 1)
        )
    assert (targets != IGNORE_INDEX).any() == (PUBLIC[name].learns != "none")
