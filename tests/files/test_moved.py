"""Runs, adapters and projects that are moved, copied and used from elsewhere: what they name is found, or every place is told."""

import json
import shutil

import pytest
import torch

import tunesmith as ts
from tiny_runs import last_digest, tiny_config, train_losses
from tunesmith.__main__ import main
from tunesmith.commands.evaluate import starting_point
from tunesmith.errors import Note, UserError
from tunesmith.files.adapters import read_adapter
from tunesmith.files.bases import base_at
from tunesmith.files.places import located, located_sets
from tunesmith.files.run import Run
from tunesmith.judge.trained_rows import training_runs
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig

SHORT = {"train__steps": 2, "eval__iters": 1, "eval__every": 2, "checkpoint__every": 2, "train__batch_size": 1}
ROW = {"chosen": "\n\nHuman: Hi {}\n\nAssistant: Yes {}", "rejected": "\n\nHuman: Hi {}\n\nAssistant: No"}


@pytest.fixture
def project(tiny_directory, tmp_path, monkeypatch):
    """A directory that holds all that a training names, each with its relative path: base, data, prompts, a judge."""
    project = tmp_path / "a" / "project"
    shutil.copytree(tiny_directory, project / "models" / "base")
    for name in ("d.jsonl", "more.jsonl"):
        rows = [{key: text.format(i, name) for key, text in ROW.items()} for i in range(8)]
        (project / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (project / "p.txt").write_text("Hi\nWhat is love?\n")
    monkeypatch.chdir(project)
    ts.train_reward_model(tiny_config("models/base", "runs/judge", RewardConfig, **SHORT, data__name="d.jsonl"))
    return project


NAMED = {
    "data__name": "d.jsonl*0.5,more.jsonl*0.5", "eval__reward": "runs/judge", "eval__prompts": "p.txt", "eval__max_new_tokens": 4,
}  # fmt: skip


@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig], ids=["sft", "dpo"])
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_a_project_that_was_moved_goes_on_from_another_directory(project, tmp_path, monkeypatch, kind, rank):
    """Base, mixture, prompts and judge by relative names; the same steps as without the move, and the names stay."""
    options = {**NAMED, **SHORT, "lora__rank": rank}
    whole = ts.sft if kind is SFTConfig else ts.dpo
    straight = whole(tiny_config("models/base", "runs/straight", kind, **(options | {"train__steps": 4})))
    run = whole(tiny_config("models/base", "runs/x", kind, **options))
    names = {group: run.config[group] for group in ("model", "data")} | {"reward": run.config["eval"]["reward"]}
    losses, digest = train_losses(straight), last_digest(straight)
    project.rename(tmp_path / "moved")
    (tmp_path / "d.jsonl").write_text("another file of that name, where the command is given")
    monkeypatch.chdir(tmp_path)
    command = "sft" if kind is SFTConfig else "dpo"
    assert main([command, "--resume", "--out", "moved/runs/x", "--train.steps", "4"]) == 0
    run = Run("moved/runs/x")
    assert train_losses(run) == losses
    assert last_digest(run) == digest
    assert {group: run.config[group] for group in ("model", "data")} | {"reward": run.config["eval"]["reward"]} == names
    assert "history" not in run.config
    assert run.inputs["places"] == {
        "models/base": "../../models/base", "d.jsonl": "../../d.jsonl", "more.jsonl": "../../more.jsonl",
        "runs/judge": "../judge", "p.txt": "../../p.txt",
    }  # fmt: skip


def test_a_run_that_was_moved_alone_says_to_name_its_data_again(project, tmp_path, monkeypatch, capfd):
    ts.sft(tiny_config(project / "models/base", "runs/x", **SHORT, data__name="d.jsonl"))
    (project / "runs/x").rename(tmp_path / "x")
    monkeypatch.chdir(tmp_path)
    more = ["sft", "--resume", "--out", "x", "--train.steps", "4"]
    assert main(more) == 1
    assert "d.jsonl, which the run began with, is not there." in (err := capfd.readouterr().err)
    assert "name it again: --data.name PATH" in err
    assert main([*more, "--data.name", "a/project/d.jsonl"]) == 0


