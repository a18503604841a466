"""The records of the ways to train: what each says of itself, and that one more is one file and one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tunesmith
from tunesmith.options.plans import plan_options
from tunesmith.train.methods.table import METHODS, method_of

PACKAGE = Path(tunesmith.__file__).parent

NEW_METHOD = '''"""Preferences without a reference: the first term of CPO (Xu et al. 2024, arXiv 2401.08417), for comparisons with DPO."""

from __future__ import annotations

from dataclasses import dataclass, field

from tunesmith.options.configs import precision_of
from tunesmith.options.training import RewardConfig
from tunesmith.train.methods.method import Method
from tunesmith.train.methods.preferences import OBSERVED, check_pair_options, pair_metrics


@dataclass(frozen=True)
class CPOOptions:
    """The preference loss"""

    beta: float = 0.1
    """How much a nat between the two answers counts."""


@dataclass(frozen=True)
class CPOConfig(RewardConfig):
    """Preferences without a reference."""

    cpo: CPOOptions = field(default_factory=CPOOptions)


def check(config):
    problems = check_pair_options(config.data)
    return problems if config.cpo.beta > 0 else [*problems, f"--cpo.beta is {config.cpo.beta:g}, expected more than 0"]


def loss_sum(model, config):
    from tunesmith.train.pair_loss import PreferenceLoss, dpo_loss_sum
    from tunesmith.train.reference import zeros

    settings, precision = PreferenceLoss(config.cpo.beta), precision_of(config)
    return lambda batch: dpo_loss_sum(model, batch, zeros(batch), settings, precision)


def task(run):
    from tunesmith.train.pair_loss import PreferenceLoss, estimate_dpo
    from tunesmith.train.reference import zeros

    train, validation, settings = run.data.train, run.data.validation, PreferenceLoss(run.config.cpo.beta)

    def estimate(batches, sampled=None):
        return estimate_dpo(run.trainee.trunk, batches, zeros, settings, run.precision, sampled)

    def evaluate(sampled):
        on_validation, losses = estimate(validation.fixed(run.iters))
        return pair_metrics(estimate(train.sample(run.iters), sampled)[0], on_validation), losses

    return run.task(
        loss_sum=loss_sum(run.trainee.trunk, run.config),
        evaluate=evaluate,
        train_loss=lambda n, sampled: estimate(train.sample(n), sampled)[0]["loss"],
        about=f"{len(train.rows):,} pairs",
    )


METHOD = Method(
    command="cpo",
    config=CPOConfig,
    title="Preferences without a reference",
    learning_rate=1e-6,
    pairs=True,
    observed=OBSERVED,
    check=check,
    loss_sum=loss_sum,
    task=task,
)
'''


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_is_found_by_its_options_and_those_of_its_plan(method):
    assert METHODS[method.command] is method
    assert method_of(method.config()) is method
    assert method_of(plan_options(method.config)()) is method
    assert method.counted == ("pairs" if method.pairs else "target_tokens")


@pytest.fixture
def house(tmp_path):
    """A copy of the package with one more method; runs a command in it."""
    shutil.copytree(PACKAGE, tmp_path / "tunesmith", ignore=shutil.ignore_patterns("__pycache__"))
    methods = tmp_path / "tunesmith/train/methods"
    (methods / "cpo.py").write_text(NEW_METHOD)
    table = (methods / "table.py").read_text()
    changed = table.replace("ABOUT = {\n", 'ABOUT = {\n    "cpo": "preferences without a reference",\n')
    assert len(changed.splitlines()) == len(table.splitlines()) + 1
    (methods / "table.py").write_text(changed)

    def run(*argv, code=0):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-m", "tunesmith", *argv]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


OPTIONS = [
    "--model", "sample", "--data", "sample", "--train.steps", "2", "--data.block_size", "128", "--train.precision", "fp32",
    "--eval.iters", "1", "--train.device", "cpu",
]  # fmt: skip


def test_one_more_method_is_one_file_and_one_line(house, tmp_path):
    assert "preferences without a reference" in house("--help")
    assert "--cpo.beta" in house("cpo", "--help")
    assert "--cpo.beta is 0" in house("cpo", *OPTIONS, "--cpo.beta", "0", code=2)
    house("cpo", *OPTIONS, "--out", "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    assert {"loss", "margin", "pairs"} <= steps[0].keys()
    house("cpo", "--out", "run", "--resume", "--train.steps", "3")
    assert "Preferences without a reference" in (tmp_path / house("report", "run").strip()).read_text()
    assert "cpo of sample" in house("plan", "cpo", *OPTIONS, "--device", "t4")
    (tmp_path / "mine.yaml").write_text("experiments: {x: {command: cpo, set: {model.name: sample, train.steps: 2}}}")
    assert "cpo" in house("study", "mine.yaml", "--dry_run")
