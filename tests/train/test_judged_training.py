"""Runs that judge themselves: rewards at every estimate, the checkpoint chosen by them, patience, and what is kept."""

import json

import pytest
import torch

import tunesmith as ts
from tiny_runs import comparable, last_digest, tiny_config
from tunesmith.commands.training import train_reward_model
from tunesmith.data.prompts import load_prompts
from tunesmith.errors import UsageError, UserError
from tunesmith.files.answers import ScoredAnswer, read_answers, rewards
from tunesmith.files.run import step_name
from tunesmith.judge import answering
from tunesmith.judge.answering import answer_prompts
from tunesmith.judge.measures import measures
from tunesmith.judge.scorers import load_scorer
from tunesmith.options.training import DPOConfig, RewardConfig
from tunesmith.train.choice import choose_checkpoint, read_rewards


@pytest.fixture(scope="module")
def reward_model(tiny_directory, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "reward"
    return str(train_reward_model(tiny_config(tiny_directory, out, RewardConfig, train__steps=4)).path)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Six prompts in two groups."""
    path = tmp_path_factory.mktemp("prompts") / "six.jsonl"
    rows = [{"prompt": f"{p.text}", "group": "ab"[i % 2]} for i, p in enumerate(load_prompts(limit=6))]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def judged(model, out, reward_model, prompts, **more):
    options = {"eval__reward": reward_model, "eval__prompts": str(prompts), "eval__max_new_tokens": 8, "eval__every": 2}
    return tiny_config(model, out, **{"checkpoint__every": 2, **options, **more})


@pytest.fixture(scope="module")
def run(tiny_directory, reward_model, prompts, tmp_path_factory):
    return ts.sft(
        judged(tiny_directory, tmp_path_factory.mktemp("runs") / "judged", reward_model, prompts, eval__samples=2)
    )


def test_every_estimate_has_a_reward_with_interval_groups_and_measures(run, reward_model):
    events = run.metrics("reward")
    assert [e["step"] for e in events] == [0, 2, 4, 6]
    for event in events:
        assert event["low"] <= event["mean"] <= event["high"]
        assert (event["n"], event["samples"], event["scorer"]) == (6, 2, reward_model)
        assert {g: v["n"] for g, v in event["groups"].items()} == {"a": 3, "b": 3}
        assert measures([ScoredAnswer("", "", "", "stop", 1)]).keys() < event.keys()


def test_the_answers_and_their_scores_are_kept_and_give_the_logged_mean(run, reward_model, prompts):
    scorer = load_scorer(reward_model, device="cpu")
    for event in run.metrics("reward"):
        answers = read_answers(run.path / "answers" / f"{step_name(event['step'])}.jsonl")
        assert [a.prompt for a in answers] == [p.text for p in load_prompts(str(prompts)) for _ in range(2)]
        again = scorer.score([a.prompt for a in answers], [a.answer for a in answers])
        assert [a.reward for a in answers] == pytest.approx(again, abs=1e-5)
        assert event["mean"] == pytest.approx(sum(again) / len(again), abs=1e-5)


def test_a_logged_answer_is_what_the_checkpoint_answers(run, prompts):
    step, directory = run.checkpoints()[-1]
    model, tokenizer = ts.load(str(directory), device="cpu")
    asked = [[{"role": "user", "content": p.text}] for p in load_prompts(str(prompts))]
    found = ts.generate(model, tokenizer, asked, max_new_tokens=8)
    kept = read_answers(run.path / "answers" / f"{step_name(step)}.jsonl")
    assert found == [a.answer for a in kept[::2]]


def test_judging_does_not_change_the_training(run, tiny_directory, tmp_path):
    plain = ts.sft(tiny_config(tiny_directory, tmp_path / "plain", eval__every=2, checkpoint__every=2))
    without_rewards = [line for line in comparable(run) if line["event"] != "reward"]
    assert without_rewards == comparable(plain)
    assert last_digest(run) == last_digest(plain)


def test_the_best_checkpoint_is_the_chosen_one_and_is_there(run):
    choice = run.status["choice"]
    assert choice["by"] == "reward"
    assert choice["best_step"] == run.status["best_step"]
    assert run.best_checkpoint() == run.checkpoint(choice["best_step"])
    found = choose_checkpoint(run, [step for step, _ in run.checkpoints()])
    assert found.as_dict() == choice
    assert set(read_rewards(run)) == {0, 2, 4, 6}


def test_a_run_is_judged_again_where_it_goes_on(run, tiny_directory, reward_model, prompts, tmp_path):
    short = judged(tiny_directory, tmp_path / "r", reward_model, prompts, eval__samples=2, train__steps=2)
    ts.sft(short)
    again = ts.sft(judged(tiny_directory, tmp_path / "r", reward_model, prompts, eval__samples=2, resume=True))
    assert comparable(again) == comparable(run)
    assert again.status == run.status


def test_a_policy_is_judged_while_it_learns_preferences(run, reward_model, prompts, tmp_path):
    options = judged(
        str(run.path), tmp_path / "dpo", reward_model, prompts, kind=DPOConfig, train__steps=2, lora__rank=2
    )
    found = ts.dpo(options)
    assert [e["step"] for e in found.metrics("reward")] == [0, 2]
    assert rewards(read_answers(found.path / "answers" / "step-00000000.jsonl"))
    base, step0 = run.path / "answers", found.path / "answers" / "step-00000000.jsonl"
    same = [a.answer for a in read_answers(base / f"{step_name(run.status['best_step'])}.jsonl")[::2]]
    assert [a.answer for a in read_answers(step0)] == same, "fresh adapters answer as the base does"


def test_without_rewards_the_choice_is_by_the_losses_that_were_kept(tiny_directory, tmp_path):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "plain", eval__every=2, eval__iters=50))
    assert run.status["choice"]["by"] == "validation_loss"
    for event in run.metrics("eval"):
        parts = run.losses(event["step"])
        assert sum(s for s, _ in parts) / sum(n for _, n in parts) == pytest.approx(event["validation_loss"])
    (run.path / "losses" / "step-00000002.json").write_text("[[1, ")
    assert run.losses(2) == []
    assert choose_checkpoint(run, [6]).best_step == 6


def test_patience_ends_a_run_whose_validation_loss_rises_and_the_alarm_names_the_step(tiny_directory, tmp_path, capsys):
    """A large rate on twelve dialogues learns them by heart."""
    options = {"data__max_rows": 12, "train__steps": 200, "eval__every": 10, "eval__iters": 50, "optimizer__lr": 2e-2}
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "p", eval__patience=3, train__diverge_after=0, **options))
    status, estimates = run.status, run.metrics("eval")
    lowest = min(estimates, key=lambda e: e["validation_loss"])["step"]
    assert status["state"] == "finished"
    assert status["step"] == lowest + 30 < 200
    assert status["reason"] == f"the validation loss has not fallen for 3 estimates, since step {lowest}"
    assert run.checkpoints()[-1][0] == status["step"]
    assert status["choice"]["overfitting_since"] == lowest == status["best_step"]
    told = capsys.readouterr().out
    assert f"overfitting since step {lowest}: validation loss rose from" in " ".join(told.split())


def test_answers_of_a_compiled_model_compile_nothing(tiny_directory, reward_model, prompts, tmp_path, monkeypatch):
    graphs = torch._dynamo.utils.counters["stats"]
    seen = []

    def counted(*args, **kwargs):
        before = graphs["unique_graphs"]
        answers = answer_prompts(*args, **kwargs)
        seen.append((before, graphs["unique_graphs"]))
        return answers

    monkeypatch.setattr(answering, "answer_prompts", counted)
    torch._dynamo.reset()
    options = {"train__compile": True, "train__steps": 2, "data__max_rows": 12, "eval__iters": 1}
    ts.sft(judged(tiny_directory, tmp_path / "c", reward_model, prompts, **options))
    assert [after - before for before, after in seen] == [0, 0]
    assert seen[-1][0] > 0, "nothing was compiled at all"


def test_options_that_mean_nothing_together(tiny_directory, reward_model, tmp_path):
    with pytest.raises(
        UsageError, match=r"--eval\.prompts, --eval\.samples and --eval\.max_new_tokens are for --eval\.reward"
    ):
        ts.sft(tiny_config(tiny_directory, tmp_path / "a", eval__samples=3))
    with pytest.raises(UsageError, match=r"--eval\.reward has no effect on a reward model"):
        train_reward_model(tiny_config(tiny_directory, tmp_path / "b", RewardConfig, eval__reward=reward_model))
    with pytest.raises(UsageError, match=r"--eval\.patience is 0, expected at least 1"):
        ts.sft(tiny_config(tiny_directory, tmp_path / "c", eval__patience=0))
    with pytest.raises(UserError, match=r"--eval\.prompts .*no such file"):
        ts.sft(tiny_config(tiny_directory, tmp_path / "d", eval__reward=reward_model, eval__prompts="nowhere.txt"))
    with pytest.raises(UserError, match=r"--eval\.reward \./nowhere: .*there is no such directory"):
        ts.sft(tiny_config(tiny_directory, tmp_path / "f", eval__reward="./nowhere"))
    with pytest.raises(UserError, match="is a language model, not a reward model"):
        ts.sft(tiny_config(tiny_directory, tmp_path / "e", eval__reward=str(tiny_directory)))
