"""How likely a reader finds answers: against transformers on the two plain texts, and what has no figure."""

import dataclasses

import pytest
import torch
import transformers

from tunesmith.data.chosen_template import chat_template
from tunesmith.files.answers import ScoredAnswer
from tunesmith.judge.fluency import OTHER_PROMPT, Reader

QUESTIONS = [f"Question {'very ' * n}long?" for n in range(9)]
TEXTS = [f"{word} " * (n + 1) for n, word in enumerate(("blue", "no", "it", "tea", "you", "rain", "in", "cat"))] + [""]
GIVEN = [ScoredAnswer(q, "", a, "stop", 9) for q, a in zip(QUESTIONS, TEXTS, strict=True)]


@pytest.fixture(scope="module")
def reader(tiny_directory):
    return Reader(str(tiny_directory), "cpu")


def plain(reader, tiny_directory, prompt, answer):
    """(nats, tokens) of an answer after a prompt, as one text by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_directory).eval()
    ids = [
        reader.tokenizer.encode(text) for text in (f"\n\nHuman: {prompt}\n\nAssistant:", f" {answer}" if answer else "")
    ]
    with torch.no_grad():
        logps = model(torch.tensor([ids[0] + ids[1]])).logits[0].log_softmax(-1)
    return -sum(logps[len(ids[0]) - 1 + n, token].item() for n, token in enumerate(ids[1])), len(ids[1])


def test_figures_are_those_of_transformers_on_plain_texts(reader, tiny_directory):
    own = [plain(reader, tiny_directory, a.prompt, a.answer.strip()) for a in GIVEN]
    other = [
        plain(reader, tiny_directory, QUESTIONS[(i + OTHER_PROMPT) % len(GIVEN)], a.answer.strip())
        for i, a in enumerate(GIVEN)
    ]
    tokens = sum(n for _, n in own)
    found = reader.fluency(GIVEN)
    assert found["nats_per_token"]["mean"] == pytest.approx(sum(s for s, _ in own) / tokens, abs=1e-5)
    gain = (sum(s for s, _ in other) - sum(s for s, _ in own)) / tokens
    assert found["on_topic_gain"]["mean"] == pytest.approx(gain, abs=1e-5)
    assert abs(gain) > 1e-3, "a gain of nothing would prove nothing"
    for figure in found.values():
        assert figure["low"] < figure["mean"] < figure["high"]
        assert figure["n"] == len(GIVEN)


def test_several_answers_to_a_prompt_are_one_example(reader):
    once, twice = reader.fluency(GIVEN), reader.fluency([a for a in GIVEN for _ in range(2)])
    assert twice["nats_per_token"]["mean"] == pytest.approx(once["nats_per_token"]["mean"])
    assert twice["on_topic_gain"] == pytest.approx(once["on_topic_gain"], abs=1e-5)


def test_the_reader_keeps_its_own_template_whatever_the_models_were_asked_to_use(reader, tiny_directory, tmp_path):
    form = tmp_path / "form.jinja"
    form.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    with chat_template(str(form)):
        again = Reader(str(tiny_directory), "cpu")
    assert again.fluency(GIVEN) == reader.fluency(GIVEN)


def test_without_tokens_or_a_second_prompt_there_is_no_figure(reader):
    empty = [dataclasses.replace(a, answer=" ") for a in GIVEN]
    assert reader.fluency(empty) == {"nats_per_token": None, "on_topic_gain": None}
    alone = reader.fluency(GIVEN[:1])
    assert alone["on_topic_gain"] is None
    assert alone["nats_per_token"]["low"] is None
