"""A training is stopped as diverged when it has made its model worse, and only then: not by noise, and however short it was."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import tunesmith as ts
from tiny_runs import change_step_loss, comparable, digest, tiny_config
from tunesmith.__main__ import main
from tunesmith.errors import UserError
from tunesmith.files.weights import save_model
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig
from tunesmith.train.choice import Estimate
from tunesmith.train.divergence import Watch, batches_to_judge_by, sound_steps

SHAPES = json.loads((Path(__file__).parents[1] / "loss_shapes.json").read_text())
"""What 200 real runs showed (the file says how they were made): how the loss on a sample of the rows went, relative to step 0, and how
the losses of single steps lie around it: their mean ("lift", of dropout), spread and correlation from step to step."""
WINDOW = 50


def drive(steps, level, shape, rng, window=WINDOW):
    """The step after which a made run is stopped, and whether that is its end; None for one that is let be.

    level: step -> the true loss, relative to step 0, of steps 0 to `steps`.
    """
    lift, spread, correlation = shape["lift"], shape["spread"], shape["correlation"]
    noise = rng.standard_normal(steps + 1)
    for t in range(1, steps + 1):
        noise[t] = correlation * noise[t - 1] + (1 - correlation**2) ** 0.5 * noise[t]
    losses = 4 * level * lift * np.exp(spread * noise - spread**2 / 2)
    before = 4 * (
        1 + spread / batches_to_judge_by(steps) ** 0.5 * rng.standard_normal()
    )  # other rows than those of the steps
    watch = Watch(window, before)
    for t in range(1, steps + 1):
        watch.take(t, float(losses[t]))
        if watch.look_at is not None and watch.look_at <= t < steps and watch.judge(before * level[t]):
            return t, False
    return (steps, True) if watch.judge_end(before * level[steps]) else None


def healthy(steps, shape):
    """A real run's course, stretched over `steps`."""
    at = np.array([0, 2, 5, 10, 20, 40]) * (max(steps, 40) / 40)
    return np.interp(np.arange(steps + 1), at, [1.0, *shape["course"]])


def test_of_3000_healthy_runs_at_most_one_in_200_is_stopped():
    assert len(SHAPES["shapes"]) == 200
    rng, pick = np.random.default_rng(0), random.Random(0)
    stopped = 0
    for _ in range(3000):
        shape, steps = pick.choice(SHAPES["shapes"]), pick.choice((1, 5, 20, 49, 50, 51, 80, 150, 300))
        stopped += drive(steps, healthy(steps, shape), shape, rng) is not None
    assert stopped <= 15


@pytest.mark.parametrize("way", ["at once", "slowly", "ever faster"])
def test_every_run_whose_loss_doubles_is_stopped_within_its_window_or_at_its_end(way):
    rng, pick = np.random.default_rng(1), random.Random(1)
    for _ in range(300):
        shape, steps = pick.choice(SHAPES["shapes"]), pick.choice((1, 2, 5, 20, 49, 50, 51, 80, 150, 300))
        doubled = pick.randint(1, steps)
        t = np.arange(steps + 1)
        rise = {"at once": t >= doubled, "slowly": np.minimum(1, t / doubled), "ever faster": (t / doubled) ** 4}[way]
        level = healthy(steps, shape)
        level = level + rise * (2 - level)
        found = drive(steps, level, shape, rng)
        assert found is not None
        assert found[1] or found[0] <= doubled + WINDOW + 1


def test_a_suspicion_is_looked_into_once_and_then_the_window_begins_anew():
    watch = Watch(3, before=1.0)
    for step in (1, 2):
        watch.take(step, 9.0)
        assert watch.look_at is None, "the window is not full"
    watch.take(3, 9.0)
    assert watch.look_at == 4
    watch.take(4, 9.0)
    assert watch.judge(1.0) == ""
    assert (watch.look_at, len(watch.losses)) == (None, 0)
    for step in (5, 6, 7):
        watch.take(step, 9.0)
    assert watch.look_at == 8
    assert "mean loss of the last 3 steps 9.000 lies above that of step 0, 1.000" in watch.judge(1.06)
    assert Watch(3, 1.0, look_at=9).judge_end(1.06), "a suspicion at the last step"
    assert not Watch(3, 1.0).judge_end(1.4)
    assert Watch(3, 1.0).judge_end(float("nan"))
    assert Watch(3, 1.0, recent=[1.0, 2.5]).judge_end(1.06), "a mean of 1.75"
    assert not Watch(3, 1.0, recent=[1.0, 2.5]).judge_end(1.04)
    assert not Watch(3, 1.0, recent=[1.0, 1.5]).judge_end(1.4)
    assert Watch(0, None, look_at=9).look_at is None


