"""Scores of answers: our own reward models and DeBERTa against plain loops with transformers, and what cannot be a scorer."""

import json

import pytest
import torch
import transformers

from tiny_judge import ANSWERS, PROMPTS
from tiny_runs import tiny_config
from tunesmith.commands.training import train_reward_model
from tunesmith.errors import Note, UserError
from tunesmith.files.names import load_reward
from tunesmith.judge.scorers import load_scorer
from tunesmith.options.training import RewardConfig


def test_deberta_scores_as_a_plain_loop_of_transformers_does(deberta):
    found = load_scorer(str(deberta), device="cpu").score(PROMPTS, ANSWERS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(deberta)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(deberta).eval()
    with torch.no_grad():
        plain = [
            model(**tokenizer(p, a, return_tensors="pt", truncation=True)).logits[0, 0].item()
            for p, a in zip(PROMPTS, ANSWERS, strict=True)
        ]
    assert found == pytest.approx(plain, abs=1e-5)
    assert len({round(x, 4) for x in plain}) == len(plain), "the scores must differ, or the order proves nothing"


def test_scores_do_not_depend_on_what_else_is_scored(deberta, monkeypatch):
    scorer = load_scorer(str(deberta), device="cpu")
    whole = scorer.score(PROMPTS, ANSWERS)
    monkeypatch.setattr("tunesmith.judge.scorers.PADDED_TOKENS", 1)
    assert scorer.score(PROMPTS, ANSWERS) == pytest.approx(whole, abs=1e-5)
    assert scorer.score([], []) == []


def test_a_chat_template_is_used_where_the_tokenizer_has_one(deberta, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(deberta)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} [SEP] {% endfor %}"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(deberta).eval()
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "chat")
    found = load_scorer(str(tmp_path / "chat"), device="cpu").score(["Hi"], ["Hello"])
    with torch.no_grad():
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            return_tensors="pt", return_dict=True,
        )  # fmt: skip
        assert found == pytest.approx([model(**ids).logits[0, 0].item()], abs=1e-5)


@pytest.fixture(scope="module")
def reward_run(tiny_directory, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "reward"
    return train_reward_model(tiny_config(tiny_directory, out, RewardConfig, data__name="sample", train__steps=4))


def test_our_own_reward_model_scores_as_transformers_reads_its_checkpoint(reward_run):
    found = load_scorer(str(reward_run.path), device="cpu").score(PROMPTS, ANSWERS)
    _, tokenizer = load_reward(str(reward_run.path), device="cpu")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward_run.best_checkpoint()).eval()
    plain = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        ids = [*tokenizer.encode(f"\n\nHuman: {prompt}\n\nAssistant:"), *tokenizer.encode(f" {answer}")]
        with torch.no_grad():
            plain.append(model(input_ids=torch.tensor([ids])).logits[0, 0].item())
    assert found == pytest.approx(plain, abs=1e-5)


def test_conversations_and_texts_longer_than_the_model_can_read(reward_run, monkeypatch):
    scorer = load_scorer(str(reward_run.path), device="cpu")
    turns = [{"role": "user", "content": "Hi"}]
    assert scorer.score([turns], ["Hello"]) == pytest.approx(scorer.score(["Hi"], ["Hello"]), abs=1e-6)
    long = "The sky is blue. " * 200
    whole = scorer.score([long, "Hi"], ["Yes", "Hello"])
    assert whole == pytest.approx([scorer.score([long], ["Yes"])[0], scorer.score(["Hi"], ["Hello"])[0]], abs=1e-5)
    assert abs(scorer.score([long], ["No!"])[0] - whole[0]) > 1e-4, "the beginning is lost, not the answer"
    monkeypatch.setattr("tunesmith.judge.scorers.PACKED_TOKENS", 1)
    assert scorer.score([long, "Hi"], ["Yes", "Hello"]) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("kind", ["own", "deberta"])
def test_what_is_too_long_for_a_scorer_loses_whole_turns_first_and_a_note_says_so(kind, reward_run, deberta):
    """By the rule of `generation.context`: not the answer, not the question, and of these two the beginning and the end."""
    scorer = load_scorer(str(reward_run.path if kind == "own" else deberta), device="cpu")
    question, talk = {"role": "user", "content": "What is love?"}, [{"role": "user", "content": "Hi. " * 300}]
    talk += [{"role": "assistant", "content": "Tell me more. " * 2}, question]
    with pytest.warns(Note, match="of 1 texts are left out: the first turns of 1 conversations$"):
        found = scorer.score([talk], ["The sky."])
    assert found == pytest.approx(scorer.score(["What is love?"], ["The sky."]), abs=1e-5)
    with pytest.warns(Note, match="left out: the beginning of 1 questions$"):
        long = scorer.score(["Hi. " * 300 + "What is love?"], ["The sky."])
    assert long != pytest.approx(found, abs=1e-5)
    with pytest.warns(Note, match="left out: the end of 2 answers$"):
        one, two = scorer.score(["What is love?", "Hi"], ["The sky. " * 300] * 2)
    assert one != pytest.approx(two, abs=1e-5), "the question is read too"


def test_a_scorer_says_what_it_was_trained_for_and_how_often_it_is_right(reward_run):
    words = load_scorer(str(reward_run.path), device="cpu").description
    best = reward_run.status["best_step"]
    accuracy = next(e for e in reward_run.metrics("eval") if e["step"] == best)["validation_accuracy"]
    pairs = reward_run.metrics("pairs")[0]
    assert "trained on sample" in words
    assert f"right on {100 * accuracy:.0f} % (" in words
    assert f"of {pairs['validation_pairs']} held-out pairs" in words
    assert f"right on {100 * pairs['validation_longer_chosen']:.0f} %" in words


def test_language_models_and_classifiers_with_several_outputs_are_refused(tiny_directory, deberta, tmp_path):
    with pytest.raises(UserError, match="is a language model, not a reward model"):
        load_scorer(str(tiny_directory), device="cpu")
    config = transformers.AutoConfig.from_pretrained(deberta)
    config.num_labels = 3
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(tmp_path / "three")
    transformers.AutoTokenizer.from_pretrained(deberta).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="gives 3 numbers per text"):
        load_scorer(str(tmp_path / "three"), device="cpu")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(UserError, match=r"names BertModel, expected a \.\.\.ForSequenceClassification"):
        load_scorer(str(tmp_path / "bert"), device="cpu")


def test_without_transformers_the_way_out_is_told(deberta, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tunesmith\[judge\]'"):
        load_scorer(str(deberta), device="cpu")
