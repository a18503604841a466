"""How long a training is: epochs that see each row once, schedules whose last step counts, lengths that were asked for twice."""

import json
import math

import pytest
import yaml

import tunesmith as ts
from tiny_runs import tiny_config, train_losses, write_dialogues
from tunesmith.__main__ import main
from tunesmith.errors import UserError
from tunesmith.options.training import RewardConfig
from tunesmith.study.definition import read_study_file
from tunesmith.study.matrix import make_plan
from tunesmith.train.methods.table import METHODS
from tunesmith.train.resolve import batches_of_step, resolve_length, steps_of

QUICK = {"train__steps": None, "eval__at_start": False, "eval__iters": 1, "eval__every": 100, "train__diverge_after": 0}
TRAIN = {"sft": ts.sft, "reward": ts.train_reward_model}


class Rows:
    """Batches of some size that have so many rows."""

    def __init__(self, rows, batch_size, windows=False):
        self.rows_per_epoch, self.batch_size = rows, batch_size
        self.per_epoch = None if windows else math.ceil(rows / batch_size)


@pytest.mark.parametrize(("rows", "batch_size", "accumulate"), [(9, 4, 1), (9, 2, 2), (9, 64, 1), (8, 2, 2), (1, 1, 3), (17, 3, 4)])  # fmt: skip  # noqa: E501
def test_the_steps_of_an_epoch_take_each_of_its_batches_once(rows, batch_size, accumulate):
    data = Rows(rows, batch_size)
    for epochs in (1, 2, 5):
        steps = steps_of(epochs, data, accumulate)
        numbers = [list(batches_of_step(s, accumulate, data.per_epoch)) for s in range(1, steps + 1)]
        assert [n for several in numbers for n in several] == list(range(epochs * data.per_epoch))
        assert all(1 <= len(several) <= accumulate for several in numbers)
        assert steps == epochs * math.ceil(rows / (batch_size * accumulate))


def test_parts_of_epochs_are_rounded_up_and_windows_never_end():
    assert [steps_of(e, Rows(9, 4), 1) for e in (0.1, 0.5, 1.0, 1.1, 1.5)] == [1, 2, 3, 4, 5]
    assert [steps_of(e, Rows(10, 1), 1) for e in (0.1 + 0.2, 0.31)] == [3, 4]
    windows = Rows(9, 4, windows=True)
    assert [steps_of(e, windows, 1) for e in (1, 2)] == [3, 5]
    assert [list(batches_of_step(s, 2, None)) for s in (1, 7)] == [[0, 1], [12, 13]]


@pytest.mark.filterwarnings("ignore:a step takes 64 rows")
@pytest.mark.parametrize("kind", TRAIN)
def test_nine_rows_in_batches_of_four_are_seen_once_each_and_every_step_is_a_mean_over_its_own(tiny_directory, tmp_path, kind):  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    if kind == "sft":
        write_dialogues(rows, [(f"Question {i}?", f"Answer {i * i}, " * (i + 1)) for i in range(9)])
    else:
        pairs = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}. " * (i + 1), "rejected": "No."} for i in range(9)]
        rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "data").mkdir()
    rows.rename(tmp_path / "data" / "train.jsonl")
    (tmp_path / "data" / "test.jsonl").write_text((tmp_path / "data" / "train.jsonl").read_text())
    options = {**QUICK, "data__name": str(tmp_path / "data"), "data__batching": "padded", "optimizer__lr": 0.0}
    config = RewardConfig if kind == "reward" else ts.SFTConfig
    counted = "pairs" if kind == "reward" else "target_tokens"
    ends, seen = {}, {}
    for size, accumulate in ((4, 1), (2, 2), (64, 1), (9, 1)):
        more = {"train__batch_size": size, "train__accumulate": accumulate, "train__epochs": 2.0}
        run = TRAIN[kind](tiny_config(tiny_directory, tmp_path / f"{size}", config, **options, **more))
        ends[size] = run.status["step"]
        lines = run.metrics("train")
        before = [0, *(line[counted] for line in lines)]
        sums = [line["loss"] * (line[counted] - at) for line, at in zip(lines, before, strict=False)]
        seen[size] = sum(sums) / lines[-1][counted], lines[-1][counted]
    assert ends == {4: 6, 2: 6, 64: 2, 9: 2}
    for mean, count in seen.values():  # at a rate of 0: the mean loss of every row twice, whatever the steps were
        assert (mean, count) == (pytest.approx(seen[9][0], rel=1e-6), seen[9][1])


def test_a_batch_beyond_the_data_is_said_and_the_step_is_an_epoch(tiny_directory, tmp_path):
    few = {**QUICK, "data__max_rows": 9, "train__batch_size": 64, "data__batching": "padded"}
    with pytest.warns(
        UserWarning, match=r"a step takes 64 rows .* every step uses all of them, each once, and is an epoch"
    ):
        run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **few))
    assert len(train_losses(run)) == 1
    few |= {"data__batching": "windows", "train__batch_size": 100, "data__block_size": 32}
    with pytest.warns(UserWarning, match=r"100 rows of 32 tokens, .* every step reads them about [\d.]+ times"):
        ts.sft(tiny_config(tiny_directory, tmp_path / "w", **few))


