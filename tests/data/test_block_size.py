"""`data.block_size auto` follows the model; a number of one's own is held against it."""

import dataclasses
import json

import pytest
import yaml

from tiny_runs import comparable, last_digest, tiny_config
from tunesmith.__main__ import main
from tunesmith.commands.training import dpo, sft, train_reward_model
from tunesmith.data.cutting import resolve_block_size
from tunesmith.errors import UserError
from tunesmith.options.parse import parse
from tunesmith.options.training import DataOptions, DPOConfig, RewardConfig, SFTConfig

POSITIONS = 256  # of the tiny model


def test_auto_is_the_models_positions_and_at_most_1024():
    assert [resolve_block_size("auto", positions, "m") for positions in (256, 1024, 4096)] == [256, 1024, 1024]
    assert resolve_block_size(2048, 4096, "m") == 2048
    assert DataOptions().block_size == "auto"
    assert parse(SFTConfig, ["--data.block_size", "64"], prog="x")[0].data.block_size == 64
    with pytest.raises(UserError, match=r"--data.block_size 1,024 is more than m can hold.*256 or less, or auto"):
        resolve_block_size(1024, 256, "m")


@pytest.mark.parametrize(("kind", "train"), [(SFTConfig, sft), (DPOConfig, dpo), (RewardConfig, train_reward_model)])
def test_a_training_with_auto_is_that_with_the_models_own_size(kind, train, tiny_directory, tmp_path):
    short = {"train__steps": 1, "data__max_rows": 12, "eval__iters": 1, "eval__every": 1}
    auto, own = (
        train(tiny_config(tiny_directory, tmp_path / str(size), kind, data__block_size=size, **short))
        for size in ("auto", POSITIONS)
    )
    assert auto.config["data"]["block_size"] == POSITIONS
    logs = [
        [line for line in comparable(run) if line["event"] != "reference"] for run in (auto, own)
    ]  # which finds its values kept
    assert logs[0] == logs[1]
    assert last_digest(auto) == last_digest(own)
    with pytest.raises(UserError, match=r"--data.block_size 1,024 is more than .* can hold"):
        train(tiny_config(tiny_directory, tmp_path / "1024", kind, data__block_size=1024, **short))


def test_a_resumed_run_keeps_the_size_that_it_began_with(tiny_directory, tmp_path):
    short = {"train__steps": 1, "data__max_rows": 12, "eval__iters": 1, "eval__every": 1}
    run = sft(tiny_config(tiny_directory, tmp_path / "run", data__block_size=128, **short))
    config = tiny_config(tiny_directory, run.path, data__block_size="auto", resume=True, **{**short, "train__steps": 2})
    assert sft(config).config["data"]["block_size"] == 128


def test_a_new_model_reads_whole_rows_of_its_own_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"The number {i} comes before {i + 1}."}) + "\n" for i in range(300)))
    shape = ["--model.n_layer", "1", "--model.n_head", "1", "--model.n_embd", "16", "--model.block_size", "32"]
    argv = [
        "pretrain",
        "--data",
        str(text),
        *shape,
        "--tokenizer.vocab_size",
        "300",
        "--train.steps",
        "1",
        "--eval.iters",
        "1",
    ]
    assert main([*argv, "--out", "run", "--train.device", "cpu"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["block_size"] == 32


def test_plans_and_data_follow_the_model_too(tiny_directory, tmp_path, capsys):
    plan = ["plan", "--model", str(tiny_directory), "--device", "t4"]
    assert main(plan) == 0
    auto = capsys.readouterr().out
    assert main([*plan, "--data.block_size", str(POSITIONS)]) == 0
    assert capsys.readouterr().out == auto
    assert main([*plan, "--data.block_size", "1024"]) == 1
    assert "is more than" in capsys.readouterr().err
    rows = ["data", "sample", "--data.max_rows", "5"]
    assert main(rows) == 0
    assert "rows longer than 1,024" in capsys.readouterr().out
    assert main([*rows, "--tokenizer", str(tiny_directory)]) == 0
    assert "rows longer than 256" in capsys.readouterr().out


def test_evaluate_refuses_a_size_that_the_model_cannot_read(tiny_directory, capsys):
    argv = ["evaluate", str(tiny_directory), "sample", "--data.max_rows", "3", "--device", "cpu"]
    assert main(argv) == 0
    assert main([*argv, "--data.block_size", "1024"]) == 1
    assert "--data.block_size 1,024 is more than" in capsys.readouterr().err


def test_a_step_larger_than_the_data_says_so(tiny_directory, tmp_path, capsys):
    config = tiny_config(tiny_directory, tmp_path / "run", train__steps=None, train__epochs=1.0, train__batch_size=16)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_rows=4))
    with pytest.warns(
        UserWarning,
        match=r"a step takes 16 rows of 128 tokens, but the data fill only \d+: every step uses all of them, each once",
    ):
        assert sft(config).config["train"]["steps"] == 1
