"""What a plan and a study predict for one run is the same."""

import json
import shlex

import pytest

from real_studies import write_study
from tunesmith.__main__ import main
from tunesmith.files.names import known_shape
from tunesmith.models.known import SIZES
from tunesmith.options.parse import from_settings
from tunesmith.options.plans import PlanOptions
from tunesmith.plan.planning import find_place, make_setting
from tunesmith.plan.workload import Rows
from tunesmith.study.forecast import forecast_of, probe
from tunesmith.train.methods.table import METHODS

ROWS = {
    "model.name": "sample",
    "train.steps": 3,
    "train.precision": "fp32",
    "train.device": "cpu",
    "data.block_size": 64,
}
RUNS = {
    "sft": ("sft", {"train.batch_size": 12}),
    "windows": ("sft", {"data.batching": "windows", "train.batch_size": 12}),
    "padded": ("sft", {"data.batching": "padded", "train.batch_size": 12}),
    "lora": ("sft", {"lora.rank": 4, "train.weights": "bf16"}),
    "lean": ("sft", {"optimizer.name": "sgd", "train.activation_checkpointing": True}),
    "dpo": ("dpo", {"train.batch_size": 8}),
    "elsewhere": ("dpo", {"dpo.reference_device": "cuda:1"}),
    "on the same": ("dpo", {"dpo.reference_device": "cpu"}),
    "second": ("dpo", {"dpo.reference": "model"}),
    "adapter": ("dpo", {"dpo.reference": "adapter", "lora.rank": 2}),
    "reward": ("reward", {"train.batch_size": 8}),
}
MORE = {"pretrain": ("pretrain", {"model.block_size": 64, "model.name": "gpt2"})}


@pytest.mark.parametrize("case", RUNS | MORE)
def test_a_study_forecasts_what_a_plan_says(case):
    command, options = (RUNS | MORE)[case]
    config = from_settings(METHODS[command].config, ROWS | options, "test")
    shape = known_shape(str(config.model.name)) or SIZES["gpt2"]
    planned = make_setting(config, shape, Rows(PlanOptions.text_tokens, PlanOptions.supervised), find_place("cpu"), {})
    forecast = forecast_of(config, shape)
    assert forecast.memory == planned.memory
    assert forecast.setting.operations == planned.operations > 0
    assert 0 < forecast.setting.forward_operations < planned.operations


def test_a_second_model_counts_where_it_is():
    """Its weights, 4 bytes a number, are on the training's device or on another; a kept reference has none."""
    peaks = {}
    for name in ("dpo", "elsewhere", "on the same", "second"):
        config = from_settings(METHODS["dpo"].config, ROWS | RUNS[name][1] | {"train.batch_size": 1}, "test")
        peaks[name] = forecast_of(config, known_shape("sample")).memory.peak
    weights = 4 * known_shape("sample").family.count(known_shape("sample"))
    assert peaks["dpo"] == peaks["elsewhere"] == peaks["second"] - weights
    assert peaks["on the same"] == peaks["second"]


def test_every_method_is_held_to_that():
    assert {command for command, _ in (RUNS | MORE).values()} == set(METHODS)


@pytest.mark.parametrize("case", ["lora", "dpo", "second", "reward"])
def test_the_dry_run_shows_the_plans_figure(case, tmp_path, capfd):
    command, options = RUNS[case]
    options = ROWS | options
    experiments = {"x": {"runs": {case: {"command": command, "set": options}}}}
    file = write_study(tmp_path, "sample", experiments)
    assert main(["study", str(file), "--dry_run"]) == 0
    row = next(line for line in capfd.readouterr().out.splitlines() if line.startswith(f"{case}-s1"))
    argv = shlex.split(" ".join(f"--{name} {str(value).lower()}" for name, value in options.items()))
    assert main(["plan", command, *argv, "--device", "p100", "--out", str(tmp_path / "plan.json")]) == 0
    counted = json.loads((tmp_path / "plan.json").read_text())["memory"]["counted_peak"]
    assert f" {counted / 1e9:.2f} GB" in row


def test_a_run_that_cannot_be_timed_here_takes_the_rate_of_its_like():
    """The reference of the smaller step has no device here."""
    options = {"away": {"dpo.reference_device": "cuda:77"}, "here": {"train.batch_size": 2}}
    forecasts = {
        name: forecast_of(from_settings(METHODS["dpo"].config, ROWS | more, "test"), known_shape("sample"))
        for name, more in options.items()
    }
    rates = probe(forecasts)
    assert rates["away"] == rates["here"] > 0
    assert probe({"away": forecasts["away"]}) == {}
