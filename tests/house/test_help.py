"""Help on one screen, short forms, and output that nobody reads."""

import os
import re
import shlex
import subprocess
import sys

import pytest

import tunesmith
from tunesmith.__main__ import COMMANDS, GROUPS, main
from tunesmith.options import commands as command_options
from tunesmith.options.help import PAGES, all_options, help_text
from tunesmith.options.parse import option_types, parse
from tunesmith.options.plans import plan_options
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.shortforms import Positional
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig
from tunesmith.train.methods.table import METHODS

PLANS = {name: plan_options(method.config) for name, method in METHODS.items()}
OPTIONS = {
    "demo": [command_options.DemoCommand], "data": [command_options.DataCommand], "pretrain": [PretrainConfig], "sft": [SFTConfig],
    "reward": [RewardConfig], "dpo": [DPOConfig], "evaluate": [command_options.EvaluateCommand],
    "score": [command_options.ScoreCommand], "compare": [command_options.CompareCommand], "chat": [command_options.ChatCommand],
    "plan": list(PLANS.values()), "study": [command_options.StudyCommand], "report": [command_options.ReportCommand],
}  # fmt: skip


def shown(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_one_screen_with_an_example_and_says_where_the_rest_is(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown([command, "--help"], capsys)
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert f"tunesmith {command} " in text.partition("example:")[2] or command == "demo"
    assert ("--help all" in text) == (any(len(option_types(o)) > len(PAGES[command].first) for o in OPTIONS[command]))
    assert ("paper/e1" in text) == (command in ("pretrain", "sft", "reward", "dpo", "plan"))
    assert set(re.findall(r"^  --([\w.]+)", text, re.M)) == set(PAGES[command].first)


def test_what_stands_on_the_screen_are_at_most_ten_options_that_exist():
    assert PAGES.keys() == COMMANDS.keys() == OPTIONS.keys()
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)
    for command, page in PAGES.items():
        assert len(set(page.first)) == len(page.first) <= 10
        for options in OPTIONS[command]:
            assert set(page.first) <= set(option_types(options)), command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_lists_every_option_with_its_text(command):
    for options in OPTIONS[command]:
        text = help_text(options, f"tunesmith {command}", (), every=True)
        assert set(re.findall(r"^  --([\w.]+)", text, re.M)) == set(option_types(options))
        assert all(option.text for option in all_options(options))
        assert "type:" not in text


def test_help_all_on_the_command_line_gives_defaults_once(capsys):
    text = shown(["sft", "--help", "all"], capsys)
    assert "--data.holdout X" in text
    assert "--train.precision {auto,fp32,bf16,fp16}" in text
    assert "[gpt2-medium]" in text
    assert shown(["sft", "--help=all"], capsys) == text
    assert shown(["help", "sft"], capsys) == shown(["sft", "-h"], capsys)


def test_a_subclass_of_options_shows_its_own_texts():
    texts = {option.name: option.text for option in all_options(DPOConfig)}
    assert "chosen and rejected" in texts["data.name"]
    assert "publisher's layout" in texts["data.root"]


def test_plans_help_names_all_four_trainings(capsys):
    text = shown(["plan", "--help"], capsys)
    assert all(f"tunesmith plan {training} " in text for training in PLANS)
    assert "--dpo.beta" in shown(["plan", "dpo", "--help", "all"], capsys)


def test_the_examples_of_help_can_be_parsed():
    arguments = {"data": 1, "evaluate": 2, "score": 1, "compare": 2, "chat": 1, "study": 1, "report": 1}
    for command, page in PAGES.items():
        for example in page.examples:
            program, name, *words = shlex.split(example)
            assert (program, name) == ("tunesmith", command)
            options = PLANS[words.pop(0)] if command == "plan" else OPTIONS[command][0]
            wanted = [
                Positional(f"a{i}", "x", many=command in ("score", "report")) for i in range(arguments.get(command, 0))
            ]
            parse(options, words, prog="x", positionals=wanted)


def test_the_top_level_help_groups_the_commands_and_begins_with_first_steps(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 80
    assert text.index("first steps") < text.index("train:")
    assert all(re.search(rf"^  {command} ", text, re.M) for command in COMMANDS)


# ---- short forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", [["--model", "a", "--data", "b"], ["--model=a", "--data=b"], ["--model.name", "a", "--data", "b"]]
)
@pytest.mark.parametrize("options", [SFTConfig, DPOConfig, RewardConfig, PretrainConfig, *PLANS.values()])
def test_model_and_data_are_short_for_their_names(options, argv):
    config, _ = parse(options, argv, prog="x")
    assert (config.model.name, config.data.name) == ("a", "b")


def test_a_short_form_comes_after_a_file_and_before_a_later_one(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("model: {name: c}\n")
    assert parse(SFTConfig, ["--config", str(file), "--model", "a"], prog="x")[0].model.name == "a"
    assert parse(SFTConfig, ["--model", "a", "--config", str(file)], prog="x")[0].model.name == "c"


MODEL, DATA = Positional("model", "a MODEL", option="model"), Positional("dataset", "a data set", option="data")


@pytest.mark.parametrize(
    "argv",
    [
        ["m", "d"], ["--model", "m", "d"], ["d", "--model", "m"], ["m", "--data", "d"], ["--data.name=d", "--model=m"],
        ["--model.name", "m", "--split", "train", "d"], ["m", "d", "--model", "m"], ["m", "--device", "cpu", "d", "--data", "d"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_arguments_can_be_given_as_options(argv):
    _, named = parse(command_options.EvaluateCommand, argv, prog="tunesmith evaluate", positionals=[MODEL, DATA])
    assert named == {"model": "m", "dataset": "d"}


def test_several_models_as_options_are_several_arguments():
    models = [Positional("models", "MODELs", many=True, option="model")]
    _, named = parse(
        command_options.ScoreCommand, ["a", "--model", "b", "--model=c", "--shown", "1"], prog="x", positionals=models
    )
    assert named == {"models": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sft", "--model", "a", "--model.name", "b"], "--model a and --model.name b name two different things; give one of them"),
        (["dpo", "--data.name=b", "--data=a"], "--data a and --data.name b name two different things"),
        (["data", "sample", "--data.name", "hh-static"], "DATASET sample and --data hh-static name two different things"),
        (["evaluate", "a", "b", "--model", "c"], "MODEL a and --model c name two different things"),
        (["evaluate", "a", "--model", "c", "--data", "d"], "unexpected argument 'a' beside --model c and --data d; give each only once"),
        (["chat", "a", "b", "--model", "a"], "unexpected argument 'b' beside --model a"),
        (["sft", "--model", "my.yaml"], "--model my.yaml: a file of options is given with --config my.yaml"),
        (["sft", "--train", "my.yml"], "--train my.yml: a file of options is given with --config my.yml"),
        (["sft", "--train", "60"], "--train is a group of options (--train.accumulate, "),
        (["sft", "sample"], "unexpected argument 'sample': options need names, as in `tunesmith sft --model sample`"),
        (["chat"], "chat needs a MODEL: `tunesmith chat sample` or `tunesmith chat runs/NAME`"),
        (["evaluate"], "evaluate needs a MODEL and a data set: `tunesmith evaluate sample sample`"),
        (["evaluate", "sample"], "evaluate needs a data set: `tunesmith evaluate sample sample`"),
        (["score"], "score needs MODELs (RUN@all is every checkpoint of a run): `tunesmith score runs/SFT"),
        (["data"], "data needs a data set: `tunesmith data sample --show 2`"),
    ],
)  # fmt: skip
def test_two_names_for_one_thing_and_files_for_groups_are_errors_with_the_way_out(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---- nobody reads the output -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"], ["sft", "--help"], ["sft", "--print_config"], ["data", "sample", "--data.max_rows", "20", "--show", "3"],
        ["plan", "--model", "sample", "--device", "t4"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_closed_pipe_ends_a_command_without_a_word(argv):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *argv], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_closed_pipe_for_errors_is_no_traceback_either():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "stf"], stderr=writer, stdout=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stdout) == (141, b"")


@pytest.mark.parametrize("name", ["sft", "dpo", "train_reward_model", "pretrain"])
def test_help_of_a_training_function_says_what_it_raises(name):
    """In Python, `help(ts.sft)` shows this one text."""
    assert "Raises: UserError before the first step" in getattr(tunesmith, name).__doc__
