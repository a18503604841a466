"""`tunesmith study paper --scale smoke`, every experiment of the paper, once."""

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hanging import wait_for
from tiny_runs import train_losses
from tunesmith.files.run import Run

pytestmark = pytest.mark.long


def command(out, *more):
    return [sys.executable, "-m", "tunesmith", "study", "paper", "--scale", "smoke", "--out", str(out), *more]


def done(out):
    """The runs that came to an end."""
    if not (out / "progress.json").exists():
        return set()
    found = json.loads((out / "progress.json").read_text())["runs"]
    return {name for name, run in found.items() if run["state"] in ("finished", "diverged")}


def alive(out):
    """Processes that still work in the study's directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] if str(out).encode() in path.read_bytes() else []
    return found


def begin_on_ray(out):
    """The study on a cluster of two nodes, killed in its middle."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        two.add_node(num_cpus=1)
        words = command(out, "--executor", "ray", "--ray_address", two.address)
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: len(done(out)) >= 12, process)
        process.kill()
        process.communicate()
    finally:
        two.shutdown()
    wait_for(lambda: not alive(out))  # orphaned, the runs save and stop, or Ray has killed them


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Begun on Ray where it is installed, killed there, and finished on this machine: only what was missing."""
    out = tmp_path_factory.mktemp("smoke") / "paper"
    if importlib.util.find_spec("ray"):
        begin_on_ray(out)
    before = done(out)
    finished = subprocess.run(command(out, "--jobs", "2"), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    begun = {line.split(":")[0] for line in finished.stdout.splitlines() if line.endswith(("starts", "continues"))}
    assert begun
    assert not begun & before
    return out


def runs(study, experiment):
    """(label, seed) -> run."""
    shown = json.loads((study / "plan.json").read_text())["experiments"][experiment]["runs"]
    return {(s["label"], s["seed"]): Run(study / "runs" / s["run"]) for s in shown}


def losses(run, name="validation_loss"):
    return [e[name] for e in run.metrics("eval")]


def test_every_run_is_done_and_only_the_high_rates_diverge(study):
    progress = json.loads((study / "progress.json").read_text())["runs"]
    assert len(progress) >= 20
    diverged = {name for name, run in progress.items() if run["state"] == "diverged"}
    assert diverged == {f"e1b-lr{rate}-s{n}" for rate in (1, 0.1) for n in (1, 2)}
    assert all(run["state"] == "finished" for name, run in progress.items() if name not in diverged)


def test_the_continuation_is_one_curve_with_its_first_half(study):
    found = runs(study, "e1")
    for seed in (1234, 5678):
        half, whole = found["first half", seed], found["continued", seed]
        assert train_losses(whole)[: len(train_losses(half))] == train_losses(half)
        assert len(train_losses(whole)) == 2 * len(train_losses(half)) == 96
        assert losses(half)[-1] < losses(half)[0] - 0.3


def test_every_estimate_is_judged_with_the_untouched_base_first(study):
    for run in runs(study, "e2").values():
        rewards = run.metrics("reward")
        assert [r["step"] for r in rewards] == [e["step"] for e in run.metrics("eval")]
        assert rewards[0]["step"] == 0
        assert rewards[0]["n"] == 40
        assert "reward-model" in rewards[0]["scorer"]


def test_the_optimizers_saw_the_same_batches_and_plain_sgd_is_slowest(study):
    found = runs(study, "e4")
    for seed in (1234, 5678):
        first = {label: train_losses(run)[0] for (label, s), run in found.items() if s == seed}
        assert len(first) == 5
        assert len(set(first.values())) == 1
        last = {label: losses(run)[-1] for (label, s), run in found.items() if s == seed}
        assert last["AdamW"] < last["SGD-momentum"] < last["SGD"]


def test_four_times_one_is_a_batch_of_four(study):
    found = runs(study, "e7")
    for seed in (1234, 5678):
        one, four = train_losses(found["batch 4 = 4 x 1", seed]), train_losses(found["batch 4", seed])
        assert one == pytest.approx(four, rel=1e-5)
        assert losses(found["batch 4 = 4 x 1", seed]) == pytest.approx(losses(found["batch 4", seed]), rel=1e-4)


def test_dpo_begins_at_the_logarithm_of_two_and_learns_to_prefer(study):
    for run in runs(study, "e8").values():
        assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
        assert losses(run)[-1] < 0.65
        names = {"validation_accuracy", "validation_margin", "validation_drift_chosen", "sft_loss"}
        assert names <= set(run.metrics("eval")[-1])


def test_lora_trains_far_less_and_few_rows_overfit(study):
    ranks = {label: losses(run)[-1] for (label, _), run in runs(study, "e5").items()}
    assert set(ranks) == {"rank 1", "rank 2", "rank 8", "rank 16", "full"}
    for run in runs(study, "e6").values():
        assert losses(run, "train_loss")[-1] < losses(run)[-1] - 0.5


def test_started_again_nothing_is_left_to_do_and_the_report_is_the_same(study):
    page = study / "report" / "index.html"
    first = page.read_bytes()
    page.unlink()
    again = subprocess.run(command(study), capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "starts" not in again.stdout
    assert "33 of 33 done" in again.stdout
    assert page.read_bytes() == first
