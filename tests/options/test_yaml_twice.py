"""What a YAML file gives twice is an error with both lines, wherever it stands: the last one would win without a word. A key that is
no text is one with its line."""

import pytest

from tunesmith.__main__ import main
from tunesmith.options.yamlfile import read_yaml

TWICE = {
    "a group": ("model: {name: sample}\noptimizer:\n  lr: 3e-3\ntrain: {steps: 2}\noptimizer:\n  weight_decay: 0.1\n", "optimizer", 2, 5),
    "an option": ("train:\n  steps: 3\n  seed: 1\n  steps: 4\n", "train.steps", 2, 4),
    "in braces": ("train: {steps: 3,\n  seed: 1, steps: 4}\n", "train.steps", 1, 2),
    "in other words": ("train.steps: 3\ntrain:\n  steps: 4\n", "train.steps", 1, 3),
    "a dotted name": ("train.steps: 3\nmodel.name: sample\ntrain.steps: 4\n", "train.steps", 1, 3),
    "of quoted ones": ('"out": a\nout: b\n', "out", 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("what", TWICE)
@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_configuration_that_gives_something_twice_is_refused_with_both_lines(tmp_path, capsys, what, command):
    text, key, first, second = TWICE[what]
    file = tmp_path / "my.yaml"
    file.write_text(text)
    assert main([command, "--config", str(file), "--print_config"]) == 2
    told = f'tunesmith: {file}: "{key}" appears in line {first} and again in line {second}; keep one\n'
    assert capsys.readouterr().err == told


STUDY = """
experiments:
  one:
    set: {{model.name: sample, {first}}}
    runs:
      a: {{set: {{train.steps: 2}}}}
{more}
"""


@pytest.mark.parametrize(
    ("first", "more", "told"),
    [
        ("train.steps: 3, train: {steps: 4}", "", '"experiments.one.set.train.steps" appears in line 4 and again in line 4'),
        ("train.seed: 3", "      a: {}", '"a" appears in line 6 and again in line 7'),
        ("train.seed: 3", "  one: {}", '"one" appears in line 3 and again in line 7'),
        (
            "train.seed: 3", "scales:\n  s:\n    experiments: {}\n    experiments: {}",
            '"experiments" appears in line 9 and again in line 10',
        ),
    ],
)  # fmt: skip
def test_so_is_a_study(tmp_path, capsys, first, more, told):
    file = tmp_path / "mine.yaml"
    file.write_text(STUDY.format(first=first, more=more))
    assert main(["study", str(file), "--dry_run"]) == 2
    assert f"{file}: {told}; keep one" in capsys.readouterr().err
    file.write_text(STUDY.format(first="train.seed: 3", more=""))
    assert main(["study", str(file), "--dry_run", "--out", str(tmp_path / "out")]) == 0


NO_TEXT = {
    "on": ("train:\n  on: 1\n", "key on in line 2 is read as true or false"),
    "number": ("train: {steps: 2}\n1: {steps: 3}\n", "key 1 in line 2 is read as a number"),
    "decimal": ("data:\n  name:\n  - {1.5: 2}\n", "key 1.5 in line 3 is read as a number"),
    "null": ("null: 3\n", "key null in line 1 is read as nothing"),
    "empty": ("train: {steps: 2}\n?\n: 3\n", "empty key in line 2 is read as nothing"),
    "date": ("model: {2026-01-01: x}\n", "key 2026-01-01 in line 1 is read as a date"),
    "list": ("a: 1\n? [b, c]\n: 3\n", "key in line 2 is a list or a mapping"),
    "mapping": ("? {b: c}\n: 3\n", "key in line 1 is a list or a mapping"),
    "twice in a list": (
        "data:\n  name:\n  - a: 1\n  - - a: 1\n      a: 2\n",
        '"a" appears in line 4 and again in line 5',
    ),
}


@pytest.mark.parametrize("what", NO_TEXT)
@pytest.mark.parametrize("command", [["sft", "--config"], ["study"]])
def test_a_key_that_is_no_text_is_refused_with_its_line(tmp_path, capsys, what, command):
    text, told = NO_TEXT[what]
    file = tmp_path / "my.yaml"
    file.write_text(text)
    assert main([*command, str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tunesmith: {file}: ")
    assert told in line


def test_a_key_in_quotes_is_a_name():
    assert read_yaml("'on': 1\n'1': 2\n", "f") == {"on": 1, "1": 2}


def test_what_is_merged_in_or_stands_in_different_places_is_not_twice():
    text = "a: &a {x: 1, y: 2e-3}\nb: {<<: *a, x: 3}\nc: [{x: 1}, {x: 2}]\nd: &d {again: *a}\n"
    assert read_yaml(text, "f") == {
        "a": {"x": 1, "y": 2e-3}, "b": {"x": 3, "y": 2e-3}, "c": [{"x": 1}, {"x": 2}], "d": {"again": {"x": 1, "y": 2e-3}},
    }  # fmt: skip
    assert read_yaml("", "f") is None
    assert read_yaml("x: 1e-4", "f", exponents=False) == {"x": "1e-4"}
    ring = read_yaml("a: &a {b: *a, c: 1}", "f")
    assert ring["a"]["b"] is ring["a"]
