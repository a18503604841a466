"""docs/architecture.md shows what an addition takes as diffs; here each is made in a copy of the tree, and used."""

import json
import os
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"^### (.+?)\n.*?^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
SMALL = {
    "model.name": "sample", "data.name": "sample", "data.block_size": 128, "data.max_rows": 60, "train.precision": "fp32",
    "train.device": "cpu", "train.steps": 2, "train.batch_size": 2, "eval.iters": 2, "eval.every": 2, "checkpoint.every": 2,
}  # fmt: skip


class Tree:
    """A copy of the tree with one addition."""

    def __init__(self, root, addition):
        self.root = root
        for folder in ("src", "tests"):
            left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / folder, root / folder, ignore=left_out)
        subprocess.run(["git", "apply", "--verbose", "-"], cwd=root, input=DIFFS[addition], text=True, check=True)

    def python(self, *argv):
        """The output of Python in this tree."""
        paths = f"{self.root / 'src'}{os.pathsep}{self.root / 'tests'}"
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *argv], cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def train(self, command, **options):
        """The events of a tiny training; options with `__` for the dot."""
        named = {**SMALL, **{name.replace("__", "."): value for name, value in options.items()}, "out": "run"}
        argv = [word for name, value in named.items() for word in (f"--{name}", str(value))]
        self.python("-m", "tunesmith", command, *argv)
        assert json.loads((self.root / "run" / "status.json").read_text())["state"] == "finished"
        return [json.loads(line) for line in (self.root / "run" / "metrics.jsonl").read_text().splitlines()]


def test_an_optimizer(tmp_path):
    tree = Tree(tmp_path, "An optimizer")
    events = tree.train("sft", optimizer__name="adagrad", optimizer__lr=1e-4)
    first, last = (e["validation_loss"] for e in events if e["event"] == "eval")
    assert last < first
    assert "adagrad" in tree.python("-m", "tunesmith", "sft", "--help", "all")
    assert "optimizer state" in tree.python(
        "-m", "tunesmith", "plan", "--model.name", "gpt2", "--optimizer.name", "adagrad", "--device", "t4"
    )


def test_a_loss(tmp_path):
    events = Tree(tmp_path, "A loss").train("dpo", dpo__loss="exponential", optimizer__lr=1e-4)
    first, last = (e["validation_loss"] for e in events if e["event"] == "eval")
    assert first == pytest.approx(1), "exp(0): policy and reference are equal"
    assert last < first


def test_a_form_of_data(tmp_path):
    tree = Tree(tmp_path, "A form of data")
    rows = [
        {"dialog": [f"How old is number {i}?", f"It is {i}.", "And the next?", f"It is {i + 1}."]} for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "form: dialog (40 rows): dialog -> turns of user and assistant" in tree.python(
        "-m", "tunesmith", "data", "rows.jsonl", "--tokenizer", "sample"
    )
    assert tree.train("sft", data__name="rows.jsonl")[-1]["step"] == 2


def test_a_template(tmp_path):
    tree = Tree(tmp_path, "A template")
    laws = tree.python("-m", "pytest", "-q", "tests/data/test_template.py", "-k", "alpaca", "-p", "no:cacheprovider")
    assert re.search(r"^\d+ passed", laws, re.MULTILINE)


def test_a_family(tmp_path):
    tree, laws = Tree(tmp_path, "A family"), ("tests/models/test_families.py", "tests/files/test_families_on_disk.py")
    passed = tree.python("-m", "pytest", "-q", *laws, "-k", "arcee", "-p", "no:cacheprovider")
    assert re.search(r"^\d\d passed", passed, re.MULTILINE)


def test_a_training_method(tmp_path):
    tree = Tree(tmp_path, "A training method")
    assert "continued pretraining" in tree.python("-m", "tunesmith", "--help")
    tree.python("-m", "tunesmith", "plan", "adapt", "--model.name", "gpt2", "--device", "t4")
    events = tree.train("adapt", optimizer__lr=1e-4)
    first, last = (e["validation_loss"] for e in events if e["event"] == "eval")
    assert last < first
    assert "loss_on: all" in (tmp_path / "run" / "config.yaml").read_text()


def test_every_name_on_the_page_exists():
    words = re.findall(r"`((?:[a-z_]+\.)+\w+)`", PAGE.partition("## Additions")[0])
    assert len(words) > 25
    for word in words:
        assert pydoc.locate(f"tunesmith.{word}"), word
