"""What transformers makes of our checkpoints: the same prompt tokens, and answers that stop where ours stop."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith as ts
from tiny_runs import tiny_config
from tunesmith.data.datasets import open_dataset
from tunesmith.data.dialogue import ROLE_NAMES, Message, Preference
from tunesmith.data.hh_template import HH
from tunesmith.data.prompts import encode_prompt
from tunesmith.data.readers import Report
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.names import SAMPLE
from tunesmith.generation.engine import generate_answers
from tunesmith.generation.sampling import Sampling
from tunesmith.options.training import DataOptions, RewardConfig

QUICK = {"train__steps": 1, "eval__iters": 1, "data__max_rows": 20, "data__block_size": 64}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What stands beside the weights in a checkpoint."""
    path = tmp_path_factory.mktemp("written")
    Tokenizer.load(SAMPLE).save(path, 1024)
    return path


@pytest.fixture(scope="module")
def theirs(written):
    return AutoTokenizer.from_pretrained(written)


def as_messages(turns):
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def their_prompt(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def dialogues(options):
    source = open_dataset(options)
    for split in ("train", "test"):
        for located in source.rows(split, Report(), pairs=False):
            row = located.value.chosen if isinstance(located.value, Preference) else located.value
            yield row.messages


def borders_are_plain(messages):
    """Whether no answer ends in white space, which a tokenizer of the whole text joins with the marker after it."""
    return all(not m.content or not m.content[-1].isspace() for m in messages if m.role == "assistant")


def check_dialogues(source, tokenizer, theirs, least):
    seen = 0
    for messages in itertools.islice(source, 500):
        last = max(i for i, m in enumerate(messages) if m.role == "assistant")
        prompt = [
            Message(m.role, m.content) for m in messages[:last]
        ]  # `lead` is no part of a message in the ecosystem
        if not borders_are_plain(prompt):
            continue
        seen += 1
        asked = as_messages(prompt)
        assert asked
        assert their_prompt(theirs, asked) == encode_prompt(tokenizer, asked) == encode_prompt(tokenizer, prompt)
        assert theirs.apply_chat_template(asked, tokenize=False) == HH.text(prompt)
    assert seen >= least


def test_transformers_renders_the_prompts_of_500_dialogues_token_for_token(theirs):
    check_dialogues(dialogues(DataOptions(name="sample")), Tokenizer.load(SAMPLE), theirs, 500)


def test_transformers_renders_the_prompts_of_500_real_dialogues_token_for_token(shared_data, tmp_path):
    tokenizer = Tokenizer.gpt2()
    tokenizer.save(tmp_path, 1024)
    options = DataOptions(name="hh", root=str(shared_data / "hh-rlhf"), allow_missing=True)
    check_dialogues(dialogues(options), tokenizer, AutoTokenizer.from_pretrained(tmp_path), 500)


@pytest.mark.parametrize(
    "turns",
    [
        [("system", "Be brief."), ("user", "hi")],
        [("user", "a"), ("assistant", "b"), ("user", "c")],
        [("user", ""), ("assistant", "x"), ("user", "\n two\n\nlines ")],
        [("system", "s"), ("user", "u"), ("system", "t")],
        [("User", "upper"), ("gpt", "b"), ("human", "\U0001f600")],
    ],
    ids=str,
)
def test_any_turns_are_rendered_alike(theirs, turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    assert their_prompt(theirs, messages) == encode_prompt(Tokenizer.load(SAMPLE), messages)
    ours = [Message(ROLE_NAMES[role.lower()], content) for role, content in turns]
    assert theirs.apply_chat_template(messages, tokenize=False) == HH.text(ours)


def test_a_role_that_is_none_is_refused_there_too(theirs):
    with pytest.raises(Exception, match="unknown role narrator"):
        their_prompt(theirs, [{"role": "narrator", "content": "x"}])


def test_every_kind_of_checkpoint_carries_both(tiny_directory, tmp_path):
    runs = [
        ts.sft(tiny_config(tiny_directory, tmp_path / "sft", **QUICK)),
        ts.sft(tiny_config(tiny_directory, tmp_path / "lora", **QUICK, lora__rank=2)),
        ts.train_reward_model(tiny_config(tiny_directory, tmp_path / "reward", RewardConfig, **QUICK)),
    ]
    for run in runs:
        for _, checkpoint in run.checkpoints():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
            asked = [{"role": "user", "content": "What is fog?"}]
            assert their_prompt(tokenizer, asked) == encode_prompt(ts.load(str(tiny_directory), device="cpu")[1], asked)
            settings = json.loads((checkpoint / "generation_config.json").read_text())
            assert "stop_strings" not in settings  # with them `generate` without `tokenizer=` raises
            assert settings["eos_token_id"] == settings["pad_token_id"] == tokenizer.eos_token_id


def test_transformers_gives_our_answers_and_stops_where_we_stop(tmp_path):
    """At the end of text and before a role marker, to the token; greedy, on the embedded model, which knows both ends."""
    from tunesmith.files.weights import save_model

    model, tokenizer = ts.load("sample", device="cpu")
    save_model(model, tokenizer, tmp_path)
    theirs, other = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    stops = {"stop_strings": list(HH.stop_texts), "tokenizer": other}
    talks = [
        list(m[: max(i for i, t in enumerate(m) if t.role == "assistant")])
        for m in itertools.islice(dialogues(DataOptions(name="sample")), 8)
    ]
    reasons = set()
    for talk in talks:
        (ours,) = generate_answers(model, tokenizer, [talk], Sampling(0, 1, 0, 1), 60)
        prompt = torch.tensor([their_prompt(other, as_messages(talk))])
        said = theirs.generate(prompt, max_new_tokens=60, do_sample=False, **stops)[0, prompt.shape[1] :]
        assert len(said) == ours.tokens
        assert HH.words(tokenizer.decode(said.tolist())) == ours.text
        reasons.add(ours.finish_reason)
    assert "stop" in reasons


def test_generate_and_pipeline_need_no_arguments_of_ours(tmp_path):
    from transformers import pipeline

    from tunesmith.files.weights import save_model

    model, tokenizer = ts.load("sample", device="cpu")
    save_model(model, tokenizer, tmp_path)
    asked = [{"role": "user", "content": "What is fog?"}]
    answered = pipeline("text-generation", model=str(tmp_path), device="cpu")(asked, max_new_tokens=4, do_sample=False)
    (ours,) = generate_answers(model, tokenizer, [asked], Sampling(0, 1, 0, 1), 4)
    assert answered[0]["generated_text"][-1]["content"].strip() == ours.text.strip()


def test_a_role_marker_stops_an_answer_in_transformers_too(tmp_path):
    """A model made to say it: each token of the marker leads to the next."""
    from tunesmith.files.weights import save_model
    from tunesmith.models.gpt2 import GPT, GPTConfig

    tokenizer = Tokenizer.load(SAMPLE)
    says = [*tokenizer.encode(" yes"), *tokenizer.encode("\n\nHuman:"), *tokenizer.encode(" no")]
    model = GPT(
        GPTConfig(n_layer=1, n_head=1, n_embd=64, vocab_size=tokenizer.vocab_size, block_size=64, tied_head=False)
    )
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.ln_f.weight.fill_(1)
        for i, token in enumerate(says):  # by position: the model counts
            model.wpe.weight[len(prompt) - 1 + i, i] = 1
            model.lm_head.weight[token, i] += 1
    save_model(model, tokenizer, tmp_path)
    loaded, _ = ts.load(str(tmp_path), device="cpu")
    (ours,) = generate_answers(loaded, tokenizer, [[{"role": "user", "content": "hi"}]], Sampling(0, 1, 0, 1), 20)
    assert (ours.text, ours.finish_reason, ours.tokens) == ("yes", "stop", len(says) - len(tokenizer.encode(" no")))
    theirs, other = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    stops = {"stop_strings": list(HH.stop_texts), "tokenizer": other}
    said = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, **stops)
    assert said[0, len(prompt) :].tolist() == says[: ours.tokens]