def test_an_estimate_is_sound_if_its_loss_had_not_risen_before_the_divergence_showed():
    estimates = [Estimate(step, loss, 1.0) for step, loss in ((0, 2.0), (5, 1.5), (10, 2.05), (15, 2.2), (20, 0.1))]
    assert sound_steps(estimates, 99.0, diverged_at=20) == {0, 5, 10}, "step 0 is of the same rows"
    assert sound_steps(estimates[1:], 1.5, diverged_at=20) == {5}
    assert sound_steps(estimates[1:], None, diverged_at=20) == {5, 10, 15}, "nobody measured the start"
    assert sound_steps([Estimate(5, None, 1.0)], 1.0, diverged_at=20) == {5}
    assert sound_steps([], 1.0, diverged_at=20) == set()


# Real runs


@pytest.mark.parametrize("at_start", [True, False])
def test_a_run_at_a_rate_of_0_is_not_stopped_however_its_batches_differ(tiny_directory, tmp_path, at_start):
    """Nor where dropout lifts every loss: the window of one step is above the start again and again."""
    options = {
        "optimizer__lr": 0.0, "train__batch_size": 1, "train__steps": 30, "train__diverge_after": 1, "eval__at_start": at_start,
        "model__dropout": 0.3, "eval__every": 30, "eval__iters": 1, "data__block_size": 64,
    }  # fmt: skip
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options))
    assert (run.status["state"], run.status["step"]) == ("finished", 30)


@pytest.mark.parametrize(("steps", "kind"), [(1, None), (3, None), (12, None), (3, DPOConfig)])
def test_a_short_run_that_ends_far_above_its_start_has_diverged(tiny_directory, tmp_path, capsys, steps, kind):
    options = {"train__steps": steps, "eval__at_start": False, "optimizer__lr": 1.0, "eval__iters": 1}
    config = tiny_config(tiny_directory, tmp_path / "r", **options, **({"kind": kind} if kind else {}))
    run = ts.dpo(config) if kind else ts.sft(config)
    assert run.status["state"] == "diverged"
    assert run.status["step"] == steps
    told = run.status["reason"]
    assert "before the first step and is, on the same rows," in told
    assert "lower --optimizer.lr (now 1)" in told
    assert run.metrics("diverged")[0]["loss"] > 1.5 * (0.69 if kind else 8)
    before = comparable(run)
    assert main(["dpo" if kind else "sft", "--resume", "--out", str(run.path)]) == 1
    assert capsys.readouterr().err == f"tunesmith: {told}\n"
    assert comparable(run) == before


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig, RewardConfig])
def test_ten_steps_at_an_absurd_rate_have_diverged(tiny_directory, tmp_path, kind, seed):
    """Of a reward model also where the loss comes back to nearly log 2: the scores of a wrecked one are all alike."""
    options = {"train__steps": 10, "optimizer__lr": 1.0, "data__seed": seed, "eval__at_start": False, "eval__iters": 1}
    train = {SFTConfig: ts.sft, DPOConfig: ts.dpo, RewardConfig: ts.train_reward_model}[kind]
    run = train(tiny_config(tiny_directory, tmp_path / "r", kind, **options))
    assert run.status["state"] == "diverged"
    before = {SFTConfig: 8.7, DPOConfig: 0.693, RewardConfig: 0.66}[kind]
    assert run.metrics("diverged")[0]["loss"] > 1.05 * before


@pytest.mark.parametrize("kind", [DPOConfig, RewardConfig])
def test_a_few_good_steps_on_pairs_end_as_finished(tiny_directory, tmp_path, kind):
    options = {"train__steps": 5, "train__batch_size": 1, "eval__at_start": False, "eval__iters": 1}
    train = ts.dpo if kind is DPOConfig else ts.train_reward_model
    run = train(tiny_config(tiny_directory, tmp_path / "r", kind, **options))
    assert run.status["state"] == "finished"