# The schedule


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_of_one_step_learns_whatever_its_schedule(tiny_directory, tmp_path, schedule):
    options = {**QUICK, "train__steps": 1, "optimizer__schedule": schedule}
    run = ts.sft(tiny_config(tiny_directory, tmp_path / schedule, **options))
    assert [line["lr"] for line in run.metrics("train")] == [1e-3]


def test_a_warm_up_longer_than_the_run_is_refused_and_a_default_one_is_shorter(tiny_directory, tmp_path, capfd):
    with pytest.raises(UserError, match=r"--optimizer.warmup_steps 7 is more than the training's 6 steps"):
        ts.sft(tiny_config(tiny_directory, tmp_path / "r", optimizer__warmup_steps=7))
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", train__steps=1))
    argv = ["sft", "--resume", "--out", str(run.path), "--train.steps", "3", "--optimizer.warmup_steps", "4"]
    assert main([*argv, "--resume_changes", "accept"]) == 2
    assert "--optimizer.warmup_steps 4 is more than the training's 3 steps" in capfd.readouterr().err
    lengths = {"steps": (20, 100, 101, 5000), "warm-up": (2, 10, 100, 100)}
    found = [
        resolve_length(
            tiny_config("m", tmp_path, train__steps=n), Rows(9, 2), Rows(9, 2), warmup=METHODS["pretrain"].warmup
        )
        for n in lengths["steps"]
    ]
    assert tuple(config.optimizer.warmup_steps for config in found) == lengths["warm-up"]
    assert resolve_length(tiny_config("m", tmp_path), Rows(9, 2), Rows(9, 2)).optimizer.warmup_steps == 0


# Steps and epochs


def asked(capsys, *argv):
    """(steps, epochs) that a command line comes to."""
    with pytest.raises(SystemExit):
        main(["dpo", *argv, "--print_config"])
    train = yaml.safe_load(capsys.readouterr().out)["train"]
    return train["steps"], train["epochs"]


def test_steps_given_later_take_the_place_of_a_presets_epochs(tmp_path, capsys):
    steps, epochs, neither = (tmp_path / f"{name}.yaml" for name in ("steps", "epochs", "neither"))
    steps.write_text("train: {steps: 5}\n")
    epochs.write_text("train.epochs: 2\n")
    neither.write_text("train: {seed: 1}\n")
    assert asked(capsys, "--config", "paper/e8") == (None, 1.0)
    assert asked(capsys, "--config", "paper/e8", "--train.steps", "3") == (3, None)
    assert asked(capsys, "--train.steps=3", "--config=paper/e8") == (3, None)
    assert asked(capsys, "--config", "paper/e8", "--config", str(steps), "--config", str(neither)) == (5, None)
    assert asked(capsys, "--config", str(steps), "--config", str(epochs)) == (None, 2.0)
    assert asked(capsys, "--config", str(steps), "--train.epochs", "0.5") == (None, 0.5)
    assert asked(capsys, "--config", str(steps), "--train.steps", "null", "--train.epochs", "0.5") == (None, 0.5)


def test_what_does_not_count_is_said(tmp_path, capsys):
    file = tmp_path / "steps.yaml"
    file.write_text("train: {steps: 5}\n")
    for argv, names in (
        (["--config", "paper/e8", "--train.steps", "3"], ("train.epochs", "train.steps")),
        (["--config", str(file), "--train.epochs", "2"], ("train.steps", "train.epochs")),
        (["--config", str(file), "--train.steps", "3"], ()),
        (
            ["--config", str(file), "--train.epochs", "2", "--resume"],
            (),
        ),  # the run's own length comes from no file of its user's
    ):
        assert main(["dpo", "--model", "nowhere", *argv, "--data.name", "nowhere.jsonl"]) != 0
        notes = [row for row in capsys.readouterr().out.splitlines() if row.startswith("note: train")]
        words = "note: {} of a configuration file does not count, as {} was given after it"
        assert notes == ([words.format(*names)] if names else [])


def test_both_at_once_are_refused(tmp_path, capsys):
    both = tmp_path / "both.yaml"
    both.write_text("train: {steps: 5, epochs: 2}\n")
    for argv in (["--train.steps", "3", "--train.epochs", "2"], ["--config", str(both)]):
        assert main(["sft", "--model.name", "sample", "--data.name", "sample", *argv]) == 2
        assert "not both" in capsys.readouterr().err


def test_so_do_a_studys_settings(tmp_path):
    file = tmp_path / "mine.yaml"
    runs = "{a: {}, b: {set: {train.steps: 7}}, c: {set: {train.epochs: 3}}}"
    file.write_text(
        f"experiments: {{one: {{command: dpo, config: paper/e8, set: {{model.name: sample}}, runs: {runs}}}}}\n"
    )
    found = make_plan(read_study_file(file)).runs.values()
    lengths = [(run.settings.get("train.steps"), run.settings.get("train.epochs")) for run in found]
    assert lengths == [(None, 1.0), (7, None), (None, 3.0)]


def test_a_default_of_no_warm_up_is_the_run_that_0_was(tmp_path):
    """So that the finished runs of a study stay finished."""
    file = tmp_path / "mine.yaml"
    runs = "{a: {}, b: {set: {optimizer.warmup_steps: 0}}}"
    file.write_text(f"experiments: {{one: {{set: {{model.name: sample, train.steps: 3}}, runs: {runs}}}}}\n")
    with pytest.raises(UserError, match='"b-s1" is identical to "a-s1"'):
        make_plan(read_study_file(file))
