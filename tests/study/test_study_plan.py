"""A study's file: what runs it makes, what their hashes hold, and what is wrong with a wrong one. Nothing is trained here."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from tunesmith.__main__ import main
from tunesmith.errors import UsageError
from tunesmith.options.parse import from_settings
from tunesmith.options.training import SFTConfig
from tunesmith.study.definition import ENTRY, EXPERIMENT, TOP, read_study_file, study_path
from tunesmith.study.matrix import make_plan, plan_record, run_config

BASE = {"sft": {"model": {"name": "sample"}, "data.name": "sample", "train": {"steps": 3}}}


def plan(tmp_path, scale=None, places=None, **content):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"base": BASE, **content}, sort_keys=False))
    return make_plan(read_study_file(file, scale), places)


def written(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    return make_plan(read_study_file(tmp_path / "mine.yaml"))


def hashes(made):
    return {name: run.hash for name, run in made.runs.items()}


def test_a_matrix_is_every_combination_times_the_seeds(tmp_path):
    made = plan(
        tmp_path, seeds=[7, 8],
        experiments={"x": {"matrix": {"optimizer.name": ["adamw", "sgd"], "lora.rank": [0, 2]}, "labels": {"sgd, rank 2": "SGD!"}}},
    )  # fmt: skip
    assert list(made.runs) == [
        f"x-{optimizer}-{rank}-s{n}" for optimizer in ("adamw", "sgd") for rank in (0, 2) for n in (1, 2)
    ]
    run = made.runs["x-sgd-2-s2"]
    assert {run.settings[k] for k in ("train.seed", "data.seed")} == {8}
    assert (run.settings["optimizer.name"], run.settings["lora.rank"], run.settings["train.steps"]) == ("sgd", 2, 3)
    assert [s.label for s in made.experiments["x"][1]][::2] == ["adamw, rank 0", "adamw, rank 2", "sgd, rank 0", "SGD!"]


def test_every_seed_has_the_validation_rows_of_the_first(tmp_path):
    made = plan(tmp_path, seeds=[7, 8], experiments={"x": {"runs": {"a": None, "b": {"set": {"data.split_seed": 3}}}}})
    rows = {name: from_settings(SFTConfig, run.settings, "here").data.rows_seed for name, run in made.runs.items()}
    assert rows == {"a-s1": 7, "a-s2": 7, "b-s1": 3, "b-s2": 3}
    alone = plan(tmp_path, seeds=[7], experiments={"x": {"runs": {"a": None}}})
    assert made.runs["a-s1"].hash == alone.runs["a-s1"].hash  # more seeds make no finished run anew


def test_settings_win_in_the_order_preset_base_experiment_run_matrix(tmp_path):
    made = plan(
        tmp_path,
        experiments={"x": {
            "config": "paper/e4", "set": {"eval": {"iters": 2}, "train.grad_clip": 2},
            "runs": {"a": {"set": {"eval.iters": 3}}, "b-{optimizer.lr}": {"matrix": {"optimizer.lr": [0.5], "eval.iters": [4]}}},
        }},
    )  # fmt: skip
    a, b = made.runs["a-s1"].settings, made.runs["b-0.5-s1"].settings
    assert (a["train.accumulate"], a["data.batching"], a["optimizer.lr"]) == (4, "windows", 1e-4)  # the preset's
    assert (a["train.steps"], a["model.name"]) == (3, "sample")  # the base's, over the preset's
    assert (a["eval.iters"], b["eval.iters"], b["optimizer.lr"], b["train.grad_clip"]) == (3, 4, 0.5, 2)


def test_batching_is_switched_for_the_whole_study_and_a_run_may_differ(tmp_path):
    experiments = {"x": {"config": "paper/e1", "runs": {"a": None, "b": {"set": {"data.batching": "padded"}}}}}
    for batching, loss_on, a in (
        ("paper", "all", "windows"),
        ("ours", "assistant", "packed"),
        ("as_set", "all", "windows"),
    ):
        made = plan(tmp_path, batching=batching, experiments=experiments)
        assert [made.runs[f"{n}-s1"].settings["data.batching"] for n in "ab"] == [a, "padded"]
        assert made.runs["a-s1"].settings["data.loss_on"] == loss_on


def test_other_runs_are_meant_seed_by_seed_and_come_first(tmp_path):
    made = plan(
        tmp_path, seeds=[1, 2],
        experiments={
            "x": {"command": "dpo", "set": {"model.name": "@first", "data.name": "sample"}},
            "y": {"runs": {
                "more": {"continues": "first", "set": {"train.steps": 6}},
                "first": {"set": {"eval.reward": {"run": "judge", "step": 4}}},
            }},
        },
        runs={"judge": {"command": "reward", "once": True, "set": {"data.name": "sample"}}},
    )  # fmt: skip
    names = list(made.runs)
    assert all(names.index(n) < names.index(run.name) for run in made.runs.values() for n in run.needs)
    assert made.runs["x-s2"].needs == ("first-s2",)
    assert made.runs["more-s1"].continues == "first-s1"
    assert set(made.runs["more-s1"].needs) == {"first-s1"}
    assert made.runs["first-s2"].needs == ("judge",)
    config = run_config(made.runs["first-s1"], tmp_path)
    assert config["eval"]["reward"] == f"{tmp_path}/runs/judge@4"
    assert run_config(made.runs["x-s1"], tmp_path)["model"]["name"] == f"{tmp_path}/runs/first-s1"


def test_the_same_run_serves_several_experiments_under_other_labels(tmp_path):
    experiments = {
        "a": {"runs": {"full": {"label": "first half"}}},
        "b": {"also": {"full": "batch 1"}, "runs": {"r{lora.rank}": {"matrix": {"lora.rank": [1, 2]}}}},
    }
    record = plan_record(plan(tmp_path, experiments=experiments))
    assert record["experiments"]["b"]["runs"] == [
        {"run": "full-s1", "label": "batch 1", "seed": 1234},
        {"run": "r1-s1", "label": "rank 1", "seed": 1234},
        {"run": "r2-s1", "label": "rank 2", "seed": 1234},
    ]
    assert record["runs"]["r2-s1"] == {
        "directory": "runs/r2-s1", "hash": record["runs"]["r2-s1"]["hash"], "command": "sft", "needs": [], "continues": None,
        "settings": {"model.name": "sample", "data.name": "sample", "train.steps": 3, "lora.rank": 2},
    }  # fmt: skip
    assert len(record["runs"]) == 3


def test_a_learning_rate_search_tries_every_rate_for_every_run_at_the_same_budget(tmp_path):
    experiment = {
        "matrix": {"optimizer.name": ["adamw", "sgd"]},
        "set": {"optimizer.lr": 1e-3},
        "lr_search": [1e-3, 0.1],
    }
    made = plan(tmp_path, experiments={"e": experiment})
    assert [s.label for s in made.experiments["e-lr"][1]] == [
        "adamw, lr 0.001", "sgd, lr 0.001", "adamw, lr 0.1", "sgd, lr 0.1",
    ]  # fmt: skip
    assert made.searches["e-lr"] == {"adamw": ["e-adamw-s1", "e-adamw-lr0.1-s1"], "sgd": ["e-sgd-s1", "e-sgd-lr0.1-s1"]}
    assert {made.runs[n].settings["train.steps"] for n in made.runs} == {3}


# ---- hashes ----------------------------------------------------------------------------------------------------------

CHAIN = {
    "x": {"runs": {"a": None, "b": {"set": {"optimizer.lr": 0.1}}}},
    "y": {"command": "dpo", "set": {"model.name": "@a", "data.name": "sample"}, "runs": {"c": None}},
    "z": {"runs": {"d": {"continues": "b", "set": {"train.steps": 9}}}},
}


def changed(tmp_path, change, **more):
    before, after = hashes(plan(tmp_path, experiments=CHAIN)), json.loads(json.dumps(CHAIN))
    change(after)
    now = hashes(plan(tmp_path, experiments=after, **more))
    return {name for name in now if before.get(name) != now[name]}


def test_a_changed_option_changes_that_run_and_those_that_need_it(tmp_path):
    assert changed(tmp_path, lambda e: None) == set()
    assert changed(tmp_path, lambda e: e["y"]["set"].update({"dpo.beta": 0.2})) == {"c-s1"}
    assert changed(tmp_path, lambda e: e["x"]["runs"].update(a={"set": {"train.steps": 4}})) == {"a-s1", "c-s1"}
    assert changed(tmp_path, lambda e: e["x"]["runs"]["b"]["set"].update({"optimizer.lr": 0.2})) == {"b-s1", "d-s1"}


def test_names_labels_and_places_are_no_part_of_a_run(tmp_path):
    assert changed(tmp_path, lambda e: e["x"].update(title="Another title")) == set()
    assert changed(tmp_path, lambda e: None, places={"data.root": "/elsewhere"}) == set()
    assert changed(tmp_path, lambda e: None, title="T", figures=["figure-1"]) == set()
    one = plan(tmp_path, experiments={"x": {"runs": {"a": {"set": {"optimizer": {"lr": 1e-3}}}}}})
    other = plan(tmp_path, experiments={"q": {"runs": {"b": {"set": {"optimizer.lr": "1e-3"}}}}})
    assert list(hashes(one).values()) == list(hashes(other).values())
    assert one.runs["a-s1"].settings["optimizer.lr"] == 1e-3


# ---- what is wrong with a file ---------------------------------------------------------------------------------------

WRONG = {
    "matrix over an unknown option": (
        "experiments: {e: {matrix: {optimizer.lerning_rate: [1]}}}", "experiments.e.matrix", '"optimizer.lerning_rate"', "optimizer.lr",
    ),
    "unknown key": ("experiments: {e: {metrix: {}}}", "experiments.e", '"metrix"', "matrix"),
    "unknown top key": ("experimnts: {e: {}}", '"experimnts"', "experiments"),
    "unknown option of another command": ("experiments: {e: {set: {dpo.beta: 1}}}", "experiments.e", 'no option "dpo.beta"'),
    "set by the study": ("experiments: {e: {set: {out: x}}}", "out is set by the study itself"),
    "wrong type": ("experiments: {e: {set: {optimizer.lr: fast}}}", "experiments.e", "optimizer.lr", "fast", "a number"),
    "wrong choice": ("experiments: {e: {matrix: {optimizer.name: [adamv]}}}", "experiments.e", "optimizer.name", "adamv"),
    "matrix without a list": ("experiments: {e: {matrix: {lora.rank: 3}}}", "experiments.e.matrix.lora.rank", "a list"),
    "unknown command": ("experiments: {e: {command: stf}}", "experiments.e.command", "stf", "sft"),
    "unknown run": ("experiments: {e: {set: {model.name: '@frist'}}, f: {runs: {first: }}}", "e.model.name", '"frist"', "first"),
    "unknown run to show": ("experiments: {e: {also: {nobody: label}}}", "experiments.e.also", '"nobody"'),
    "unknown run to go on from": ("experiments: {e: {continues: e2}}", "continues", '"e2"'),
    "goes on from another command": (
        "experiments: {e: {command: dpo, continues: f}, f: {}}", "f-s1 is a run of sft", "this is a run of dpo",
    ),
    "the same name twice": (
        "experiments: {e: {runs: {a: }}, f: {set: {train.steps: 9}, runs: {a: }}}",
        "experiments.f.runs.a", '"a-s1"', "experiments.e.runs.a",
    ),
    "names that do not tell a matrix apart": (
        "experiments: {e: {runs: {'x{train.seed}': {matrix: {lora.rank: [1, 2]}}}}}", '"x1234-s1"', "put the varied option",
    ),
    "the same run twice": ("experiments: {e: {runs: {a: , b: }}}", '"b-s1" is identical to "a-s1"', "also:"),
    "circle": (
        "experiments: {e: {runs: {a: {needs: [b]}, b: {set: {train.steps: 5}, needs: [a]}}}}", "circle", "a-s1 -> b-s1 -> a-s1",
    ),
    "a run that needs itself": ("experiments: {e: {needs: [e]}}", "circle", "e-s1 -> e-s1"),
    "no runs": ("experiments: {}", "no runs"),
    "nothing": ("", "a study", "expected keys and values"),
    "a key twice": ("seeds: [1]\nexperiments: {e: {}}\nseeds: [2]", '"seeds"', "line 1", "line 3"),
    "not YAML": ("experiments: [", "not valid YAML"),
    "a bad template": ("experiments: {e: {label: '{lora.rnak}'}}", "{lora.rnak}", "cannot be filled in"),
    "a bad name": ("experiments: {e: {runs: {'a/b': }}}", '"a/b-s1"', "directory"),
    "a bad preset": ("experiments: {e: {config: paper/e44}}", "experiments.e.config", "paper/e4"),
    "seeds": ("seeds: [1, 1]\nexperiments: {e: {}}", "seeds", "twice"),
    "a search over a search": ("experiments: {e: {matrix: {optimizer.lr: [1]}, lr_search: [1]}}", "e.lr_search", "already varies"),
    "a search of words": ("experiments: {e: {lr_search: [low]}}", "e.lr_search", "learning rates"),
    "a reference with another key": ("experiments: {e: {set: {model.name: {run: a, at: 3}}}}", "model.name", '"at"'),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_told_with_file_and_key(tmp_path, case):
    text, *told = WRONG[case]
    with pytest.raises(UsageError) as caught:
        written(tmp_path, text)
    assert len(str(caught.value).splitlines()) == 1
    for part in ("mine.yaml", *told):
        assert part in str(caught.value)


def test_the_command_line_tells_it_in_one_line_with_exit_code_2(tmp_path, capfd):
    (tmp_path / "bad.yaml").write_text("experiments: {e: {matrix: {lora.rnk: [1]}}}")
    (tmp_path / "good.yaml").write_text(yaml.safe_dump({"base": BASE, "experiments": {"one": {}}}))
    (tmp_path / "values.yaml").write_text(
        yaml.safe_dump(
            {
                "base": BASE,
                "experiments": {"one": {"set": {"train.batch_size": 0, "train.epochs": 1, "train.steps": 1}}},
            }
        )
    )
    for argv, *told in (
        (["studdy"], "no such file", "paper"),
        (["papr"], "Did you mean paper?"),
        ([str(tmp_path / "bad.yaml")], "bad.yaml", "lora.rank"),
        (["paper", "--scale", "smal"], "Did you mean small?"),
        ([str(tmp_path / "good.yaml"), "--scale", "smoke"], "it has no scales"),
        ([str(tmp_path / "good.yaml"), "--only", "two"], "--only two", "one"),
        ([str(tmp_path / "good.yaml"), "--jobs", "0"], "--jobs is 0"),
        ([str(tmp_path / "values.yaml")], "experiments.one", "--train.batch_size is 0", "not both", "one-s1"),
    ):
        assert main(["study", *argv, "--dry_run"]) == 2
        error = capfd.readouterr().err
        assert len(error.splitlines()) == 1
        for part in told:
            assert part in error


# ---- the built-in study ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["full", "small", "smoke"])
def test_the_paper_is_complete_at_every_scale(scale):
    made = make_plan(read_study_file(study_path("paper"), scale))
    labels = {id: list(dict.fromkeys(s.label for s in shown)) for id, (_, shown) in made.experiments.items()}
    assert labels == {
        "e1": ["first half", "continued"],
        "e1b": ["lr 1", "lr 0.1"] if scale == "smoke" else ["lr 0.01", "lr 0.001"],
        "e2": ["first half", "continued"],
        "e4": ["AdamW", "Adam", "SGD-Nesterov", "SGD-momentum", "SGD"],
        "e5": ["rank 1", "rank 2", "rank 8", "rank 16", "full"],
        "e6": ["helpful only"],
        "e7": ["batch 1", "batch 4 = 4 x 1", "batch 4"],
        "e8": ["DPO"],
    }
    assert (scale != "smoke") or len(made.runs) >= 20
    judged = {s.run for id in ("e2", "e5", "e6", "e8") for s in made.experiments[id][1]}
    for run in made.runs.values():
        assert (run.settings.get("eval.reward") is not None) == (run.name in judged)
    by_optimizer = [made.runs[s.run].settings for s in made.experiments["e4"][1] if s.seed == 1234]
    rest = [{k: v for k, v in s.items() if k != "optimizer.name"} for s in by_optimizer]
    assert all(other == rest[0] for other in rest[1:])  # the same batches in the same order, the same rate and momentum


def test_the_full_scale_is_the_papers_own_sizes():
    made = make_plan(read_study_file(study_path("paper"), "full"))
    s = {name: run.settings for name, run in made.runs.items()}
    assert {run["model.name"] for run in s.values()} == {"gpt2-medium", "@e1-s1"}
    assert (s["e1-s1"]["train.steps"], s["e1-continued-s1"]["train.steps"]) == (40_000, 80_000)
    for optimizer in ("adamw", "sgd"):  # 20,000 iterations of the report, each a micro-batch of one row
        e4 = s[f"e4-{optimizer}-s1"]
        assert (e4["train.steps"], e4["train.accumulate"], e4["train.batch_size"]) == (5_000, 4, 1)
    assert all(run["train.precision"] == "fp32" and run["train.compile"] is False for run in s.values())
    validations = {
        name: run["train.steps"] / run["eval.every"] for name, run in s.items() if not name.startswith(("e8", "e1b"))
    }
    assert validations == dict.fromkeys(validations, 40) | {"e1-s1": 20}  # the half; with its continuation 40
    assert [s[f"e5-r{r}-s1"]["lora.rank"] for r in (1, 2, 8, 16)] == [1, 2, 8, 16]
    assert s["e6-s1"]["data.name"] == "hh-helpful-half"
    assert all(run["data.batching"] == "windows" for run in s.values() if "dpo.beta" not in run)
    at_once = s["e7-batch-4-s1"]
    assert [shown.run for shown in made.experiments["e7"][1]] == ["e1-s1", "e4-adamw-s1", "e7-batch-4-s1"]
    assert (at_once["train.batch_size"], at_once["train.accumulate"], at_once["train.steps"]) == (4, 1, 5_000)
    ours = make_plan(read_study_file(study_path("paper"), "full", batching="ours"))
    assert {run.settings["data.batching"] for run in ours.runs.values()} == {"packed"}


def test_scales_override_key_by_key_and_take_away(tmp_path):
    content = {
        "experiments": {"a": {"runs": {"x": {"label": "X"}, "y": {"set": {"train.steps": 5}}}}, "b": {"set": {"lora.rank": 2}}},
        "scales": {"big": None, "tiny": {"seeds": [3], "experiments": {"a": {"runs": {"y": {"set": {"eval.iters": 2}}}}, "b": None}}},
    }  # fmt: skip
    assert list(plan(tmp_path, **content, scale=None).runs) == ["x-s1", "y-s1", "b-s1"]
    tiny = plan(tmp_path, scale="tiny", **content)
    assert list(tiny.runs) == ["x-s1", "y-s1"]
    y = tiny.runs["y-s1"]
    assert (y.seed, y.settings["train.steps"], y.settings["eval.iters"]) == (3, 5, 2)
    assert dataclasses.replace(y, hash="").needs == ()


def test_the_study_that_the_page_shows_is_one(tmp_path, capfd):
    page = (Path(__file__).parents[2] / "docs" / "study.md").read_text()
    (body,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    file = tmp_path / "rates.yaml"
    file.write_text(body)
    made = make_plan(read_study_file(file))
    names = ["full", "r1", "r8", "full-continued", "optimizers-adamw", "optimizers-sgd", "preferences"]
    names += ["optimizers-adamw-lr0.01", "optimizers-sgd-lr0.01"]
    assert set(made.runs) == {f"{name}-s{n}" for name in names for n in (1, 2)}
    assert main(["study", str(file), "--dry_run", "--out", str(tmp_path / "out")]) == 0
    assert "18 runs, 0 of them done" in capfd.readouterr().out
    assert not (tmp_path / "out").exists()
    for key in (*TOP[4:], *ENTRY, *EXPERIMENT):
        assert f"`{key}`" in page
    for line in re.findall(r"^tunesmith study (.*)$", page, re.M):
        if "my-study" not in line:
            assert main(["study", *line.split(), "--dry_run", "--out", str(tmp_path / "out")]) == 0