def test_a_moved_dpo_run_still_knows_its_reference_and_what_it_was_trained_on(project, tmp_path, monkeypatch, capfd):
    ts.sft(tiny_config("models/base", "runs/first", **SHORT, data__name="d.jsonl"))
    ts.dpo(tiny_config("runs/first", "runs/x", DPOConfig, **SHORT, data__name="d.jsonl"))
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert starting_point("moved/runs/x") == "moved/runs/first"
    assert [run.path.name for run in training_runs("moved/runs/x")] == ["x", "first"]
    assert main(["evaluate", "moved/runs/x", "moved/d.jsonl"]) == 0
    told = " ".join(capfd.readouterr().out.split())
    assert "by log-ratio to moved/runs/first" in told
    assert "was trained on 7 of the 8 pairs of moved/d.jsonl" in told


def test_names_are_read_from_where_the_run_was_started(project, tmp_path, monkeypatch):
    judge = {"eval__reward": "runs/judge@2", "eval__max_new_tokens": 2}
    run = ts.sft(tiny_config(project / "models/base", "runs/x", **SHORT, **judge, data__name="d.jsonl"))
    copy = tmp_path / "b" / "project"
    shutil.copytree(project, copy)
    there = Run(copy / "runs/x")
    assert located(run, "d.jsonl") == "d.jsonl", "it leads there"
    assert located(there, "d.jsonl") == str(copy.resolve() / "d.jsonl"), "the copy has its own"
    assert located(there, str(project / "models/base")) == str(copy.resolve() / "models/base"), "an absolute path too"
    assert located(there, "runs/judge@2") == f"{copy.resolve()}/runs/judge@2"
    assert (
        located_sets(there, "d.jsonl*2,hh:helpful-base*1,sample*1")
        == f"{copy.resolve()}/d.jsonl*2,hh:helpful-base*1,sample*1"
    )
    for name in ("sample", "gpt2", "owner/name", "nowhere.jsonl"):
        assert located(there, name) == name
    (project / "deep").mkdir()
    beside = Run((project / "runs").rename(project / "deep" / "all") / "x")
    assert located(beside, "runs/judge@2") == "deep/all/judge@2", "what moved with the run inside the project"
    assert located(beside, "d.jsonl") == "d.jsonl"
    alone = Run(shutil.copytree(beside.path, tmp_path / "alone"))
    assert located(alone, str(project / "models/base")) == str(project / "models/base"), "only the run was copied"


@pytest.fixture
def adapter(project):
    """A LoRA run on models/base, and the logits of the two together."""
    run = ts.sft(tiny_config("models/base", "runs/lora", **SHORT, data__name="d.jsonl", lora__rank=2))
    return run, logits(run.path)


def logits(model):
    with torch.no_grad():
        model, _ = ts.load(str(model), device="cpu")
        return model.lm_head(model(torch.arange(8)[None]))


def other_base(path):
    """The same shape with other weights."""
    from tunesmith.files.weights import load_model, save_model

    model = load_model(path)
    with torch.no_grad():
        model.wte.weight.add_(0.1)
    save_model(model, ts.load(str(path), device="cpu")[1], path)


def test_the_right_one_of_several_bases_is_taken(adapter, project, tmp_path, monkeypatch):
    """At its path from the adapter lie other weights; its recorded path, --model.base, a copy elsewhere hold the right ones."""
    run, before = adapter
    shutil.copytree(project / "models", tmp_path / "kept")
    shutil.copytree(project / "models", tmp_path / "models")
    other_base(project / "models" / "base")
    monkeypatch.chdir(tmp_path)  # where models/base, as it is recorded, holds the right weights
    assert torch.equal(logits(run.path if run.path.is_absolute() else project / run.path), before)
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(UserError, match=r"different weights.*--model\.base"):
        logits(project / run.path)
    with base_at("kept/base"):
        assert torch.equal(logits(project / run.path), before)
    other_base(tmp_path / "kept/base")
    with (
        base_at("kept/base"),
        pytest.raises(UserError, match=r"different weights.*kept/base.*project/models/base.*--model\.base"),
    ):
        logits(project / run.path)


