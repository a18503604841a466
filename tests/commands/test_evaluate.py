"""`tunesmith evaluate`: every figure against plain loops, one dialogue at a time, over the text and not the packing."""

import json
import math
from pathlib import Path

import pytest
import torch

import tunesmith as ts
from tiny_runs import tiny_config
from tunesmith.__main__ import main
from tunesmith.commands.training import train_reward_model
from tunesmith.data.dialogue import Message
from tunesmith.data.hh_template import HH
from tunesmith.data.prompts import encode_answered
from tunesmith.files.names import load_reward
from tunesmith.judge.scorers import load_scorer
from tunesmith.options.training import DPOConfig, RewardConfig
from tunesmith.stats import wilson_interval

TALK = [
    [("user", "Hi"), ("assistant", "Hello."), ("user", "Why is the sky blue?"), ("assistant", "Air scatters blue light more.")],
    [("user", "Name a colour"), ("assistant", "Green " * 30)],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f"), ("user", "g"),
     ("assistant", "h"), ("user", "i"), ("assistant", "j")],
]  # fmt: skip
PAIRS = [
    ("Hi", "Hello.", "Go away, please."),
    ("Why?", "Because it is so.", "No."),
    ("What now?", "Tea.", "Tea!"),
    ("Who?", "Me", "You and I"),
]


@pytest.fixture
def talk(tmp_path):
    path = tmp_path / "talk.jsonl"
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns]} for turns in TALK]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in PAIRS))
    return str(path)


def figures(argv, tmp_path):
    out = tmp_path / "found.json"
    assert main(["evaluate", *argv, "--out", str(out)]) == 0
    return json.loads(out.read_text())


@torch.no_grad()
def plain_answer(model, tokenizer, before, answer):
    """-log p of an answer and its end after the turns before it, by one full forward of this text alone."""
    prompt, said = encode_answered(tokenizer, [Message(*m) for m in before], answer)
    logps = model.lm_head(model(torch.tensor([prompt + said])))[0].double().log_softmax(1)
    targets = [*said, tokenizer.end_of_text]
    return -sum(logps[len(prompt) - 1 + i, t].item() for i, t in enumerate(targets)), len(targets)


def all_answers(model, tokenizer):
    for row, turns in enumerate(TALK):
        for i in range(1, len(turns), 2):
            yield row, (i + 1) // 2, *plain_answer(model, tokenizer, turns[:i], turns[i][1])