@pytest.mark.parametrize("at_start", [True, False])
def test_a_run_that_diverges_at_its_end_names_the_checkpoint_to_use(tiny_directory, tmp_path, capsys, at_start):
    """Its newest checkpoint, of the diverged weights, has the only estimate where none was made at the start."""
    options = {"optimizer__lr": 1.0, "train__steps": 3, "eval__every": 1000, "checkpoint__every": 1000}
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options, eval__at_start=at_start))
    assert capsys.readouterr().out.splitlines()[-1] == f"diverged: {run.status['reason']}"
    assert [step for step, _ in run.checkpoints()] == [0, 3][not at_start :]
    if at_start:
        assert run.status["reason"].endswith("; the best checkpoint from before is that of step 0")
        assert (run.status["best_step"], run.status["choice"]["best_step"]) == (0, 0)
        assert run.status["best_validation_loss"] == run.metrics("eval")[0]["validation_loss"]
        assert digest(run.best_checkpoint()) == digest(tiny_directory)
        return
    assert run.status["reason"].endswith(
        f"; it has no good checkpoint: go on from {tiny_directory}, with which it began"
    )
    assert (run.status["best_step"], run.status["best_validation_loss"]) == (None, None)
    assert "choice" not in run.status
    with pytest.raises(UserError, match=f"{run.path} has diverged and left no good checkpoint: .*{run.path}@3"):
        ts.load(str(run.path), device="cpu")
    assert ts.load(f"{run.path}@3", device="cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_base_whose_loss_is_no_number_is_not_what_to_go_on_from(tiny_directory, tmp_path, capsys, precision):
    model, tokenizer = ts.load(str(tiny_directory), device="cpu")
    with torch.no_grad():
        next(model.parameters())[:] = float("nan")
    save_model(model, tokenizer, tmp_path / "base")
    run = ts.sft(tiny_config(tmp_path / "base", tmp_path / "r", train__precision=precision, eval__iters=1))
    told = run.status["reason"]
    assert told.startswith("loss nan or gradient norm nan is not finite at step 1 (rows ")
    or_else = ", or use --train.precision fp32 (now bf16)" * (precision == "bf16")
    ways = "; the loss was nan before the first step already: look at the weights it began with"
    assert told.endswith(f"){ways}{or_else}; it has no good checkpoint")
    assert capsys.readouterr().out.splitlines()[-1] == f"diverged: {told}"


def test_a_run_that_breaks_off_keeps_its_choice_of_the_estimates_before(tiny_directory, tmp_path, monkeypatch):
    calls = []

    def poisoned(loss_sum, batch):
        calls.append(1)
        return loss_sum(batch) * (float("nan") if len(calls) == 6 else 1.0)

    change_step_loss(monkeypatch, "sft", poisoned)
    options = {"eval__every": 2, "checkpoint__every": 1, "eval__at_start": False, "optimizer__lr": 3e-3}
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options))
    assert run.status["reason"].endswith("; the best checkpoint from before is that of step 4")
    assert (run.status["state"], run.status["step"], run.status["best_step"]) == ("diverged", 5, 4)


def test_a_lengthened_run_is_judged_on_the_rows_it_began_with(tiny_directory, tmp_path):
    options = {
        "eval__at_start": False,
        "eval__iters": 1,
        "data__block_size": 64,
        "optimizer__lr": 0.0,
        "train__batch_size": 1,
    }
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options, train__steps=4))

    def judged():
        stored = json.loads((run.checkpoints()[-1][1] / "training_state" / "state.json").read_text())["progress"]
        return stored["judged_on"], stored["loss_before"]

    before = judged()
    assert before[0] == 4
    longer = tiny_config(tiny_directory, run.path, **options, train__steps=40, resume=True)
    assert ts.sft(longer).status["state"] == "finished"
    assert judged() == before


def test_what_is_looked_at_costs_no_more_than_a_sixth_of_a_training():
    for micro_batches in (16, 50, 100, 40_000):
        assert 2 * batches_to_judge_by(micro_batches) / 3 <= micro_batches / 6
