"""Relative paths in YAML files are looked for beside the file that names them, then in the current directory."""

import json
import shutil

import pytest
import yaml

from tunesmith.__main__ import main
from tunesmith.data.datasets import NAMED, is_named
from tunesmith.files.run import Run
from tunesmith.options.beside import NAMED_SETS, placed
from tunesmith.study.definition import read_study_file
from tunesmith.study.matrix import make_plan, run_config

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(12)]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with data and prompts, below the current directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    (folder / "prompts.txt").write_text("Who?\n")
    return folder


def resolved(capsys, file, command="sft"):
    with pytest.raises(SystemExit):
        main([command, "--config", str(file), "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_a_configuration_names_what_lies_beside_it(project, tmp_path, capsys, monkeypatch):
    file = project / "mine.yaml"
    (tmp_path / "here.txt").write_text("Who?\n")
    file.write_text(
        "model: {name: sample}\ndata: {name: ['a.jsonl*0.5', 'b.jsonl*0.5']}\n"
        "eval: {prompts: prompts.txt, reward: nowhere}\nout: runs/x\n"
    )
    config = resolved(capsys, "project/mine.yaml")
    assert config["data"]["name"] == "project/a.jsonl*0.5,project/b.jsonl*0.5"
    assert config["eval"]["prompts"] == "project/prompts.txt"
    assert (config["eval"]["reward"], config["model"]["name"], config["out"]) == ("nowhere", "sample", "runs/x")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resolved(capsys, file)["eval"]["prompts"] == str(project / "prompts.txt")
    monkeypatch.chdir(project)
    assert resolved(capsys, file)["eval"]["prompts"] == "prompts.txt"
    monkeypatch.chdir(tmp_path)
    file.write_text("eval.prompts: here.txt\ndata.name: a.jsonl\n")
    assert resolved(capsys, file)["eval"]["prompts"] == "here.txt"
    assert resolved(capsys, file)["data"]["name"] == "project/a.jsonl"


def test_what_the_command_line_names_goes_by_the_current_directory(project, capsys):
    file = project / "mine.yaml"
    file.write_text("data: {name: a.jsonl}\n")
    with pytest.raises(SystemExit):
        main(["sft", "--config", str(file), "--data.name", "b.jsonl", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["name"] == "b.jsonl"


def test_names_of_data_sets_are_no_files(project):
    assert all(is_named(name) for name in NAMED_SETS)
    assert {name.partition(":")[0] for name in NAMED} == set(NAMED_SETS)
    (project / "hh").mkdir()
    (project / "runs").mkdir()
    options = {"data.name": "hh,a.jsonl", "model.name": "runs@12", "model.base": "@e1", "data.root": None}
    wanted = {**options, "data.name": "hh,project/a.jsonl", "model.name": "project/runs@12"}
    assert placed(options, project) == wanted


def test_a_study_is_the_same_from_everywhere_and_where_it_was_moved_to(project, tmp_path, monkeypatch):
    (project / "base.yaml").write_text("eval: {prompts: prompts.txt, reward: sample}\n")
    file = project / "mine.yaml"
    runs = "{one: {}, two: {set: {data.name: b.jsonl}}}"
    file.write_text(
        f"experiments: {{e: {{config: base.yaml, set: {{model.name: sample, data.name: a.jsonl}}, runs: {runs}}}}}\n"
    )
    plan = make_plan(read_study_file(file))
    config = run_config(plan.runs["one-s1"], tmp_path)
    assert (config["data"]["name"], config["eval"]["prompts"]) == ("project/a.jsonl", "project/prompts.txt")
    assert plan.runs["two-s1"].settings["data.name"] == "project/b.jsonl"
    assert plan.runs["two-s1"].changed["data.name"] == "b.jsonl"
    moved = tmp_path / "moved"
    project.rename(moved)
    again = make_plan(read_study_file(moved / "mine.yaml"))
    assert {n: r.hash for n, r in again.runs.items()} == {n: r.hash for n, r in plan.runs.items()}
    monkeypatch.chdir(moved)
    there = make_plan(read_study_file(moved / "mine.yaml"))
    assert there.runs["one-s1"].settings["data.name"] == "a.jsonl"
    assert there.runs["one-s1"].hash == plan.runs["one-s1"].hash


def test_a_moved_study_goes_on_where_it_was_and_its_run_can_be_repeated(
    project, tmp_path, monkeypatch, tiny_directory, capfd
):
    shutil.copytree(tiny_directory, project / "model")
    file = project / "mine.yaml"
    file.write_text(
        "base: {sft: {model.name: model, data: {name: a.jsonl, block_size: 64}, eval: {every: 2, iters: 1}, train: {steps: 4, "
        "precision: fp32, device: cpu}}}\nexperiments: {e: {runs: {one: {}}}}\n"
    )
    assert main(["study", "project/mine.yaml", "--out", "project/out"]) == 0
    moved = tmp_path / "deeper" / "moved"
    moved.parent.mkdir()
    project.rename(moved)
    monkeypatch.chdir(tmp_path / "deeper")
    run = Run(moved / "out" / "runs" / "one-s1")
    whole = [line["loss"] for line in run.metrics("train")]
    shutil.rmtree(run.checkpoint(4))
    (run.path / "status.json").write_text(json.dumps({**run.status, "state": "stopped", "step": 2}))
    progress = json.loads((moved / "out" / "progress.json").read_text())
    progress["runs"]["one-s1"]["state"] = "waiting"
    (moved / "out" / "progress.json").write_text(json.dumps(progress))
    capfd.readouterr()
    assert main(["study", "moved/mine.yaml", "--out", "moved/out"]) == 0
    assert "one-s1: continues" in capfd.readouterr().out
    assert run.status["state"] == "finished"
    assert [line["loss"] for line in run.metrics("train")] == whole
    assert not (moved / "out" / "superseded").exists()
    monkeypatch.chdir(tmp_path)
    again = tmp_path / "again"
    assert main(["sft", "--config", str(run.path / "config.yaml"), "--out", str(again)]) == 0
    assert [line["loss"] for line in Run(again).metrics("train")] == whole
