"""`tunesmith score`: tables, files and figures from real runs, through the command itself."""

import json
import math
import warnings

import pytest

import tunesmith as ts
from tiny_runs import tiny_config
from tunesmith.__main__ import main
from tunesmith.commands.score import score
from tunesmith.commands.training import train_reward_model
from tunesmith.files.answers import read_answers, rewards
from tunesmith.judge.scorers import load_scorer
from tunesmith.options.commands import ScoreCommand
from tunesmith.options.training import GenerateOptions, RewardConfig

GENERATE = GenerateOptions(max_new_tokens=8)


@pytest.fixture(scope="module")
def reward_model(tiny_directory, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "reward"
    return str(train_reward_model(tiny_config(tiny_directory, out, RewardConfig, train__steps=4)).path)


@pytest.fixture
def run(tiny_directory, tmp_path):
    return ts.sft(tiny_config(tiny_directory, tmp_path / "sft", optimizer__lr=1e-2, checkpoint__every=2, eval__every=2))


def told(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_the_command_scores_models_and_says_what_the_judge_is_worth(
    run, tiny_directory, reward_model, tmp_path, capsys
):
    out = tmp_path / "scores"
    words = ["score", str(tiny_directory), str(run.path), "--reward", reward_model, "--limit", "24", "--out", str(out)]
    assert main([*words, "--generate.max_new_tokens", "8", "--fluency", str(tiny_directory)]) == 0
    text = told(capsys)
    assert "scored by" in text
    assert "trained on sample; right on" in text
    for heading in (
        "mean reward of 24 prompts",
        "nats a token of the answers under",
        "mean reward by group",
        "against",
        "without a judge",
        "where both",
        "worst of",
    ):
        assert heading in text, heading
    found = json.loads((out / "scores.json").read_text())
    assert set(found["models"]) == {str(tiny_directory), str(run.path)}
    assert found["reader"] == str(tiny_directory)
    assert all(m["nats_per_token"]["n"] == m["on_topic_gain"]["n"] == 24 for m in found["models"].values())
    for file in (out / "answers").iterdir():
        answers = read_answers(file)
        assert len(answers) == 24
        mean = sum(rewards(answers).values()) / 24
        assert any(m["reward"]["mean"] == pytest.approx(mean) for m in found["models"].values())
    against = found["against_first"][str(run.path)]
    means = [m["reward"]["mean"] for m in found["models"].values()]
    assert against["difference"]["mean"] == pytest.approx(means[1] - means[0])


def test_a_model_against_itself_wins_half(tiny_directory, reward_model, tmp_path):
    import shutil

    twin = shutil.copytree(tiny_directory, tmp_path / "twin")
    found = score([str(tiny_directory), str(twin)], ScoreCommand(reward=reward_model, generate=GENERATE, shown=0))
    against = found["against_first"][str(twin)]
    assert (against["wins"]["ties"], against["difference"]["mean"]) == (40, 0)
    assert against["win_rate"]["low"] < 0.5 < against["win_rate"]["high"]


def test_several_answers_a_prompt_give_best_of_n(tiny_directory, reward_model, tmp_path, capsys):
    options = ScoreCommand(reward=reward_model, samples=3, limit=5, generate=GENERATE, out=str(tmp_path / "s"))
    found = score([str(tiny_directory)], options)["models"][str(tiny_directory)]
    (file,) = (tmp_path / "s" / "answers").iterdir()
    answers = read_answers(file)
    assert len(answers) == 15
    assert len({a.answer for a in answers[:3]}) > 1
    best = [max(a.reward for a in answers[i : i + 3]) for i in range(0, 15, 3)]
    assert found["best_of_n"]["mean"] == pytest.approx(sum(best) / 5)
    assert found["best_of_n"]["mean"] > found["reward"]["mean"]
    assert found["reward"]["n"] == 5
    assert f"best of 3 (KL at most {math.log(3) - 2 / 3:.2f} nats)" in told(capsys)


def test_all_checkpoints_of_a_run_and_the_choice_among_them(run, reward_model, capsys):
    found = score([f"{run.path}@all"], ScoreCommand(reward=reward_model, limit=6, generate=GENERATE, shown=0))
    steps = [step for step, _ in run.checkpoints()]
    assert list(found["models"]) == [f"{run.path}@{step}" for step in steps]
    assert "best checkpoint: step" in told(capsys)
    kept = sorted(p.name for p in (run.path / "answers").iterdir())
    assert kept == [f"step-{step:08d}.jsonl" for step in steps]


def test_answers_are_scored_by_the_named_model(run, reward_model):
    score([str(run.path)], ScoreCommand(reward=reward_model, limit=4, generate=GENERATE, shown=0))
    (file,) = (run.path / "answers").iterdir()
    answers = read_answers(file)
    again = load_scorer(reward_model, device="cpu").score([a.prompt for a in answers], [a.answer for a in answers])
    assert list(rewards(answers).values()) == pytest.approx(again, abs=1e-5)


def test_prompts_that_repeat_are_told_and_count_once(tiny_directory, reward_model, tmp_path):
    five = ["What is love?", "How do I cook rice?", "Tell me a story", "Where is Paris?", "Who are you?"]
    found = []
    for times in (1, 10):
        file = tmp_path / f"{times}.txt"
        file.write_text("\n".join(five * times))
        options = ScoreCommand(reward=reward_model, prompts=str(file), generate=GENERATE, shown=1)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            found.append(score([str(tiny_directory)], options)["models"])
        assert any("45 of 50 prompts repeat" in str(n.message) for n in notes) == (times == 10)
    assert found[0] == found[1]


def test_the_answers_of_a_run_that_judged_itself_stay_as_they_are(tiny_directory, reward_model, tmp_path):
    options = {"eval__reward": reward_model, "eval__max_new_tokens": 4, "train__steps": 1}
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "judged", **options))
    before = {p.name: p.read_bytes() for p in (run.path / "answers").iterdir()}
    score([f"{run.path}@all"], ScoreCommand(reward=reward_model, limit=3, generate=GENERATE, shown=0))
    assert {p.name: p.read_bytes() for p in (run.path / "answers").iterdir()} == before
    score(
        [str(run.path)], ScoreCommand(reward=reward_model, limit=3, generate=GENERATE, shown=0, out=str(tmp_path / "o"))
    )
    (file,) = (tmp_path / "o" / "answers").iterdir()
    assert len(read_answers(file)) == 3


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--samples", "0"], 2, "--samples is 0, expected at least 1"),
        (["--limit", "0"], 2, "--limit is 0, expected at least 1"),
        (["--prompts", "nowhere.txt"], 1, "--prompts nowhere.txt: no such file"),
        (["--reward", "./nowhere"], 1, "there is no such directory"),
        (["--rewards", "x"], 2, "Did you mean --reward?"),
    ],
)
def test_mistakes_are_told_in_one_line(tiny_directory, reward_model, capsys, words, code, message):
    given = ["score", str(tiny_directory), "--reward", reward_model, *words]
    assert main(given) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_judge_that_cannot_be_reached_is_named_with_the_way_out(tiny_directory, capsys):
    assert main(["score", str(tiny_directory)]) == 1
    error = capsys.readouterr().err
    assert "OpenAssistant/reward-model-deberta-v3-large-v2" in error
    assert error.startswith("tunesmith: --reward OpenAssistant/")
    assert "a local directory" in error


def test_checkpoints_of_a_directory_without_any(tmp_path, reward_model, capsys):
    (tmp_path / "status.json").write_text('{"state": "failed", "step": 0}')
    assert main(["score", f"{tmp_path}@all", "--reward", reward_model]) == 1
    assert "has no checkpoint" in capsys.readouterr().err
