"""Public models' chat templates token for token as transformers renders them, and which of the tokens carry loss."""

import functools

import numpy as np
import pytest

from public_templates import PUBLIC, ours_of, theirs_of
from real_dialogues import SYSTEM, embedded, real
from tunesmith.data.dialogue import Message
from tunesmith.data.encoding import IGNORE_INDEX, encode_rows, ids_of, targets_of
from tunesmith.data.prompts import encode_prompt
from tunesmith.data.template import Segment

every_public = pytest.mark.parametrize("name", PUBLIC)
ours = functools.cache(lambda name: ours_of(PUBLIC[name]))
theirs = functools.cache(lambda name: theirs_of(PUBLIC[name]))


def as_messages(talk):
    return [Message(m["role"], m["content"]) for m in talk]


def encoded(tokenizer, talks, answer_follows=False):
    """Ids of each dialogue, and the target of each id."""
    rows = [tokenizer.template.segments(as_messages(talk), answer_follows) for talk in talks]
    ids, flags, counts = encode_rows([tokenizer.begun(row, plain=False) for row in rows], tokenizer)
    cuts = np.cumsum(counts)[:-1]
    cut = zip(np.split(ids, cuts), np.split(flags, cuts), strict=True)
    return [(row.tolist(), targets_of(row, bits, tokenizer.end_of_text)) for row, bits in cut]


def learned(targets):
    """Numbers of the tokens that are learned: each is the target of the one before it."""
    return (np.flatnonzero(targets != IGNORE_INDEX) + 1).tolist()


def with_system(talks, public):
    """Every second one begins with a system turn, where the template has a place for that."""
    scene = {"role": "system", "content": SYSTEM}
    return [[scene, *talk] if i % 2 and public.system == "kept" else talk for i, talk in enumerate(talks)]


def told(tokens, their, public):
    """An answer's words out of its tokens, without the last, which ends it."""
    return their.decode(tokens[:-1]).removeprefix(public.lead).removesuffix(public.tail)


def check(name, talks):
    public, tokenizer, their = PUBLIC[name], ours(name), theirs(name)
    end, talks = tokenizer.special_id(public.ends), with_system(talks, public)
    asked = [(talk[:i], talk, i) for talk in talks for i, turn in enumerate(talk) if turn["role"] == "assistant"]
    spans = {id(talk): [] for talk in talks}
    whole = {id(talk): their.apply_chat_template(talk, return_dict=False) for talk in talks}
    for (before, talk, i), (mine, _) in zip(asked, encoded(tokenizer, [a[0] for a in asked], True), strict=True):
        prompt = their.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        assert mine == prompt
        if public.learns == "all" or (public.learns == "last" and i == len(talk) - 1):
            stop = whole[id(talk)].index(end, len(prompt)) + 1
            words = talk[i]["content"].strip() if public.strips else talk[i]["content"]
            assert told(whole[id(talk)][len(prompt) : stop], their, public) == words
            spans[id(talk)] += range(len(prompt), stop)
    for talk, (ids, targets) in zip(talks, encoded(tokenizer, talks), strict=True):
        assert ids == whole[id(talk)]
        assert learned(targets) == spans[id(talk)]
    assert (sum(map(len, spans.values())) > 100) == (public.learns != "none")


@every_public
def test_rows_of_the_sample_are_transformers_tokens(name):
    check(name, embedded(24))


@every_public
def test_two_hundred_real_dialogues_are_transformers_tokens(name, shared_data):
    check(name, real(shared_data, 200))


# ---- where a segment by itself and the whole text can differ -------------------------------------------------------------

AT_THE_BORDER = ("\n\nHi", "\nHi", "  Hi", " Hi", "\tHi", "Hi\n", "Hi  ", "...", "\u00e9t\u00e9", "\n", "")


@every_public
def test_an_answer_stands_behind_the_very_tokens_that_ask_for_it_however_it_begins(name):
    """`assistant\\n` and an answer that begins with a line break: in one piece they may make one token, which no model reads
    before it answers. So the prompt is encoded by itself, as it is when an answer is asked for, and then the answer."""
    for said in AT_THE_BORDER:
        check_border(PUBLIC[name], ours(name), theirs(name), said)


def check_border(public, tokenizer, their, said):
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": said}]
    ((ids, targets),) = encoded(tokenizer, [talk])
    prompt = their.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
    whole = their.apply_chat_template(talk, return_dict=False)
    assert prompt == encode_prompt(tokenizer, as_messages(talk[:1]))
    if public.learns == "none":
        assert ids == whole
        assert learned(targets) == []
        return
    assert ids[: len(prompt)] == prompt
    assert their.decode(ids) == their.decode(whole)
    breaks = {
        "qwen3": "\n",
        "smollm3": "\n",
        "phi3": None,
        "phi35": None,
    }  # what else is lost before an answer; None: all white space
    words = said.strip() if public.strips else said.lstrip(breaks.get(public.name, ""))
    begun = [*tokenizer.template.segments(as_messages(talk[:1]), True), Segment(public.lead + words + public.tail)]
    answer = ids_of([s for s in begun if s.text], tokenizer)[len(prompt) :]
    stop = len(prompt) + len(answer) + 1
    assert ids[len(prompt) : stop] == [*answer, tokenizer.special_id(public.ends)]
    assert learned(targets) == list(range(len(prompt), stop))
    if not words[:1].isspace():
        assert ids == whole