def test_a_base_that_is_gone_is_told_with_every_place_and_the_way_out(adapter, project, tmp_path, monkeypatch, capfd):
    _, before = adapter
    (project / "models/base").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert main(["chat", "a/project/runs/lora"]) == 1
    told = capfd.readouterr().err
    for place in (
        "a/project/models/base",
        str(tmp_path / "models/base"),
        "a/project/runs/lora/base",
        "directory with --model.base",
    ):
        assert place in told, place
    assert len(told.splitlines()) == 1
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    argv = ["a/project/runs/lora", "--model.base", "elsewhere"]
    assert main(["chat", *argv]) == 0
    assert main(["compare", *argv[:1], *argv, "--limit", "1", "--generate.max_new_tokens", "2"]) == 0
    assert main(["evaluate", argv[0], "a/project/more.jsonl", *argv[1:]]) == 0
    more = ["--train.steps", "1", "--data.name", "a/project/d.jsonl", "--eval.iters", "1", "--out", "next"]
    assert main(["sft", "--model.name", *argv, *more]) == 0
    with base_at("elsewhere"):
        assert torch.equal(logits("a/project/runs/lora"), before)


def test_a_base_that_nobody_uses_is_told(project, capfd):
    argv = ["compare", "models/base", "models/base", "--limit", "1", "--generate.max_new_tokens", "2"]
    with pytest.warns(Note, match=r"--model\.base models/base was not used"):
        assert main([*argv, "--model.base", "models/base"]) == 0


def test_peft_opens_a_moved_adapter_where_its_base_is_where_it_says(adapter, project, monkeypatch):
    peft = pytest.importorskip("peft")
    run, before = adapter
    assert read_adapter(run.best_checkpoint()).base == "models/base"
    run.path.rename(project / "other")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained((Run("other")).best_checkpoint())
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.arange(8)[None]).logits, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits("other"), before)


@pytest.mark.parametrize("again", ["models/base", None])
def test_a_run_of_all_weights_goes_on_without_the_base_that_it_began_with(project, tmp_path, monkeypatch, again):
    """Its checkpoint holds everything; named as it was or not named, the base is not needed any more."""
    straight = ts.sft(
        tiny_config("models/base", "runs/straight", **SHORT | {"train__steps": 4, "data__name": "d.jsonl"})
    )
    run = ts.sft(tiny_config("models/base", "runs/x", **SHORT, data__name="d.jsonl"))
    shutil.rmtree(project / "models/base")
    argv = ["sft", "--resume", "--out", "runs/x", "--train.steps", "4", *(["--model.name", again] if again else [])]
    assert main(argv) == 0
    assert train_losses(run) == train_losses(straight)
    assert last_digest(run) == last_digest(straight)
    assert run.config["model"]["name"] == "models/base"
    assert "history" not in run.config
    assert main(["dpo", "--model.name", "models/base", "--data.name", "d.jsonl", "--out", "runs/y"]) == 1


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_a_run_that_still_needs_its_base_says_where_that_lay(project, rank):
    """A reference or an adapter's base cannot be taken from a checkpoint; the hub is not asked for a lost directory."""
    options = {**SHORT, "data__name": "d.jsonl", "lora__rank": rank}
    run = ts.dpo(tiny_config("models/base", "runs/x", DPOConfig, **options))
    (project / "models/base").rename(project / "elsewhere")
    again = {**options, "train__steps": 4, "resume": True}
    with pytest.raises(
        UserError, match=r"--model.name models/base: \S*models/base, which the run began with.*--model.name PATH"
    ):
        ts.dpo(tiny_config("models/base", "runs/x", DPOConfig, **again))
    ts.dpo(tiny_config("elsewhere", "runs/x", DPOConfig, **again))
    assert run.status["step"] == 4


def test_a_plan_finds_a_moved_base_by_its_name(adapter, project, capfd):
    (project / "models/base").rename(project / "elsewhere")
    argv = ["plan", "--model.name", "runs/lora", "--device", "t4"]
    assert main(argv) == 1
    assert "--model.base" in capfd.readouterr().err
    assert main([*argv, "--model.base", "elsewhere"]) == 0
    assert "width 48" in capfd.readouterr().out


def test_a_run_on_a_random_base_can_be_moved_with_its_base(tiny_directory, tmp_path):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "run", model__init="random", lora__rank=2, train__steps=1))
    before, _ = ts.load(str(run.path), device="cpu")
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    after, _ = ts.load(str(moved), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