def test_losses_in_all_by_turn_and_by_length_are_those_of_a_plain_loop(tiny_directory, talk, tmp_path, capsys):
    model, tokenizer = ts.load(str(tiny_directory), device="cpu")
    found = figures([str(tiny_directory), talk], tmp_path)
    answers = list(all_answers(model, tokenizer))

    def loss(chosen):
        return sum(nats for *_, nats, _ in chosen) / sum(n for *_, n in chosen)

    assert found["response"]["loss"] == pytest.approx(loss(answers), rel=1e-5)
    assert found["response"]["perplexity"] == pytest.approx(math.exp(loss(answers)), rel=1e-4)
    assert (found["response"]["answers"], found["response"]["tokens"]) == (8, sum(n for *_, n in answers))
    assert found["response"]["low"] < found["response"]["loss"] < found["response"]["high"]
    turns = {"1": [1], "2": [2], "3": [3], "4 or more": [4, 5]}
    assert set(found["by_turn"]) == set(turns)
    for name, wanted in turns.items():
        assert found["by_turn"][name]["loss"] == pytest.approx(
            loss([a for a in answers if a[1] in wanted]), rel=1e-5
        ), name
    short = [a for a in answers if a[3] <= 16]
    assert 0 < len(short) < len(answers)
    assert found["by_length"]["1-16"]["loss"] == pytest.approx(loss(short), rel=1e-5)
    assert sum(v["answers"] for v in found["by_length"].values()) == 8
    whole = [tokenizer.encode(HH.text([Message(*m) for m in turns])) for turns in TALK]
    assert found["all"]["tokens"] == pytest.approx(sum(map(len, whole)), abs=10)  # pieces are encoded one by one
    read = sum(len(HH.text([Message(*m) for m in turns]).encode()) for turns in TALK)
    first = sum(len(tokenizer.decode([ids[0]]).encode()) for ids in whole)
    bits = found["all"]["loss"] * found["all"]["tokens"] / math.log(2) / (read - first)
    assert found["all"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    told = " ".join(capsys.readouterr().out.split())
    for heading in ("response", "turn 2", "1-16 tokens", "all", "interval)"):
        assert heading in told


def test_turns_keep_their_number_where_the_beginning_is_cut(tiny_directory, talk, tmp_path):
    found = figures([str(tiny_directory), talk, "--data.block_size", "24"], tmp_path)
    assert found["by_turn"]["4 or more"]["answers"] == 2
    assert found["by_turn"].get("1", {"answers": 0})["answers"] < 3


def test_a_policy_prefers_what_a_plain_loop_says_with_and_without_a_reference(tiny_directory, pairs, tmp_path):
    tuned = ts.sft(tiny_config(tiny_directory, tmp_path / "sft", optimizer__lr=1e-2)).best_checkpoint()
    (policy, tokenizer), (base, _) = ts.load(str(tuned), device="cpu"), ts.load(str(tiny_directory), device="cpu")

    def logps(model):
        return [[-plain_answer(model, tokenizer, [("user", p)], x)[0] for x in (c, r)] for p, c, r in PAIRS]

    alone, ratio = torch.tensor(logps(policy)), torch.tensor(logps(policy)) - torch.tensor(logps(base))
    for argv, values, by in (
        ([], alone, "log-probability"),
        (["--reference", str(tiny_directory)], ratio, "log-ratio to"),
    ):
        found = figures([str(tuned), pairs, *argv], tmp_path)["preference"]
        assert found["by"].startswith(by)
        assert found["accuracy"]["mean"] == (values[:, 0] > values[:, 1]).float().mean().item()
        assert found["accuracy"]["low"] < found["accuracy"]["mean"] < found["accuracy"]["high"] or found["accuracy"][
            "mean"
        ] in (0, 1)
        assert found["margin"]["mean"] == pytest.approx((values[:, 0] - values[:, 1]).mean().item(), rel=1e-4)
        assert found["pairs"] == 4


def test_a_dpo_run_is_held_against_what_it_started_from(tiny_directory, pairs, tmp_path):
    run = ts.dpo(tiny_config(tiny_directory, tmp_path / "dpo", DPOConfig, train__steps=2))
    found = figures([str(run.path), pairs], tmp_path)["preference"]
    assert found["by"] == f"log-ratio to {tiny_directory}"
    asked = figures([str(run.path), pairs, "--reference", str(tiny_directory)], tmp_path)["preference"]
    assert found == asked
    zero = figures([f"{run.path}@0", pairs], tmp_path)["preference"]
    assert zero["margin"]["mean"] == pytest.approx(0, abs=1e-5)


def test_a_reward_model_is_measured_by_its_scores_beside_the_rule_that_longer_is_better(
    tiny_directory, pairs, tmp_path, capsys
):
    run = train_reward_model(tiny_config(tiny_directory, tmp_path / "reward", RewardConfig, train__steps=4))
    found = figures([str(run.path), pairs], tmp_path)
    assert set(found) == {"model", "dataset", "split", "preference"}
    scorer, (_, tokenizer) = load_scorer(str(run.path), device="cpu"), load_reward(str(run.path), device="cpu")
    sides = [scorer.score([p for p, *_ in PAIRS], [row[side] for row in PAIRS]) for side in (1, 2)]
    right = [c > r for c, r in zip(*sides, strict=True)]
    assert found["preference"]["accuracy"]["mean"] == sum(right) / 4
    assert found["preference"]["margin"]["mean"] == pytest.approx(
        sum(c - r for c, r in zip(*sides, strict=True)) / 4, abs=1e-5
    )
    lengths = [[len(tokenizer.encode(f" {x}")) for x in row[1:]] for row in PAIRS]
    longer = sum(0.5 if c == r else float(c > r) for c, r in lengths) / 4
    assert found["preference"]["longer_chosen"]["mean"] == longer
    like = [x for x, (c, r) in zip(right, lengths, strict=True) if min(c, r) >= 0.8 * max(c, r)]
    assert found["preference"]["accuracy_at_like_length"]["n"] == len(like)
    assert 'the rule "longer is better"' in " ".join(capsys.readouterr().out.split())


def test_rows_and_pairs_that_stand_there_often_are_one_unit(tiny_directory, pairs, talk, tmp_path, capsys):
    """Ten copies of a file are no ten times as much evidence: loss and accuracy are the same, and so are their intervals."""
    for name, kind in (("talk", talk), ("pairs", pairs)):
        often = tmp_path / f"often-{name}.jsonl"
        often.write_text(Path(kind).read_text() * 10)
        once, ten = (figures([str(tiny_directory), str(file)], tmp_path) for file in (kind, often))
        for part in ("response", "all"):
            assert [ten[part][k] for k in ("loss", "low", "high")] == pytest.approx(
                [once[part][k] for k in ("loss", "low", "high")], rel=1e-5
            )
            assert ten[part]["answers"] == 10 * once[part]["answers"]
    for key in ("accuracy", "longer_chosen", "margin"):
        assert ten["preference"][key] == pytest.approx(once["preference"][key], rel=1e-4, abs=1e-6)
    assert "36 of the 40 pairs repeat another one" in " ".join(capsys.readouterr().out.split())


def test_pairs_of_one_prompt_are_one_unit_of_the_intervals(tiny_directory, tmp_path, capsys):
    """Ten pairs of each of four prompts say hardly more than one of each: 40 pairs, but intervals as wide as of few."""
    answers = [(f" yes {i}", f" no {i} no") for i in range(10)]
    rows = [
        {"chosen": f"\n\nHuman: {q}\n\nAssistant:{good}", "rejected": f"\n\nHuman: {q}\n\nAssistant:{bad}"}
        for q in ("a?", "b c?", "d e f?", "g?")
        for good, bad in answers
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = figures([str(tiny_directory), str(file)], tmp_path)["preference"]
    assert "40 pairs have 4 different prompts" in " ".join(capsys.readouterr().out.split())
    accuracy, longer = found["accuracy"], found["longer_chosen"]
    assert accuracy["n"] == longer["n"] == found["pairs"] == 40
    assert longer["high"] == wilson_interval(0, 4)[1]  # the same in all pairs: four prompts are four examples
    alone = wilson_interval(round(40 * accuracy["mean"]), 40)
    assert accuracy["high"] - accuracy["low"] >= alone[1] - alone[0] - 1e-9


def test_any_classifier_is_measured(deberta, pairs, tmp_path):
    found = figures([str(deberta), pairs], tmp_path)["preference"]
    scorer = load_scorer(str(deberta), device="cpu")
    sides = [scorer.score([p for p, *_ in PAIRS], [row[side] for row in PAIRS]) for side in (1, 2)]
    assert found["accuracy"]["mean"] == sum(c > r for c, r in zip(*sides, strict=True)) / 4
    assert found["longer_chosen"]["mean"] == 2 / 4 or found["longer_chosen"]["n"] == 4


def test_what_does_not_go_together_is_told(tiny_directory, talk, pairs, tmp_path, capsys):
    run = train_reward_model(tiny_config(tiny_directory, tmp_path / "reward", RewardConfig, train__steps=1))
    assert main(["evaluate", str(run.path), talk]) == 1
    assert "gives scores, but" in capsys.readouterr().err
    from tunesmith.data.tokenizer import Tokenizer
    from tunesmith.files.weights import save_model
    from tunesmith.models.gpt2 import GPT, GPTConfig

    other = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=50257, block_size=64))
    other.init_weights(torch.Generator().manual_seed(0))
    save_model(other, Tokenizer.gpt2(), tmp_path / "other")
    assert main(["evaluate", str(tiny_directory), pairs, "--reference", str(tmp_path / "other")]) == 1
    assert "has a different tokenizer from" in capsys.readouterr().err