# ---- a second opinion: transformers' own mask, by marks that are added to the templates here -----------------------------

START, STOP = "{% generation %}", "{% endgeneration %}"
IM_TURN = "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
IM_MARKED = (
    "{{'<|im_start|>' + message['role'] + '\\n'}}{% if message['role'] == 'assistant' %}"
    + START + "{{ message['content'] + '<|im_end|>' }}" + STOP
    + "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
)  # fmt: skip
MARKED = {  # what writes an answer -> the same, its words and its end between marks
    "chatml": (IM_TURN, IM_MARKED),
    "llama2": ("{{ ' '  + content.strip() + ' ' + eos_token }}", START + "{{ ' '  + content.strip() + ' ' + eos_token }}" + STOP),
    "qwen3": (
        "{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n'"
        " + content.lstrip('\\n') }}",
        "{{- '<|im_start|>' + message.role + '\\n' }}" + START + "{{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n'"
        " + content.lstrip('\\n') + '<|im_end|>' }}" + STOP,
    ),
    "zephyr": ("'  + message['content'] + eos_token }}\n", "' }}" + START + "{{ message['content'] + eos_token }}" + STOP + "{{ '\\n' }}"),
    "phi4": (
        "'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}",
        "'<|im_start|>assistant<|im_sep|>'}}" + START + "{{message['content'] + '<|im_end|>'}}" + STOP,
    ),
    "mistral01": ("{{ message['content'] + eos_token}}", START + "{{ message['content'] + eos_token}}" + STOP),
    "deepseek2": (
        "{{ 'Assistant: ' + message['content'] + eos_token }}",
        "{{ 'Assistant:' }}" + START + "{{ ' ' + message['content'] + eos_token }}" + STOP,
    ),
    "granite3": (
        "assistant<|end_of_role|>'  + message['content'] + '<|end_of_text|>\n' }}",
        "assistant<|end_of_role|>' -}}" + START + "{{- message['content'] + '<|end_of_text|>' }}" + STOP + "{{- '\\n' }}",
    ),
    "commandr": (
        "<|CHATBOT_TOKEN|>'  + content.strip() + '<|END_OF_TURN_TOKEN|>' }}",
        "<|CHATBOT_TOKEN|>' }}" + START + "{{ content.strip() + '<|END_OF_TURN_TOKEN|>' }}" + STOP,
    ),
    "openchat": (
        "{{ 'GPT4 Correct ' + message['role'].title() + ': ' + message['content'] + '<|end_of_turn|>'}}",
        "{{ 'GPT4 Correct ' + message['role'].title() + ':' }}{% if message['role'] == 'assistant' %}" + START
        + "{{ ' ' + message['content'] + '<|end_of_turn|>' }}" + STOP
        + "{% else %}{{ ' ' + message['content'] + '<|end_of_turn|>' }}{% endif %}",
    ),
}  # fmt: skip


def marked_text(name):
    """A template with marks. Qwen3 writes the end of every answer in one place; it moves to where the last one is written."""
    plain, marked = MARKED[name]
    assert PUBLIC[name].text.count(plain) == 1
    text = PUBLIC[name].text.replace(plain, marked)
    if name == "qwen3":
        end = "        {{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}"
        assert text.count(end) == 1
        text = text.replace(
            end, end.replace("{{- '<|im_end|>\\n' }}", "{{- ('\\n' if loop.last else '<|im_end|>\\n') }}")
        )
    return text


def check_marks(name, talks):
    public, talks = PUBLIC[name], with_system(talks, PUBLIC[name])
    marked = theirs_of(public, marked_text(name))
    for talk, (ids, targets) in zip(talks, encoded(ours(name), talks), strict=True):
        found = marked.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True)
        assert found["input_ids"] == ids
        assert learned(targets) == np.flatnonzero(found["assistant_masks"]).tolist()


@pytest.mark.parametrize("name", MARKED)
def test_our_mask_is_that_of_transformers_generation_marks(name):
    check_marks(name, embedded(24))


@pytest.mark.parametrize("name", MARKED)
def test_our_mask_of_real_dialogues_is_that_of_transformers_generation_marks(name, shared_data):
    check_marks(name, real(shared_data, 40))


@pytest.mark.parametrize("name", MARKED)
def test_marks_of_a_templates_own_change_nothing(name):
    talks = with_system(embedded(6), PUBLIC[name])
    both = (encoded(tokenizer, talks) for tokenizer in (ours(name), ours_of(PUBLIC[name], marked_text(name))))
    for mine, theirs in zip(*both, strict=True):
        assert mine[0] == theirs[0]
        assert np.array_equal(mine[1], theirs[1])
